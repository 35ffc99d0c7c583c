"""Ranks that torchrun started. Two agents with a process each, over loopback, stand in for two machines."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams, bundled_model_path
from tests.support.counts import count_comparisons
from tests.support.limits import HANG_SECONDS
from tests.support.rank_engines import OPTIONS
from tests.support.rank_faults import WORDS
from tests.support.source_tree import ROOT

PROMPTS = ["In the beginning", "And it came to pass"]
CLI_OPTIONS = ["--device", "cpu", "--max-model-len", "64", "--max-tokens", "12", "--greedy"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def torchrun(log_dir: Path, *program: str) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of program on each of two machines with one rank each."""
    options = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", free_port()]
    agents = []
    for machine in range(2):
        where = [*map(str, options), "--node-rank", str(machine), "--log-dir", str(log_dir)]
        command = [sys.executable, "-m", "torch.distributed.run", *where, *program]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        agents.append(subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, **pipes))
    outputs = [agent.communicate(timeout=HANG_SECONDS) for agent in agents]
    return [(agent.returncode, *output) for agent, output in zip(agents, outputs, strict=True)]


def test_two_machines_give_what_one_process_gives(tmp_path: Path) -> None:
    """D37: the first machine prints, and the second, which was sent the steps over the network, computes its share."""
    with LLM(str(bundled_model_path()), **OPTIONS) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams.greedy(max_tokens=12), use_tqdm=False)
    expected = [f"\n>>> {prompt}\n{output['text']}\n" for prompt, output in zip(PROMPTS, outputs, strict=True)]
    first, second = torchrun(tmp_path, "-m", "nanovllm", "generate", *CLI_OPTIONS, *PROMPTS)
    assert first[:2] == (0, "".join(expected)), first[2]
    assert second[:2] == (0, ""), second[2]
    assert "using the bundled one" not in second[2]
    count_comparisons("ranks: texts of two machines against one process's", len(PROMPTS))


@pytest.mark.campaign
@pytest.mark.parametrize("place", ["load", "decode"])
def test_rank_0_raises_what_ended_a_rank_on_another_machine(tmp_path: Path, place: str) -> None:
    """D33: torchrun ends all ranks; before that, rank 0 has the cause."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os\n"
        "from nanovllm import LLM, SamplingParams, bundled_model_path\n"
        "from tests.support.rank_faults import Fault, plant_here\n"
        "if os.environ['RANK'] == '1':\n"
        f"    plant_here(Fault(1, {place!r}, 'raise'))\n"
        f"with LLM(str(bundled_model_path()), tensor_parallel_size=2, **{OPTIONS!r}) as llm:\n"
        "    llm.generate([[5, 6]], SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)\n"
    )
    first, second = torchrun(tmp_path, str(program))
    assert 0 not in (first[0], second[0])
    assert f"RankError: rank 1 of 2 failed: ArithmeticError: {WORDS}" in first[2]
    assert f"ArithmeticError: {WORDS}" in second[2]
