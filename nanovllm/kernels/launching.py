"""launch: runs a Triton kernel; within compile_ahead it compiles the kernel in another thread instead."""

# pyright: reportAttributeAccessIssue=false
# (Triton's AsyncCompileMode is young.)

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from typing import Any

import triton

_compiles_only: ContextVar[bool] = ContextVar("compiles_only", default=False)


def launch(kernel: Any, grid: tuple[Any, ...], *arguments: Any, **options: Any) -> None:
    """kernel[grid](*arguments, **options), or its compilation."""
    if _compiles_only.get():
        kernel.warmup(*arguments, grid=grid, **options)
    else:
        kernel[grid](*arguments, **options)


def compile_ahead(run: Callable[[], None]) -> None:
    """Call run(), and compile what it would launch, as many kernels at a time as there are processors.

    Nothing is launched, so outputs hold anything. Waits for the compiler, and raises its errors. Does not call run() if
    this version of Triton compiles in one thread only.
    """
    if hasattr(triton, "AsyncCompileMode"):
        copy_context().run(_compile_in_threads, run)  # an error leaves AsyncCompileMode's own ContextVar set


def _compile_in_threads(run: Callable[[], None]) -> None:
    _compiles_only.set(True)
    with ThreadPoolExecutor(os.cpu_count()) as threads, triton.AsyncCompileMode(threads):
        run()
