"""launch and compile_ahead: what is launched, what is compiled, and what an error of the compiler becomes."""

import gc
import queue
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.kernels.compiling import gpu_that_need_not_be_there

triton = pytest.importorskip("triton")
from nanovllm.kernels import launching  # noqa: E402
from nanovllm.kernels.launching import cdiv, compile_ahead, hash_compiler, launch, next_power_of_2  # noqa: E402
from nanovllm.kernels.silu_and_mul import silu_and_mul, silu_and_mul_kernel  # noqa: E402

needs_async_compile = pytest.mark.skipif(
    not hasattr(triton, "AsyncCompileMode"), reason="this version of Triton has no AsyncCompileMode"
)


@pytest.fixture(autouse=True)
def gpu_of_each_thread(monkeypatch: pytest.MonkeyPatch) -> threading.local:
    """Stands for torch's current GPU, which is 0 in a new thread. This thread's is GPU 1."""
    current = threading.local()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current.gpu)
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: setattr(current, "gpu", gpu))
    current.gpu = 1
    return current


def test_integers_are_those_of_triton() -> None:
    assert [next_power_of_2(n) for n in range(1, 300)] == [triton.next_power_of_2(n) for n in range(1, 300)]
    pairs = [(dividend, divisor) for dividend in range(70) for divisor in (1, 3, 64)]
    assert [cdiv(*pair) for pair in pairs] == [triton.cdiv(*pair) for pair in pairs]


def test_the_compiler_is_hashed_once_in_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: queue.Queue[threading.Thread] = queue.Queue()
    monkeypatch.setattr(launching.cache, "triton_key", lambda: threads.put(threading.current_thread()))
    hash_compiler.cache_clear()
    hash_compiler()
    hash_compiler()
    first = threads.get(timeout=10)
    assert first is not threading.current_thread()
    first.join()
    assert threads.empty()


class Recorder:
    """A kernel that notes what it is asked for; it stands for its compiled kernel too."""

    metadata = SimpleNamespace(name="recorder")

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    @property
    def run(self) -> None:
        self.calls.append(("load on GPU", torch.cuda.current_device()))

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **options: self.calls.append(("launch", grid, args, options))

    def warmup(self, *args: Any, grid: tuple[int, ...], **options: Any) -> "Recorder":
        self.calls.append(("compile", grid, args, options))
        return self


@needs_async_compile
def test_a_kernel_is_launched_except_within_compile_ahead() -> None:
    kernel = Recorder()
    launch(kernel, (2, 3), 5, ROWS=7)
    compile_ahead(lambda: [launch(kernel, (2, 3), 5, ROWS=7) for _ in range(2)])
    launch(kernel, (1,))
    what = ((2, 3), (5,), {"ROWS": 7})
    compiled = [("compile", *what)] * 2
    assert kernel.calls == [("launch", *what), *compiled, ("load on GPU", 1), ("launch", (1,), (), {})]


def test_a_triton_without_asynccompilemode_compiles_nothing_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(triton, "AsyncCompileMode", raising=False)
    compile_ahead(lambda: pytest.fail("would be launched"))


@needs_async_compile
def test_the_launchers_compile_and_load_each_variant_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second launch with other sizes of the same divisibility is the same variant."""
    loaded: list[Any] = []
    monkeypatch.setattr(launching, "_load", loaded.extend)

    def run() -> None:
        for num_tokens, dtype in ((32, torch.float16), (64, torch.float16), (32, torch.bfloat16)):
            silu_and_mul(torch.empty(num_tokens, 512, dtype=dtype, device="meta"))

    with gpu_that_need_not_be_there(90):
        variants = silu_and_mul_kernel.device_caches["sm_90"][0]
        variants.clear()
        compile_ahead(run)
        assert len(variants) == 2
        assert all("cubin" in kernel.asm for kernel in variants.values())
        assert sorted(loaded, key=id) == sorted(variants.values(), key=id)
        variants.clear()


@needs_async_compile
@pytest.mark.parametrize("is_enabled", [True, False])
def test_no_garbage_is_collected_while_threads_parse(is_enabled: bool) -> None:
    """In Python 3.11 ast.parse raised SystemError at times. The caller's setting comes back, also after an error."""
    seen = []

    def run() -> None:
        seen.append(gc.isenabled())
        raise KeyError("planted")

    (gc.enable if is_enabled else gc.disable)()
    try:
        with pytest.raises(KeyError, match="planted"):
            compile_ahead(run)
        assert (seen, gc.isenabled()) == ([False], is_enabled)
    finally:
        gc.enable()


@needs_async_compile
def test_an_error_of_the_compiler_is_raised_at_the_end() -> None:
    @triton.jit
    def broken_kernel(x_ptr):
        there_is_no_such_name(x_ptr)  # noqa: F821

    def run() -> None:
        launch(broken_kernel, (1,), torch.empty(4, device="meta"))

    with gpu_that_need_not_be_there(90), pytest.raises(triton.CompilationError, match="there_is_no_such_name"):
        compile_ahead(run)
    kernel = Recorder()
    compile_ahead(lambda: launch(kernel, (1,)))
    launch(kernel, (1,))
    assert [call[0] for call in kernel.calls] == ["compile", "load on GPU", "launch"], (
        "nothing is left of the failed one"
    )
