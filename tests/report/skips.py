"""Every skip that may happen, with its reason. One that is not here, or more of them than here, fails the run.

So running out of memory, a kernel that is missing or a package that was forgotten cannot pass as a skip.
"""

import importlib.util
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tests.report.facts import Skip
from tests.support.kernels.versions import INTERPRETER_REASON, interprets


@dataclass(frozen=True)
class Stated:
    """test and reason are regular expressions for the whole node id and the whole reason.

    expected: whether it may be skipped here: on a machine that lacks what the test needs.
    """

    test: str
    reason: str
    at_most: int
    why: str
    expected: Callable[[], bool]

    def covers(self, skip: Skip) -> bool:
        return bool(re.fullmatch(self.test, skip.test) and re.fullmatch(self.reason, skip.reason))


def _lacks(package: str) -> Callable[[], bool]:
    return lambda: importlib.util.find_spec(package) is None


def _has_few_gpus() -> bool:
    torch = sys.modules.get("torch")
    return torch is None or torch.cuda.device_count() < MOST_GPUS


def _has_no_hopper() -> bool:
    torch = sys.modules.get("torch")  # the test that was skipped has loaded it, unless a worker of xdist ran it
    return torch is None or not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0)


MOST_GPUS = 8  # that a test asks for

STATED = [
    Stated(
        r"tests/parallel/test_gpu_ranks\.py::test_ranks_over_nccl_say_what_one_says\[.*\]",
        r"needs [248] GPUs",
        at_most=24,  # four architectures, three sizes, graphs and eager
        why="a run with -m multi_gpu takes the sizes for which there are GPUs",
        expected=_has_few_gpus,
    ),
    Stated(
        r"tests/kernels/test_flash_attention\.py::test_equals_the_reference\[.*\]",
        r"could not import 'flash_attn'.*",
        at_most=90,  # all cases of the file
        why="flash-attn is an extra that is compiled on the GPU machine",
        expected=_lacks("flash_attn"),
    ),
    Stated(
        r"tests/kernels/test_kernels\.py::test_\w+_on_a_gpu(_only)?\[varlen_attention_hopper.*",
        r"needs compute capability 9\.0",
        at_most=120,  # all GPU tests of the kernel
        why="a kernel for Hopper GPUs only",
        expected=_has_no_hopper,
    ),
    Stated(
        r"tests/unit/test_benchmark_report\.py::test_.*",
        r"could not import 'matplotlib'.*",
        at_most=1,
        why="matplotlib draws a picture of benchmarks, and is an extra",
        expected=_lacks("matplotlib"),
    ),
    Stated(
        r"tests/(kernels/(test_\w+|sampling_probes)|support/kernels/faulty_kernels)\.py",
        r"could not import 'triton'.*",
        at_most=14,  # modules
        why="Triton exists on Linux only",
        expected=lambda: not sys.platform.startswith("linux"),
    ),
    Stated(
        r"tests/kernels/test_\w+\.py::.*",
        re.escape(INTERPRETER_REASON),
        at_most=300,
        why="the pinned versions do interpret; others are met on GPU machines",
        expected=lambda: not interprets(),
    ),
]


def judge(skips: Iterable[Skip], stated: Iterable[Stated] = STATED) -> list[str]:
    """What is wrong with the skips of a run, in words; empty if each is stated."""
    problems, stated = [], list(stated)
    numbers = dict.fromkeys(range(len(stated)), 0)
    for skip in skips:
        entry = next((index for index, known in enumerate(stated) if known.covers(skip)), None)
        if entry is None:
            problems.append(f"skipped, but not on the list of tests/report/skips.py: {skip.test} ({skip.reason})")
        elif not stated[entry].expected():
            problems.append(f"skipped, though nothing that it needs is missing here: {skip.test} ({skip.reason})")
        else:
            numbers[entry] += 1
    for index, number in numbers.items():
        if number > stated[index].at_most:
            problems.append(f"{number} skips where at most {stated[index].at_most} are stated: {stated[index].test}")
    return problems


def why(skip: Skip) -> str:
    """The stated reason; empty if there is none."""
    return next((entry.why for entry in STATED if entry.covers(skip)), "")
