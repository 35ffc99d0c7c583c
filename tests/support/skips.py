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


def _runs_another_engine() -> bool:
    from tests.conformance.engines.plugin import adapter_lacks_something

    return adapter_lacks_something()


def _is_kernel_given() -> bool:
    registry = sys.modules.get("tests.support.kernels.registry")
    return bool(registry is not None and registry.REPLACED)


def _has_no_async_compile() -> bool:
    import triton

    return not hasattr(triton, "AsyncCompileMode")


# fmt: off
ALLOWED = [
    AllowedSkip(
        r"tests/unit/distributed/test_message_queue\.py::test_a_real_small_file_system",
        r"needs a mount namespace of its own", 1, "most containers do not permit one", _cannot_mount,
    ),
    AllowedSkip(
        r"tests/distributed/test_gpu_ranks\.py::test_\w+\[.*\]", r"needs [248] GPUs, there are [0-7]", 32,
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
        r"tests/unit/test_docs_site\.py::test_.*", r"could not import 'material': it builds the document", 5,
        "mkdocs-material builds the document, and is an extra", lambda: find_spec("material") is None,
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
        r"tests/unit/test_docs_site\.py::test_.*", r"could not import 'matplotlib': it sets the formulas", 30,
        "matplotlib sets the document's formulas, and is an extra", lambda: find_spec("matplotlib") is None,
    ),
    AllowedSkip(
        r"tests/e2e/test_examples\.py::test_.*http_server.*", r"could not import '(starlette|uvicorn)'.*", 2,
        "the server of one example; the test extra brings it, GPU machines may lack it",
        lambda: find_spec("starlette") is None or find_spec("uvicorn") is None,
    ),
    AllowedSkip(
        r"tests/e2e/test_examples\.py::test_(the_custom_kernel|the_suite_judges).*", r"could not import 'triton'.*", 2,
        "Triton exists on Linux only", lambda: not sys.platform.startswith("linux"),
    ),
    AllowedSkip(
        r"tests/(kernels/(test_\w+|sampling_probes)|support/kernels/faulty_kernels|unit/layers/test_ops)\.py(::.*)?",
        r"could not import 'triton'.*", 25, "Triton exists on Linux only", lambda: not sys.platform.startswith("linux"),
    ),
    AllowedSkip(
        r"tests/conformance/engines/test_engine\.py::test_contract\[E\d\d\]", r"not applicable: .*", 9,
        "a run with --engine: its adapter says what that engine cannot do", _runs_another_engine,
    ),
    AllowedSkip(
        r"tests/unit/conformance/test_engine_plugin\.py::test_on_a_gpu\[.*\]", r"(vllm|nano-vllm) is not installed", 2,
        "other engines, which few GPU machines have", lambda: True,
    ),
    AllowedSkip(
        r"tests/(kernels/test_\w+|e2e/test_examples)\.py::.*", re.escape(INTERPRETER_REASON), 402,
        "the pinned versions can interpret; others are installed on GPU machines", lambda: not interprets(),
    ),
    AllowedSkip(
        r"tests/kernels/test_launching\.py::.*", r"this version of Triton has no AsyncCompileMode", 3,
        "kernels are compiled one after another there", _has_no_async_compile,
    ),
    AllowedSkip(
        r"tests/kernels/test_adapters\.py::test_the_library_passes_our_cases_on_a_gpu\[.*\]",
        r"could not import '(flash_attn|flashinfer|vllm\..*)'.*", 10, "libraries whose signatures are adapted",
        lambda: None in map(find_spec, ("flash_attn", "flashinfer", "vllm")),
    ),
    AllowedSkip(
        r"tests/(unit/test_flashinfer_trace|kernels/test_trace_solutions)\.py::test_.*",
        r"could not import 'flashinfer_bench'.*", 11, "it has the models of FlashInfer-Trace's format, and is optional",
        lambda: find_spec("flashinfer_bench") is None,
    ),
    AllowedSkip(
        r"(tests|benchmarks)/kernels/test_\w+\.py::.*", r"not judged: .*", 10_000,
        "a callable given by --kernel need not support every case", _is_kernel_given,
    ),
    AllowedSkip(
        r"tests/conformance/components/test_target\.py::test_contract\[C\d\d\]", r"not applicable: .*", 40,
        "the checkout that --target names has no such part, or an unknown shape", lambda: "--target" in str(sys.argv),
    ),
    AllowedSkip(
        r"tests/conformance/components/test_target\.py::test_contract\[.*NOTSET\]", r"got empty parameter set.*", 1,
        "no --target was given", lambda: True,
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
