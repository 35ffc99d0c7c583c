"""Every skip that may occur, with its reason. A skip that is not here, or needs not be on this machine, fails the run.

Otherwise running out of memory, or a package that was forgotten, could pass as a skip.
"""

import platform
import re
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

    is_needed_here: whether this machine lacks what the test needs; called with the groups of `reason`.
    """

    test: str
    reason: str
    why: str
    is_needed_here: Callable[..., bool]

    def covers(self, skip: Skip) -> bool:
        return bool(re.fullmatch(self.test, skip.test) and re.fullmatch(self.reason, skip.reason))


# Extras, packages whose signatures or formats are adapted, and triton, which exists on Linux only.
OPTIONAL = ("flash_attn", "flashinfer", "flashinfer_bench", "gguf", "material", "matplotlib", "starlette", "triton")
OPTIONAL += ("uvicorn", "vllm")


def _gpus() -> list[tuple[int, int]]:
    """Compute capabilities, as far as the skipped test has loaded torch in this process (not in a worker of xdist)."""
    torch = sys.modules.get("torch")
    return [] if torch is None else [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]


def _is_kernel_given() -> bool:
    registry = sys.modules.get("tests.support.kernels.registry")
    return bool(registry is not None and registry.REPLACED)


def _has_no_async_compile() -> bool:
    import triton

    return not hasattr(triton, "AsyncCompileMode")


def _is_absent(package: str) -> bool:
    return find_spec(package) is None and not (package == "triton" and sys.platform.startswith("linux"))


# fmt: off
ALLOWED = [
    AllowedSkip(
        r".*", rf"could not import '({'|'.join(OPTIONAL)})\b.*", "the package is optional", _is_absent,
    ),
    AllowedSkip(
        r"tests/distributed/test_gpu_ranks\.py::test_\w+\[.*\]", r"needs [248] GPUs, there are [0-7]",
        "a run with -m multi_gpu takes the sizes for which there are GPUs", lambda: len(_gpus()) < 8,
    ),
    AllowedSkip(
        r"tests/kernels/test_kernels\.py::test_(\w+_)?on_a_gpu\[varlen_attention_hopper.*",
        r"needs compute capability 9\.0", "a kernel for Hopper GPUs only", lambda: (9, 0) not in _gpus(),
    ),
    AllowedSkip(
        r"tests/unit/layers/test_packed_weights\.py::.*", r"needs oneDNN on x86",
        "weights are packed on x86 alone", lambda: platform.machine() not in ("x86_64", "AMD64"),
    ),
    AllowedSkip(
        r"tests/e2e/test_real_model\.py::.*", r"needs the real model: make real-model",
        "a run with -m real_model where the model was not made", lambda: not (REAL_MODEL / "config.json").exists(),
    ),
    AllowedSkip(
        r"tests/conformance/engines/test_engine\.py::test_contract\[E\d\d\]", r"not applicable: .*",
        "a run with --engine: its adapter says what that engine cannot do", lambda: "--engine" in str(sys.argv),
    ),
    AllowedSkip(
        r"tests/unit/conformance/test_engine_plugin\.py::test_on_a_gpu\[.*\]", r"(vllm|nano-vllm) is not installed",
        "other engines, which few GPU machines have", lambda _: True,
    ),
    AllowedSkip(
        r"tests/(kernels/test_\w+|e2e/test_examples)\.py::.*", re.escape(INTERPRETER_REASON),
        "the pinned versions can interpret; others are installed on GPU machines", lambda: not interprets(),
    ),
    AllowedSkip(
        r"tests/kernels/test_launching\.py::.*", r"this version of Triton has no AsyncCompileMode",
        "kernels are compiled one after another there", _has_no_async_compile,
    ),
    AllowedSkip(
        r"(tests|benchmarks)/kernels/test_\w+\.py::.*", r"not judged: .*",
        "a callable given by --kernel need not support every case", _is_kernel_given,
    ),
    AllowedSkip(
        r"tests/conformance/components/test_target\.py::test_contract\[C\d\d\]", r"not applicable: .*",
        "the checkout that --target names has no such part, or an unknown shape", lambda: "--target" in str(sys.argv),
    ),
    AllowedSkip(
        r"tests/conformance/components/test_target\.py::test_contract\[.*NOTSET\]", r"got empty parameter set.*",
        "no --target was given", lambda: True,
    ),
]
# fmt: on


def check(skips: Iterable[Skip]) -> list[str]:
    """What is wrong with the skips of a run, a sentence each; empty if all are allowed."""
    problems = []
    for skip in skips:
        entry = next((entry for entry in ALLOWED if entry.covers(skip)), None)
        if entry is None:
            problems.append(f"skipped, but not on the list of tests/support/skips.py: {skip.test} ({skip.reason})")
        elif not entry.is_needed_here(*re.fullmatch(entry.reason, skip.reason).groups()):  # type: ignore[union-attr]
            problems.append(f"skipped, though nothing that it needs is missing here: {skip.test} ({skip.reason})")
    return problems


def why(skip: Skip) -> str:
    """The reason that the list gives; empty if the skip is not allowed."""
    return next((entry.why for entry in ALLOWED if entry.covers(skip)), "")
