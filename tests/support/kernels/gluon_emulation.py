"""Runs kernels that are written in Gluon for Hopper on the CPU: what such a kernel calls, in plain Python and PyTorch.

install() imports those kernels with the stand-ins in Gluon's place. Layouts mean nothing here. The parts of a
warp-specialised program are threads of which one runs at a time, until it waits at a barrier. Everything asynchronous
happens as late as the barriers and waits allow, so that using it earlier is noticed:

- a copy (TMA) fills its destination with NaN when it starts. It lands only when every part waits, and
  one of them for it.
- a matrix product reads its operands when it is waited for. Its result is no tensor until then.
- a load or store outside of a tensor's storage raises, and so do parts that all wait with nothing under way.

It is one file, since each stand-in is understood only with the others.
"""

import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from math import prod
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from tests.support.source_tree import module_name, python_files


def ordered(count: int) -> list[int]:
    """In which order programs, and the parts of one, run; tests.support.kernels.interpreting replaces it."""
    return list(range(count))


# --- values ---


class Tensor(torch.Tensor):
    type = SimpleNamespace(layout=None)  # type: ignore[assignment]


class constexpr(int):
    @property
    def value(self) -> int:
        return int(self)


def tensor(value: Any, dtype: torch.dtype | None = None) -> Any:
    return torch.as_tensor(value, dtype=dtype).as_subclass(Tensor)


