"""Cases of all_reduce against reference.tensor_parallel.all_reduce, on one device.

What the other ranks send is put into this rank's buffer before, and what it sends is looked up in theirs. Ranks that
run against each other are in tests/kernels/test_all_reduce.py.
"""

import torch
from hypothesis import strategies as st

from benchmarks.arithmetic import Work
from benchmarks.kernels.inputs import randn
from benchmarks.measuring import Measured
from benchmarks.shapes import Shape
from nanovllm.distributed.peer_memory import EMPTY, MAX_PROGRAMS, SLOT_BYTES, PeerBuffers, buffer_bytes
from reference.tensor_parallel import all_reduce as reference_all_reduce
from tests.support.kernels.accuracy import assert_same_bits, assert_within_the_error_of_plain_torch
from tests.support.kernels.guards import Guards
from tests.support.kernels.registry import DTYPES, Compilation, Kernel, Limits, Refused, Steps, case, each, lazy, meta

all_reduce = lazy("all_reduce.all_reduce")
AXES = ("token", "element")


def empty_buffers(num_ranks: int, device: str) -> list[torch.Tensor]:
    """A buffer of each rank, [2, num_ranks, MAX_PROGRAMS, SLOT_BYTES / 2] int16, as PeerMemory makes it."""
    shape = (2, num_ranks, MAX_PROGRAMS, SLOT_BYTES // 2)
    assert torch.Size(shape).numel() * 2 == buffer_bytes(num_ranks)
    return [torch.full(shape, EMPTY - 2**16, dtype=torch.int16, device=device) for _ in range(num_ranks)]


def peer_buffers(rank: int, buffers: list[torch.Tensor], is_aborted: int = 0) -> PeerBuffers:
    device = buffers[0].device
    return PeerBuffers(
        rank,
        torch.tensor([buffer.data_ptr() for buffer in buffers], dtype=torch.int64, device=device),
        torch.zeros(MAX_PROGRAMS, dtype=torch.int32, device=device),
        torch.full((1,), is_aborted, dtype=torch.int32, pin_memory=device.type == "cuda"),
    )


def empty_value(dtype: torch.dtype, device: str) -> torch.Tensor:
    """[1]: the value that means EMPTY."""
    return torch.full((dtype.itemsize // 2,), EMPTY - 2**16, dtype=torch.int16, device=device).view(dtype)


def put(x: torch.Tensor, slots: torch.Tensor) -> None:
    """Into one rank's slots [MAX_PROGRAMS, SLOT_BYTES / 2] int16 of one half: a part of x for each program."""
    integer = {2: torch.int16, 4: torch.int32}[x.element_size()]
    bits = x.flatten().view(integer)
    bits = torch.where(bits == empty_value(x.dtype, x.device.type).view(integer), 0, bits)
    for program, part in enumerate(bits.view(torch.int16).split(SLOT_BYTES // 2)):
        slots[program, : len(part)] = part


@case
def check_ranks(
    device: str,
    num_ranks: int,
    rank: int,
    shape: tuple[int, int],
    dtype: torch.dtype = torch.bfloat16,
    num_launches: int = 3,
) -> None:
    """The sum, and what this rank has sent; its own buffer is empty again."""
    guards = Guards(device)
    buffers = empty_buffers(num_ranks, device)
    peers = peer_buffers(rank, buffers)
    others = [other for other in range(num_ranks) if other != rank]
    num_programs = -(-shape[0] * shape[1] * dtype.itemsize // SLOT_BYTES)
    touched = (slice(None), slice(None), slice(num_programs + 1))  # and one more
    for launch in range(num_launches):
        xs = [guards.randn(*shape, dtype=dtype) for _ in range(num_ranks)]
        xs[rank] = guards.read(torch.where(xs[rank] > 1, empty_value(dtype, device), xs[rank]))
        for other in others:
            put(xs[other], buffers[rank][launch % 2, other])
        with guards:
            total = all_reduce(xs[rank], peers)
        exact = reference_all_reduce([x.double() for x in xs])
        assert_within_the_error_of_plain_torch("all_reduce", total, reference_all_reduce(xs), exact, AXES)
        for number, buffer in enumerate(buffers):
            wanted = torch.full_like(buffer[touched], EMPTY - 2**16)
            if number != rank:
                put(xs[rank], wanted[launch % 2, rank])
            assert_same_bits(
                "all_reduce", buffer[touched], wanted, (f"rank {number}'s half", "source", "program", "place")
            )
            buffer[touched] = EMPTY - 2**16
    assert peers.counts.tolist() == [num_launches] * num_programs + [0] * (MAX_PROGRAMS - num_programs)


def check_abort(device: str) -> None:
    """Without the other rank's part the kernel ends, since the group is aborted."""
    x, buffers = torch.ones(2, 24, device=device), empty_buffers(2, device)
    all_reduce(x, peer_buffers(0, buffers, is_aborted=1), polls_before_check=4)
    if device == "cuda":
        torch.cuda.synchronize()


def launch(num_tokens: int, size: int = 1024, dtype: torch.dtype = torch.bfloat16, num_ranks: int = 2) -> None:
    integers = [meta(number, dtype=kind) for number, kind in ((num_ranks, torch.int64), (MAX_PROGRAMS, torch.int32))]
    all_reduce(meta(num_tokens, size, dtype=dtype), PeerBuffers(0, *integers, meta(1, dtype=torch.int32)))


def measured(shape: Shape, num_tokens: int) -> Measured:
    """Rank 0 of two, on one GPU: rank 1's part is copied into the buffer before, and the copy is measured too."""
    buffers = empty_buffers(2, "cuda")
    peers = peer_buffers(0, buffers)
    size = (num_tokens, shape.hidden_size)
    num_elements = num_tokens * shape.hidden_size

    def run(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        slots = buffers[0][:, 1].view(2, -1)[:, :num_elements]  # here, to keep rank 1's buffer too, which x is sent to
        slots.copy_(other.view(torch.int16).view(-1))
        return all_reduce(x, peers)

    return Measured(
        make=lambda index: (randn(index, *size), randn(index + 1, *size)),
        run=run,
        expected=lambda x, other: x.double() + other.double(),
        work=Work(2 * num_elements * 2, num_elements * 2),
        peers={"torch": torch.add},
    )


SHAPES = st.tuples(st.integers(1, 64), st.integers(1, 1024))

KERNEL = Kernel(
    name="all_reduce",
    launched={"all_reduce_kernel": Limits(max_registers=53)},  # 2048 programs of 64 threads at once on an A100
    cases=each(check_ranks, num_ranks=[2, 4], rank=[0, 1], shape=[(3, 333)], dtype=(torch.float32, torch.half))
    | {
        "three ranks": check_ranks(3, 2, (3, 333)),
        "eight ranks": check_ranks(8, 5, (2, 400), num_launches=2),
        "a few elements": check_ranks(2, 1, (1, 16)),
        "one program": check_ranks(2, 1, (1, SLOT_BYTES // 2)),
        "one rank": check_ranks(1, 0, (3, 333)),
        "no tokens": check_ranks(2, 0, (0, 16)),
        "abort": check_abort,
    },
    on_gpu=each(check_ranks, num_ranks=[2, 4, 8], rank=[1], shape=[(1, 1024), (8, 4096)], dtype=DTYPES)
    | {"2 MiB": check_ranks(2, 1, (256, 4096))},
    drawn=st.builds(check_ranks, st.integers(2, 8), st.integers(0, 1), SHAPES, st.sampled_from(DTYPES)),
    compiled={
        f"{num_ranks} ranks, {num_tokens} tokens": Compilation(
            lambda dtype, _, num_ranks=num_ranks, num_tokens=num_tokens: launch(num_tokens, 1024, dtype, num_ranks)
        )
        for num_ranks, num_tokens in ((2, 256), (8, 1))
    },
    refused=Refused(
        lambda x: all_reduce(x, None),
        lambda: {"x": torch.zeros(4, 32)},
        tuple(
            ({"x": x}, r"x must be \[T, E\], contiguous, in .* of at most 2097152 bytes, got")
            for x in (
                torch.zeros(4),
                torch.zeros(4, 4).T,
                torch.zeros(4, 4).double(),
                torch.empty(257, 4096, dtype=torch.half),
            )
        ),
    ),
    steps={"": Steps(lambda size: launch(min(size, 1024)))},
    measured={"all_reduce": measured},
    reached_by="peer memory",
    beyond_contract=frozenset({"abort"}),
)
