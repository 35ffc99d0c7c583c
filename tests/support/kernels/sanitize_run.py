"""A small run of every kernel on a GPU, for compute-sanitizer to watch: the cases that the interpreter runs too.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m tests.support.kernels.sanitize_run [NAME ...]

`make sanitize` does so with memcheck, initcheck and racecheck. Without torch's caching, and without the margins that
the interpreter needs, every tensor is an allocation of its own, and what lies beyond it belongs to nobody. A launcher's
outputs and scratch are left as they come, so that initcheck sees a read of what no kernel wrote. A case ends when its
kernels have run: what they computed is for the other tests to judge, and judging would read what need not be written.
"""

import importlib
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch

from tests.support.kernels import interpreting

FAR = "far"  # cases beyond 2**31 elements: gigabytes, which the tools take very long to watch


def small_runs(name: str) -> list[Callable[[], object]]:
    """What there is to run of the kernels in nanovllm/kernels/NAME.py."""
    if name == "varlen_attention_hopper":  # which has no cases of its own, for it is not interpreted
        from tests.kernels.test_varlen_attention_hopper import Case, assert_right

        lens = ((129, 200), (3, 3), (64, 64))
        return [partial(assert_right, Case(lens, size, 4, 2, 128, torch.bfloat16)) for size in (0, 16, 256)]
    checks = importlib.import_module(f"tests.kernels.{name}_cases").CHECKS
    return [partial(check, "cuda") for case, check in checks.items() if not case.startswith(FAR)]


def _judges_nothing(_: interpreting.Guards) -> None:
    torch.cuda.synchronize()
    raise AssertionError("the case's kernels have run")


def main(names: list[str]) -> None:
    folder = Path(__file__).resolve().parent
    if not names:
        names = sorted(path.stem.removesuffix("_cases") for path in folder.glob("*_cases.py"))
        if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
            names.append("varlen_attention_hopper")
    if not torch.cuda.is_available():
        sys.exit("error: compute-sanitizer watches kernels on an NVIDIA GPU, and there is none here")
    with (
        patch.object(interpreting, "MARGIN", 0),
        patch.object(interpreting, "_ALLOCATIONS", set()),
        patch.object(interpreting.Guards, "assert_intact", _judges_nothing),
    ):
        for name in names:
            runs = small_runs(name)
            for run in runs:
                with suppress(AssertionError):
                    run()
            torch.cuda.synchronize()
            print(f"{name}: {len(runs)} cases", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
