"""Every skip that may occur, with its reason. A skip that is not here, or more of them than here, fails the run.

Otherwise running out of memory, or a package that was forgotten, could pass as a skip.
"""

import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import NamedTuple

from tests.support.kernels.versions import INTERPRETER_REASON, interprets
from tools.real_model import REAL_MODEL


class Skip(NamedTuple):
    """test: node id; of a module that was skipped whole, its path. reason: as the test gave it."""

    test: str
    reason: str


class AllowedSkip(NamedTuple):
    """test and reason are regular expressions for the whole node id and the whole reason.

    is_needed_here: whether this machine lacks what the test needs.
    """

    test: str
    reason: str
    at_most: int
    why: str
    is_needed_here: Callable[[], bool]

    def covers(self, skip: Skip) -> bool:
        return bool(re.fullmatch(self.test, skip.test) and re.fullmatch(self.reason, skip.reason))


def _gpus() -> list[tuple[int, int]]:
    """Compute capabilities, as far as the skipped test has loaded torch in this process (not in a worker of xdist)."""
    torch = sys.modules.get("torch")
    return [] if torch is None else [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]


def _cannot_mount() -> bool:
    """Whether this user may not make a mount namespace of its own, as in most containers."""
    command = ["unshare", "--mount", "--map-root-user", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    return shutil.which("unshare") is None or subprocess.run(command, capture_output=True).returncode != 0


# fmt: off
ALLOWED = [
    AllowedSkip(
        r"tests/unit/distributed/test_message_queue\.py::test_a_real_small_file_system",
        r"needs a mount namespace of its own", 1, "most containers do not permit one", _cannot_mount,
    ),
    AllowedSkip(
        r"tests/distributed/test_gpu_ranks\.py::test_\w+\[.*\]", r"needs [248] GPUs, there are [0-7]", 28,
        "a run with -m multi_gpu takes the sizes for which there are GPUs", lambda: len(_gpus()) < 8,
    ),
    AllowedSkip(
        r"tests/kernels/test_\w+\.py::test_(equals_the_reference|an_llm_launches_it_on_a_gpu)\[.*\]",
        r"could not import 'flash_attn'.*", 92,
        "flash-attn is an extra that is compiled on the GPU machine", lambda: find_spec("flash_attn") is None,
    ),
    AllowedSkip(
        r"tests/kernels/test_kernels\.py::test_(\w+_)?on_a_gpu\[varlen_attention_hopper.*",
        r"needs compute capability 9\.0", 120,
        "a kernel for Hopper GPUs only", lambda: (9, 0) not in _gpus(),
    ),
    AllowedSkip(
        r"tests/unit/test_benchmark_report\.py::test_.*", r"could not import 'matplotlib'.*", 1,
        "matplotlib draws a picture of benchmarks, and is an extra", lambda: find_spec("matplotlib") is None,
    ),
    AllowedSkip(
        r"tests/unit/layers/test_packed_weights\.py::.*", r"needs oneDNN on x86", 23,
        "weights are packed on x86 alone", lambda: platform.machine() not in ("x86_64", "AMD64"),
    ),
    AllowedSkip(
        r"tests/unit/test_real_model\.py", r"could not import 'gguf'.*", 1,
        "gguf reads the real model's file, and is an extra", lambda: find_spec("gguf") is None,
    ),
    AllowedSkip(
        r"tests/e2e/test_real_model\.py::.*", r"needs the real model: make real-model", 6,
        "a run with -m real_model where the model was not made", lambda: not (REAL_MODEL / "config.json").exists(),
    ),
    AllowedSkip(
        r"tests/(kernels/(test_\w+|sampling_probes)|support/kernels/faulty_kernels|unit/layers/test_ops)\.py(::.*)?",
        r"could not import 'triton'.*", 21, "Triton exists on Linux only", lambda: not sys.platform.startswith("linux"),
    ),
    AllowedSkip(
        r"tests/kernels/test_\w+\.py::.*", re.escape(INTERPRETER_REASON), 300,
        "the pinned versions can interpret; others are installed on GPU machines", lambda: not interprets(),
    ),
]
# fmt: on


def check(skips: Iterable[Skip], allowed: list[AllowedSkip] = ALLOWED) -> list[str]:
    """What is wrong with the skips of a run, a sentence each; empty if all are allowed."""
    problems, numbers = [], [0] * len(allowed)
    for skip in skips:
        index = next((index for index, entry in enumerate(allowed) if entry.covers(skip)), None)
        if index is None:
            problems.append(f"skipped, but not on the list of tests/support/skips.py: {skip.test} ({skip.reason})")
        elif not allowed[index].is_needed_here():
            problems.append(f"skipped, though nothing that it needs is missing here: {skip.test} ({skip.reason})")
        else:
            numbers[index] += 1
    for entry, number in zip(allowed, numbers, strict=True):
        if number > entry.at_most:
            problems.append(f"{number} skips where at most {entry.at_most} are allowed: {entry.test}")
    return problems


def why(skip: Skip) -> str:
    """The reason that the list gives; empty if the skip is not allowed."""
    return next((entry.why for entry in ALLOWED if entry.covers(skip)), "")
