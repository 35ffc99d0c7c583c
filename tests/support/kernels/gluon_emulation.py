"""Runs Gluon kernels for Hopper on the CPU, with plain Python and PyTorch in place of what they call.

install() imports those kernels with the stand-ins in Gluon's place. Layouts are ignored. The parts of a
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import prod
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from tests.support.source_tree import module_name, python_files

GLUON = "triton.experimental.gluon"


def ordered(count: int) -> Sequence[int]:
    """In which order programs, and the parts of one, run; tests.support.kernels.interpreting replaces it."""
    return range(count)


# --- values ---


class Tensor(torch.Tensor):
    """A tensor in registers, or a view of shared memory, which starts as NaN."""

    type = SimpleNamespace(layout=None)  # type: ignore[assignment]

    def index(self, place: Any) -> "Tensor":
        assert 0 <= int(place) < len(self), f"place {int(place)} of {len(self)} in shared memory"
        return self[int(place)]  # type: ignore[return-value]

    def slice(self, start: int, length: int) -> "Tensor":
        assert 0 <= start <= start + length <= len(self)
        return self[start : start + length]  # type: ignore[return-value]

    def load(self, layout: object = None) -> torch.Tensor:
        return self.clone()

    def store(self, value: Any) -> None:
        self.copy_(value)


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


# --- barriers, copies and products ---


class Barrier:
    """mbarrier: its phase flips when `count` arrivals and all expected bytes have come. Or several, by their index."""

    def __init__(self, number: int = 0) -> None:
        self.stages = [Barrier() for _ in range(number)]
        self.count = self.pending = self.num_bytes = self.phase = 0

    def index(self, place: Any) -> "Barrier":
        return self.stages[int(place)]

    def init(self, count: int) -> None:
        self.count = self.pending = count

    def expect(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        self.arrive()

    def arrive(self, count: int = 1, num_bytes: int = 0) -> None:
        self.pending -= count
        self.num_bytes -= num_bytes
        assert self.pending >= 0, "more arrivals at a barrier than it counts"
        if self.pending == 0 and self.num_bytes == 0:
            self.pending, self.phase = self.count, self.phase ^ 1

    def wait(self, phase: Any) -> None:
        current.part.wait_for(self, int(phase))


class TensorDescriptor:
    """A matrix in global memory, from which boxes are copied."""

    def __init__(self, base: torch.Tensor, shape: list[int], strides: list[int], box: list[int], layout: object):
        self.matrix = base.as_strided(shape, strides)
        self.box, self.dtype, self.layout = box, base.dtype, layout


def async_copy(desc: TensorDescriptor, start: list[Any], barrier: Barrier, target: Tensor) -> None:
    """A box of the matrix from row start[0] and column start[1] on; zeros where the matrix has ended."""
    assert list(target.shape) == desc.box, f"a box of {desc.box} is copied to {list(target.shape)}"
    rows, columns = (int(first) + torch.arange(size) for first, size in zip(start, desc.box, strict=True))
    height, width = desc.matrix.shape
    is_inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))[None, :]
    box = desc.matrix[rows.clamp(0, height - 1)[:, None], columns.clamp(0, width - 1)[None, :]].where(is_inside, 0)
    target.fill_(torch.nan)
    program.copies.append((barrier, target, box))


class Product:
    """What warpgroup_mma gives: no tensor until it was waited for."""

    def __init__(self, left: Tensor, right: Tensor, acc: Any, use_acc: bool = True, is_async: bool = False) -> None:
        assert is_async
        self.left, self.right, self.result = left, right, None
        self.sum_before = acc if use_acc else torch.zeros_like(acc)
        current.part.products.append(self)

    def compute(self) -> None:
        self.result = self.sum_before + self.left.float() @ self.right.float()


def warpgroup_mma_wait(num_outstanding: int, deps: list[Any]) -> Any:
    current.part.wait_for(None)
    products = current.part.products
    while len(products) > num_outstanding:
        products.pop(0).compute()
    values = [value.result if isinstance(value, Product) else value for value in deps]
    return values[0] if len(values) == 1 else values


# --- programs ---


class Part:
    """One part of a warp-specialised program: a thread, which runs while it has the turn."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.products: list[Product] = []  # not waited for, oldest first
        self.turn, self.yielded = threading.Semaphore(0), threading.Semaphore(0)
        self.barrier: Barrier | None = None  # that it waits for, in this phase
        self.phase = 0
        self.has_ended = self.is_cancelled = False
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, args=(function, args), daemon=True)
        self.thread.start()

    def step(self) -> None:
        """Run this part until it waits or ends. Raises what it raises."""
        self.turn.release()
        self.yielded.acquire()
        if self.error is not None:
            raise self.error

    def can_go_on(self) -> bool:
        return self.barrier is None or self.barrier.phase != self.phase

    def wait_for(self, barrier: Barrier | None, phase: int = 0) -> None:
        """Let other parts run until the barrier's phase is complete; without a barrier, until each had its turn."""
        self.barrier, self.phase = barrier, phase
        if barrier is not None and self.can_go_on():
            return
        self.yielded.release()
        self.turn.acquire()
        if self.is_cancelled:
            raise SystemExit

    def cancel(self) -> None:
        self.is_cancelled = True
        self.turn.release()
        self.thread.join()

    def _run(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        current.part = self
        self.turn.acquire()
        try:
            if not self.is_cancelled:
                function(*args)
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
        self.copies: list[tuple[Barrier, Tensor, torch.Tensor]] = []  # started, and not landed

    def specialize(self, functions: list[tuple[Callable[..., Any], tuple[Any, ...]]], *_: Any) -> None:
        parts = [Part(*functions[index]) for index in ordered(len(functions))]
        try:
            while waiting := [part for part in parts if not part.has_ended]:
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
        """Complete one copy for which a part waits, and no other: copies land in any order."""
        copy = next((copy for copy in self.copies if id(copy[0]) in barriers), None)
        assert copy is not None, "all parts wait at barriers for which no copy is under way"
        self.copies = [other for other in self.copies if other is not copy]
        barrier, target, box = copy
        target.copy_(box)
        barrier.arrive(0, box.nbytes)


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


# --- modules ---


def _allocate(dtype: torch.dtype, shape: list[int], layout: object) -> Any:
    return Barrier(shape[0]) if layout is Barrier else tensor(torch.full(shape, torch.nan, dtype=dtype))


def _language() -> dict[str, Any]:
    """triton.experimental.gluon.language, as far as kernels here use it."""
    dtypes = ("float32", "float16", "bfloat16", "int32", "int64")
    layouts = ("NVMMADistributedLayout", "DotOperandLayout", "SliceLayout", "BlockedLayout")
    return {
        **{name: getattr(torch, name) for name in dtypes},
        **dict.fromkeys(layouts, lambda *args: None),
        "NVMMASharedLayout": SimpleNamespace(get_default_for=lambda *args: None),
        "constexpr": constexpr,
        "static_range": range,
        "load": load,
        "store": store,
        "program_id": lambda axis: tensor(program.place[axis], torch.int32),
        "num_programs": lambda axis: program.grid[axis],
        "arange": lambda start, end, layout: tensor(torch.arange(start, end, dtype=torch.int32)),
        "zeros": lambda shape, dtype, layout: tensor(torch.zeros(shape, dtype=dtype)),
        "full": lambda shape, value, dtype, layout: tensor(torch.full(shape, value, dtype=dtype)),
        "zeros_like": torch.zeros_like,
        "exp2": torch.exp2,
        "where": lambda condition, x, y: torch.where(condition, x, torch.as_tensor(y, dtype=x.dtype)),
        "minimum": lambda x, y: torch.minimum(tensor(x), tensor(y)),
        "maximum": lambda x, y: torch.maximum(tensor(x), tensor(y)),
        "max": torch.amax,
        "sum": torch.sum,
        "convert_layout": lambda value, layout: value,
        "allocate_shared_memory": _allocate,
        "warp_specialize": lambda *args: program.specialize(*args),
    }


def _stand_ins() -> dict[str, ModuleType]:
    """Module name -> what stands for it."""
    mbarrier = SimpleNamespace(**vars(Barrier), MBarrierLayout=lambda: Barrier)  # mbarrier.wait is Barrier.wait
    contents: dict[str, dict[str, Any]] = {
        GLUON: {"jit": lambda fn=None, **_: EmulatedFunction if fn is None else EmulatedFunction(fn)},
        f"{GLUON}.language": _language(),
        f"{GLUON}.language.nvidia.hopper": {
            "fence_async_shared": lambda: None,
            "mbarrier": mbarrier,
            "tma": SimpleNamespace(async_copy_global_to_shared=async_copy),
            "warpgroup_mma": Product,
            "warpgroup_mma_wait": warpgroup_mma_wait,
        },
        f"{GLUON}.nvidia.hopper": {"TensorDescriptor": TensorDescriptor},
    }
    modules = {name: ModuleType(name) for name in contents}
    for name, module in modules.items():
        vars(module).update(contents[name])
    modules[GLUON].language = modules[f"{GLUON}.language"]  # type: ignore[attr-defined]
    return modules


@contextmanager
def emulated() -> Iterator[None]:
    """Within it, a file that imports Gluon gets the stand-ins."""
    import triton.experimental.gluon
    import triton.experimental.gluon.nvidia.hopper

    stand_ins = _stand_ins()
    replaced = {name: sys.modules[name] for name in stand_ins}
    sys.modules.update(stand_ins)
    with patch.object(triton.experimental, "gluon", stand_ins[GLUON]):
        yield
    sys.modules.update(replaced)


def install() -> None:
    """Import the kernels that are written in Gluon with the stand-ins, for this process."""
    for path in python_files("nanovllm/kernels"):
        if "import gluon" in path.read_text(encoding="utf-8"):
            with emulated():
                importlib.import_module(module_name(path))
