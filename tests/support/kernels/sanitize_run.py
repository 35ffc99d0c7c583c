"""A small run of every kernel on a GPU under compute-sanitizer: the cases that the interpreter runs too.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck \\
        python -m tests.support.kernels.sanitize_run [NAME ...]

`make sanitize` does so with memcheck, initcheck and racecheck. Without torch's caching, and without the margins that
the interpreter needs, every tensor is a separate allocation, and the memory beyond it belongs to no tensor. A
launcher's outputs and scratch are not initialised, so that initcheck sees a read of what no kernel wrote. A case ends
when its kernels have run: other tests check the results, and a check here would read elements that need not be written.
"""

import sys
from contextlib import suppress
from unittest.mock import patch

import torch

from tests.support.kernels import guards
from tests.support.kernels.registry import kernels

FAR = "far"  # cases beyond 2**31 elements: gigabytes, which the tools take very long to watch


def _judges_nothing(_: guards.Guards) -> None:
    torch.cuda.synchronize()
    raise AssertionError("the case's kernels have run")


def main(names: list[str]) -> None:
    if not torch.cuda.is_available():
        sys.exit("error: compute-sanitizer watches kernels on an NVIDIA GPU, and there is none here")
    capability = torch.cuda.get_device_capability()
    names = names or [name for name, kernel in kernels().items() if kernel.capability in (None, capability)]
    with (
        patch.object(guards, "MARGIN", 0),
        patch.object(guards, "ALLOCATIONS", set()),
        patch.object(guards.Guards, "assert_intact", _judges_nothing),
    ):
        for name in names:
            runs = [check for case, check in kernels()[name].cases.items() if not case.startswith(FAR)]
            for run in runs:
                with suppress(AssertionError):
                    run("cuda")
            torch.cuda.synchronize()
            print(f"{name}: {len(runs)} cases", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
