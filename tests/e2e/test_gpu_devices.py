"""The engine in a process whose GPU is named in another way than by its number."""

import os
import subprocess
import sys

import pytest
import torch

from tests.support.limits import HANG_SECONDS
from tests.support.source_tree import ROOT


@pytest.mark.gpu
@pytest.mark.whole_gpu
def test_the_engine_runs_on_a_gpu_named_by_its_uuid() -> None:
    """D45"""
    uuid = str(torch.cuda.get_device_properties(0).uuid).removeprefix("GPU-")
    options = ["--device", "cuda", "--attention-backend", "torch", "--greedy", "--max-tokens", "4"]
    result = subprocess.run(
        [sys.executable, "-m", "nanovllm", "generate", *options, "In the beginning"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": f"GPU-{uuid}"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert (result.returncode, result.stdout.startswith(" God")) == (0, True), result.stderr