class Pointer:
    """Elements of one storage: its flat view, and their offsets in it, a number or a tensor."""

    def __init__(self, storage: torch.Tensor, offset: Any) -> None:
        self.storage, self.offset = storage, offset

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.storage, self.offset + offset)

    def valid(self, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
        offset, mask = torch.broadcast_tensors(torch.as_tensor(self.offset), torch.as_tensor(mask))
        outside = mask & ((offset < 0) | (offset >= len(self.storage)))
        assert not outside.any(), f"element {offset[outside][0]} of a storage of {len(self.storage)} is accessed"
        return offset, mask


def pointer(argument: Any) -> Any:
    """A tensor as a kernel gets it: the address of its first element."""
    if not isinstance(argument, torch.Tensor):
        return argument
    size = argument.untyped_storage().nbytes() // argument.element_size()
    return Pointer(argument.as_strided((size,), (1,), 0), argument.storage_offset())


def load(pointer: Pointer, mask: Any = True, other: Any = 0) -> Any:
    offset, mask = pointer.valid(mask)
    value = pointer.storage[offset.where(mask, 0).long()]
    return tensor(value.where(mask, torch.tensor(other, dtype=value.dtype)))


def store(pointer: Pointer, value: Any, mask: Any = True) -> None:
    offset, mask = pointer.valid(mask)
    pointer.storage[offset[mask].long()] = value.expand(offset.shape)[mask].as_subclass(torch.Tensor)


class SharedMemory:
    """A view of shared memory, which starts as NaN."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data, self.shape, self.dtype, self.layout = data, data.shape, data.dtype, None

    def index(self, place: Any) -> "SharedMemory":
        assert 0 <= int(place) < len(self.data), f"place {int(place)} of {len(self.data)} in shared memory"
        return SharedMemory(self.data[int(place)])

    def slice(self, start: int, length: int) -> "SharedMemory":
        assert 0 <= start <= start + length <= len(self.data)
        return SharedMemory(self.data[start : start + length])

    def permute(self, order: tuple[int, ...]) -> "SharedMemory":
        return SharedMemory(self.data.permute(order))

    def load(self, layout: object = None) -> Any:
        return tensor(self.data.clone())

    def store(self, value: Any) -> None:
        self.data.copy_(value)


# --- barriers, copies and products ---


class Barrier:
    """mbarrier: its phase flips when `count` arrivals and all expected bytes have come."""

    def __init__(self) -> None:
        self.count = self.pending = self.num_bytes = self.phase = 0

    def arrive(self, count: int = 1) -> None:
        self.pending -= count
        self._flip_if_complete()

    def land(self, num_bytes: int) -> None:
        self.num_bytes -= num_bytes
        self._flip_if_complete()

    def _flip_if_complete(self) -> None:
        assert self.pending >= 0, "more arrivals at a barrier than it counts"
        if self.pending == 0 and self.num_bytes == 0:
            self.pending, self.phase = self.count, self.phase ^ 1


class Barriers:
    def __init__(self, number: int) -> None:
        self.barriers = [Barrier() for _ in range(number)]

    def index(self, place: Any) -> "Barriers":
        view = Barriers(0)
        view.barriers = [self.barriers[int(place)]]
        return view


def init(barriers: Barriers, count: int) -> None:
    for barrier in barriers.barriers:
        barrier.count = barrier.pending = count


def expect(barriers: Barriers, num_bytes: int) -> None:
    barriers.barriers[0].num_bytes += num_bytes
    barriers.barriers[0].arrive()


def arrive(barriers: Barriers, count: int = 1) -> None:
    barriers.barriers[0].arrive(count)


def wait(barriers: Barriers, phase: Any) -> None:
    current.part.wait_for(barriers.barriers[0], int(phase))


class TensorDescriptor:
    """A matrix in global memory, from which boxes are copied."""

    def __init__(self, base: torch.Tensor, shape: list[int], strides: list[int], box: list[int], layout: object):
        self.matrix = base.as_strided(shape, strides)
        self.box, self.dtype, self.layout = box, base.dtype, layout


def async_copy(desc: TensorDescriptor, start: list[Any], barriers: Barriers, target: SharedMemory) -> None:
    """A box of the matrix from row start[0] and column start[1] on; zeros where the matrix has ended."""
    assert list(target.shape) == desc.box, f"a box of {desc.box} is copied to {list(target.shape)}"
    rows, columns = (int(first) + torch.arange(size) for first, size in zip(start, desc.box, strict=True))
    height, width = desc.matrix.shape
    is_inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))[None, :]
    box = desc.matrix[rows.clamp(0, height - 1)[:, None], columns.clamp(0, width - 1)[None, :]].where(is_inside, 0)
    target.data.fill_(torch.nan)
    barrier = barriers.barriers[0]

    def land() -> None:
        target.data.copy_(box)
        barrier.land(box.nbytes)

    program.copies.append((barrier, land))


class Product:
    """What warpgroup_mma gives: no tensor until it was waited for."""

    def __init__(self, left: Any, right: SharedMemory, sum_before: Any) -> None:
        self.left, self.right, self.sum_before, self.result = left, right, sum_before, None

    def compute(self) -> None:
        left = self.left.data if isinstance(self.left, SharedMemory) else self.left
        self.result = tensor(self.sum_before + left.float() @ self.right.data.float())


def warpgroup_mma(left: Any, right: SharedMemory, acc: Any, use_acc: bool = True, is_async: bool = False) -> Product:
    product = Product(left, right, acc if use_acc else torch.zeros_like(acc))
    current.part.products.append(product)
    assert is_async
    return product


def warpgroup_mma_wait(num_outstanding: int, deps: list[Any]) -> Any:
    current.part.let_others_run()
    products = current.part.products
    while len(products) > num_outstanding:
        products.pop(0).compute()
    values = [value.result if isinstance(value, Product) else value for value in deps]
    return values[0] if len(values) == 1 else values


# --- programs ---


class Part:
    """One part of a warp-specialised program: a thread, which runs while it has the turn."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.function, self.args = function, args
        self.products: list[Product] = []  # not waited for, oldest first
        self.turn, self.yielded = threading.Semaphore(0), threading.Semaphore(0)
        self.barrier: Barrier | None = None  # that it waits for, in this phase
        self.phase = 0
        self.has_ended = self.is_cancelled = False
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def step(self) -> None:
        """Let it run until it waits or ends. Raises what it raises."""
        self.turn.release()
        self.yielded.acquire()
        if self.error is not None:
            raise self.error

    def wait_for(self, barrier: Barrier, phase: int) -> None:
        self.barrier, self.phase = barrier, phase
        while not self.can_go_on():
            self._yield()

    def let_others_run(self) -> None:
        self.barrier = None
        self._yield()

    def can_go_on(self) -> bool:
        return self.barrier is None or self.barrier.phase != self.phase

    def cancel(self) -> None:
        self.is_cancelled = True
        self.turn.release()
        self.thread.join()

    def _yield(self) -> None:
        self.yielded.release()
        self.turn.acquire()
        if self.is_cancelled:
            raise SystemExit

    def _run(self) -> None:
        current.part = self
        self.turn.acquire()
        try:
            if not self.is_cancelled:
                self.function(*self.args)
        except SystemExit:
            pass
        except BaseException as error:
            self.error = error
        self.has_ended = True
        self.yielded.release()


class Program:
    """One program of a grid."""

    def __init__(self, place: tuple[int, ...], grid: tuple[int, ...]) -> None:
        self.place, self.grid = place, grid
        self.copies: list[tuple[Barrier, Callable[[], None]]] = []  # started, and not landed

    def specialize(self, functions: list[tuple[Callable[..., Any], tuple[Any, ...]]], *_: Any) -> None:
        parts = [Part(*functions[index]) for index in ordered(len(functions))]
        try:
            while not all(part.has_ended for part in parts):
                waiting = [part for part in parts if not part.has_ended]
                ready = [part for part in waiting if part.can_go_on()]
                if ready:
                    parts.append(parts.pop(parts.index(ready[0])))  # they take turns
                    ready[0].step()
                else:
                    self._land_copy({id(part.barrier) for part in waiting})
        finally:
            for part in parts:
                part.cancel()
        assert not self.copies, "a program ended before its copies had landed"

    def _land_copy(self, barriers: set[int]) -> None:
        """One that a part waits for, and no other: copies land in any order."""
        places = [place for place, (barrier, _) in enumerate(self.copies) if id(barrier) in barriers]
        assert places, "all parts wait at barriers for which no copy is under way"
        _, land = self.copies.pop(places[0])
        land()


program: Program  # the one that runs
current = threading.local()  # .part: the part whose thread asks


class EmulatedFunction:
    """What gluon.jit gives: function[grid](...) launches, function(...) is a call within a kernel."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn(*args, **kwargs)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, num_warps: int, maxnreg: int, **constants: int) -> None:
        global program
        args = tuple(map(pointer, args))
        for place in ordered(prod(grid)):
            x, rest = place % grid[0], place // grid[0]
            program = Program((x, rest % grid[1], rest // grid[1]), grid)
            self(*args, **constants)


def jit(fn: Any = None, **_: Any) -> Any:
    return EmulatedFunction if fn is None else EmulatedFunction(fn)


def _language() -> ModuleType:
    """triton.experimental.gluon.language, as far as kernels here use it."""
    gl: Any = ModuleType("gluon.language")
    for name in ("float32", "float16", "bfloat16", "int32", "int64"):
        setattr(gl, name, getattr(torch, name))
    for name in ("NVMMADistributedLayout", "DotOperandLayout", "SliceLayout", "BlockedLayout"):
        setattr(gl, name, lambda *args: None)
    gl.NVMMASharedLayout = SimpleNamespace(get_default_for=lambda *args: None)
    gl.constexpr, gl.static_range, gl.load, gl.store = constexpr, range, load, store
    gl.program_id = lambda axis: tensor(program.place[axis], torch.int32)
    gl.num_programs = lambda axis: program.grid[axis]
    gl.arange = lambda start, end, layout: tensor(torch.arange(start, end, dtype=torch.int32))
    gl.zeros = lambda shape, dtype, layout: tensor(torch.zeros(shape, dtype=dtype))
    gl.full = lambda shape, value, dtype, layout: tensor(torch.full(shape, value, dtype=dtype))
    gl.zeros_like, gl.exp2 = torch.zeros_like, torch.exp2
    gl.where = lambda condition, left, right: torch.where(condition, left, torch.as_tensor(right, dtype=left.dtype))
    gl.minimum = lambda left, right: torch.minimum(tensor(left), tensor(right))
    gl.maximum = lambda left, right: torch.maximum(tensor(left), tensor(right))
    gl.max = lambda value, axis: value.amax(axis)
    gl.sum = lambda value, axis: value.sum(axis)
    gl.convert_layout = lambda value, layout: value
    gl.allocate_shared_memory = _allocate
    gl.warp_specialize = lambda *args: program.specialize(*args)
    return gl


def _allocate(dtype: torch.dtype, shape: list[int], layout: object) -> Any:
    if layout == "barrier":
        return Barriers(shape[0])
    return SharedMemory(torch.full(shape, torch.nan, dtype=dtype))


def stand_ins() -> dict[str, ModuleType]:
    """Module name -> what stands for it."""
    gluon: Any = ModuleType("gluon")
    gluon.jit, gluon.language = jit, _language()
    nvidia: Any = ModuleType("gluon.language.nvidia.hopper")
    nvidia.fence_async_shared = lambda: None
    nvidia.mbarrier = SimpleNamespace(
        MBarrierLayout=lambda: "barrier", init=init, expect=expect, arrive=arrive, wait=wait
    )
    nvidia.tma = SimpleNamespace(async_copy_global_to_shared=async_copy)
    nvidia.warpgroup_mma, nvidia.warpgroup_mma_wait = warpgroup_mma, warpgroup_mma_wait
    host: Any = ModuleType("gluon.nvidia.hopper")
    host.TensorDescriptor = TensorDescriptor
    name = "triton.experimental.gluon"
    return {
        name: gluon,
        f"{name}.language": gluon.language,
        f"{name}.language.nvidia.hopper": nvidia,
        f"{name}.nvidia.hopper": host,
    }


@contextmanager
def emulated() -> Iterator[None]:
    """Within it, a file that imports Gluon gets the stand-ins."""
    import triton.experimental.gluon
    import triton.experimental.gluon.nvidia.hopper

    replaced = {name: sys.modules.get(name) for name in stand_ins()}
    sys.modules.update(stand_ins())
    with patch.object(triton.experimental, "gluon", sys.modules["triton.experimental.gluon"]):
        yield
    for name, module in replaced.items():
        del sys.modules[name]
        if module is not None:
            sys.modules[name] = module


def install() -> None:
    """Import the kernels that are written in Gluon with the stand-ins, for this process."""
    for path in python_files("nanovllm/kernels"):
        if "import gluon" in path.read_text(encoding="utf-8"):
            with emulated():
                importlib.import_module(module_name(path))
