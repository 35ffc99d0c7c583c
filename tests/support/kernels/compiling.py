"""Compiles what a launcher launches, on a machine without that GPU, and reads the resources from the result.

The launcher runs on meta tensors, which have shapes, strides and dtypes but no contents. So it compiles exactly what it
would launch, specialised as Triton would specialise it, and cannot depend on the values of the tensors.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.support.counts import COMPILED, count_kernel_comparisons
from tests.support.kernels.own_kernels import NOT_JUDGED, NotJudged
from tests.support.kernels.registry import Limits, kernels
from tests.support.kernels.versions import tolerated_stack_bytes

MAX_REGISTERS_OF_AN_SM = 65536
# Shared memory that one block may have, by compute capability (CUDA C++ Programming Guide, "Technical Specifications").
MAX_SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@dataclass(frozen=True)
class Compiled:
    """One kernel as compiled. registers: of a thread; stack_bytes: of a thread, 0 unless it spills.

    file: the last part of its module's name. dtype: of what its first pointer points to.
    """

    name: str
    file: str
    dtype: str
    capability: int
    num_warps: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    ptx: str = field(repr=False)


@contextmanager
def gpu_that_need_not_be_there(capability: int, device: str = "") -> Iterator[None]:
    """Triton compiles for a GPU of this capability, into a folder of its own.

    device: Triton keeps what it compiled for each device of another name, in this process.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    class Driver:
        """Replaces a GPU: answers all that Triton asks before it compiles."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> str:
            return device or f"sm_{capability}"

        def get_current_stream(self, device: str) -> int:
            return 0

    with (
        tempfile.TemporaryDirectory() as folder,
        patch.dict("os.environ", TRITON_CACHE_DIR=folder),
        patch.object(triton.runtime.driver, "_active", Driver()),
    ):
        yield


def compile_launches(launch: Callable[[], object], capability: int = 90) -> list[Compiled]:
    """What launch() would launch, in order, compiled for sm_`capability`. It must use meta tensors; nothing runs."""
    from triton.runtime.jit import JITFunction

    kernels, files = [], []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernels.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        files.append(self.fn.__module__.rpartition(".")[2])

    with gpu_that_need_not_be_there(capability), patch.object(JITFunction, "run", compile_only):
        launch()
    assert kernels, "nothing was launched"
    files_of = dict(zip(kernels, files, strict=True))  # each kernel once, however often it was launched
    read = {kernel: _read_resources(kernel, file, capability) for kernel, file in files_of.items()}
    return [read[kernel] for kernel in kernels]


def compile_own_launches(launch: Callable[[], object], capability: int, name: str) -> list[Compiled]:
    """compile_launches of a callable that --kernel gave in the place of a launcher of kernel `name`.

    Without those of our other kernels that launch() launches too. Raises NotJudged if the callable cannot run on
    tensors without contents, or launches no Triton kernel.
    """
    from triton.errors import TritonError

    none = f"{NOT_JUDGED}: on tensors without contents it launches no Triton kernel"
    try:
        compiled = [one for one in compile_launches(launch, capability) if one.file not in kernels().keys() - {name}]
    except TritonError:
        raise
    except AssertionError as error:
        raise NotJudged(none) from error
    except Exception as error:  # it may raise any type where it reads contents or asks for a GPU
        error = error.__cause__ if isinstance(error, NotJudged) and error.__cause__ is not None else error
        reason = f"{type(error).__name__}: {error}".splitlines()[0].split(". ")[0]
        raise NotJudged(f"{NOT_JUDGED}: it does not run on tensors without contents ({reason})") from error
    if not compiled:
        raise NotJudged(none)
    return compiled


def variants_of_launches(launch: Callable[[], object]) -> list[tuple[str, str]]:
    """(kernel, variant) of all that launch() launches, in order. It must use meta tensors; nothing is compiled.

    variant: Triton compiles a kernel once for each.
    """
    from triton import knobs

    variants = []

    def note(*, key: str, fn: Any, **_: Any) -> bool:
        variants.append((fn.name, key))
        return True  # Triton need not compile it

    with (
        gpu_that_need_not_be_there(90, "a GPU for which nothing is compiled"),
        patch.object(knobs.runtime, "jit_cache_hook", note),
    ):
        launch()
    return variants


def assert_fits(compiled: Compiled, limits: Limits) -> None:
    """Registers, shared memory and what is spilled within the given limits and those of the hardware."""
    most_shared = MAX_SHARED_BYTES[compiled.capability]
    assert compiled.stack_bytes <= limits.max_stack_bytes + tolerated_stack_bytes(), f"spills: {compiled}"
    assert compiled.registers <= limits.max_registers, compiled
    assert compiled.registers * 32 * compiled.num_warps <= MAX_REGISTERS_OF_AN_SM, f"cannot be launched: {compiled}"
    if limits.max_shared_bytes is not None:
        most_shared = min(most_shared, limits.max_shared_bytes)
    assert compiled.shared_bytes <= most_shared, compiled
    count_kernel_comparisons(compiled.file, compiled.dtype, COMPILED)


def _dtype(kernel) -> str:
    """Of what the first pointer points to, by torch's name: "bfloat16" for "*bf16"."""
    types = (re.match(r"(?:\*|tensordesc<)([a-z]+)(\d+)", kind) for kind in kernel.src.signature.values())
    kind, bits = next(match.groups() for match in types if match)
    return {"bf": "bfloat", "fp": "float", "i": "int"}[kind] + bits


def _read_resources(kernel, file: str, capability: int) -> Compiled:
    import triton

    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}
    return Compiled(
        name=kernel.metadata.name,
        file=file,
        dtype=_dtype(kernel),
        capability=capability,
        num_warps=kernel.metadata.num_warps,
        registers=usage["REG"],
        stack_bytes=usage["STACK"] + usage["LOCAL"],
        shared_bytes=kernel.metadata.shared,
        ptx=kernel.asm["ptx"],
    )
