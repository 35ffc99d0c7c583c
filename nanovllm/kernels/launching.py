"""launch: runs a Triton kernel; within compile_ahead it compiles the kernel in another thread instead.

cdiv, next_power_of_2: for launchers, which call them hundreds of times a step. Triton's take 5 us a call.
"""

import functools
import gc
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from itertools import groupby
from typing import Any

import torch
import triton
from triton.runtime import cache

MAX_THREADS = 8  # 16 were no faster on 16 processors, since Python runs in one thread at a time

_compiled: ContextVar[list[Any] | None] = ContextVar("compiled", default=None)


def cdiv(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is at least `number`, which is at least 1."""
    return 1 << (number - 1).bit_length()


def launch(kernel: Any, grid: tuple[Any, ...], *arguments: Any, **options: Any) -> None:
    """kernel[grid](*arguments, **options), or its compilation."""
    compiled = _compiled.get()
    if compiled is None:
        kernel[grid](*arguments, **options)
    else:
        compiled.append(kernel.warmup(*arguments, grid=grid, **options))


@functools.cache
def hash_compiler() -> None:
    """Begin to hash Triton's own files in a thread: what compiles first waits for this key of its cache.

    It takes 0.4 s, mostly outside of Python, and can pass while weights are loaded.
    """
    if hasattr(cache, "triton_key"):  # which remembers its result; not in every version
        threading.Thread(target=cache.triton_key, name="hash-compiler", daemon=True).start()


def compile_ahead(run: Callable[[], None]) -> None:
    """Call run(), and compile what it would launch, several kernels at a time.

    Nothing is launched, so outputs hold anything. Waits for the compiler, and raises its errors. Does not call run() if
    this version of Triton compiles in one thread only.
    """
    if hasattr(triton, "AsyncCompileMode"):
        copy_context().run(_compile_in_threads, run)  # an error leaves AsyncCompileMode's own ContextVar set


def _compile_in_threads(run: Callable[[], None]) -> None:
    compiled: list[Any] = []
    _compiled.set(compiled)
    with (
        _no_garbage_collection(),
        ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as threads,
        triton.AsyncCompileMode(threads),
    ):
        run()
    kernels = {kernel.result() if hasattr(kernel, "result") else kernel for kernel in compiled}
    device = torch.cuda.current_device()  # a new thread begins with GPU 0
    with ThreadPoolExecutor(os.cpu_count(), initializer=torch.cuda.set_device, initargs=(device,)) as threads:
        by_name = sorted(kernels, key=_name)  # one thread for each name, because kernels of one name share C functions
        for _ in threads.map(_load, [list(group) for _, group in groupby(by_name, _name)]):
            pass


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """In Python 3.11, ast.parse fails ("recursion depth mismatch") if a collection lets another thread parse too."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _name(kernel: Any) -> str:
    return kernel.metadata.name


def _load(kernels: list[Any]) -> None:
    """Load compiled kernels, and compile the C functions that launch them: 0.3 s for each signature in Triton 3.6."""
    for kernel in kernels:
        kernel.run  # noqa: B018 (a property)
