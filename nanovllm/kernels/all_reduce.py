"""all_reduce: the sum of all ranks' x, by one kernel on each GPU that writes into the other GPUs' memory.

A program sends its part of x to the buffers of all other ranks, waits until theirs have arrived in its own buffer, and
sums the parts in float32. An element that has not arrived is EMPTY, a value that no rank sends, so the data needs
neither a flag nor a fence behind it: its latency is that of one write over NVLink. A program empties what it has read.

There are two slots for each program and rank, used in turn; a program's part of x fills one. A rank sends for the
second launch after this one when all others have sent for the next one, and so have read, and emptied, the slot. Many
small programs are fastest, since each waits for little.

Source: TensorRT-LLM's all-reduce of this kind, which it names after Lamport. NCCL's LL sends no flag behind the data
either.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# (Triton's types know neither pointers to a constexpr type nor static_range.)

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.distributed.peer_memory import EMPTY, MAX_PROGRAMS, SLOT_BYTES, PeerBuffers
from nanovllm.kernels import DTYPES
from nanovllm.kernels.early_launch import pays_between_linear_layers
from nanovllm.kernels.launching import cdiv, launch, next_power_of_2

TILE_SIZE = 256  # elements that a program sums at once, while others arrive
POLLS_BEFORE_CHECK = 4096  # of is_aborted: about 1.5 ms, because the host's memory answers one program after the other


def all_reduce(
    x: torch.Tensor,
    peers: PeerBuffers,
    *,
    num_warps: int | None = None,
    polls_before_check: int = POLLS_BEFORE_CHECK,
    launches_early: bool | None = None,
) -> torch.Tensor:
    """The sum of the ranks' x, of its shape and dtype, with the same bits on every rank.

    All ranks launch it in the same order, with x of the same shape and dtype. x: [T, E], float32, float16 or bfloat16,
    contiguous, at most MAX_PROGRAMS * SLOT_BYTES bytes. Summed in float32 and rounded once; the value whose bits are
    EMPTY (-0.0 in half precision, -4.6e-41 in float32) is sent as 0. When peers.is_aborted is set, it returns soon, and
    the result holds anything.
    num_warps: by default 2 with two ranks, as measured on two H200s. polls_before_check: how often a program looks for
    data before it looks at is_aborted. launches_early: see early_launch.
    Raises ValueError for other x.
    """
    if x.ndim != 2 or not x.is_contiguous() or x.dtype not in DTYPES or x.nbytes > MAX_PROGRAMS * SLOT_BYTES:
        raise ValueError(
            "x must be [T, E], contiguous, in float32, float16 or bfloat16, of at most "
            f"{MAX_PROGRAMS * SLOT_BYTES} bytes, got {list(x.shape)} of strides {x.stride()} in {x.dtype}"
        )
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return total
    num_ranks, is_half = len(peers.addresses), x.element_size() == 2
    num_rows = 1 if num_ranks == 2 else next_power_of_2(num_ranks)
    if num_warps is None:
        num_warps = min(16, max(2, num_rows))
    if launches_early is None:
        launches_early = pays_between_linear_layers(x.device, *x.shape)
    launch(
        all_reduce_kernel,
        (cdiv(x.nbytes, SLOT_BYTES),),
        x, total, peers.addresses, peers.counts, peers.is_aborted, x.numel(),
        RANK=peers.rank, NUM_RANKS=num_ranks, NUM_ROWS=num_rows,
        SLOT_SIZE=SLOT_BYTES // x.element_size(), TILE_SIZE=TILE_SIZE, MAX_PROGRAMS=MAX_PROGRAMS,
        BITS=tl.int16 if is_half else tl.int32, EMPTY=EMPTY - 2**16 if is_half else EMPTY * 0x10001 - 2**32,
        POLLS_BEFORE_CHECK=polls_before_check,
        LAUNCHES_EARLY=launches_early, launch_pdl=launches_early,
        num_warps=num_warps,
    )  # fmt: skip
    return total


@triton.jit(do_not_specialize=["num_elements"])
def all_reduce_kernel(
    x_ptr, total_ptr, addresses_ptr, counts_ptr, is_aborted_ptr, num_elements,
    RANK: tl.constexpr, NUM_RANKS: tl.constexpr, NUM_ROWS: tl.constexpr,
    SLOT_SIZE: tl.constexpr, TILE_SIZE: tl.constexpr, MAX_PROGRAMS: tl.constexpr,
    BITS: tl.constexpr, EMPTY: tl.constexpr, POLLS_BEFORE_CHECK: tl.constexpr, LAUNCHES_EARLY: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if LAUNCHES_EARLY:
        gdc_wait()  # for x
        gdc_launch_dependents()
    count = tl.load(counts_ptr + program)
    half = (count & 1) * NUM_RANKS
    for start in tl.static_range(0, SLOT_SIZE, TILE_SIZE):
        place = start + tl.arange(0, TILE_SIZE)
        element = program * SLOT_SIZE + place
        x = load_bits(x_ptr + element, element < num_elements, BITS, EMPTY)
        for step in tl.static_range(1, NUM_RANKS):
            peer_ptr = tl.load(addresses_ptr + (RANK + step) % NUM_RANKS).to(tl.pointer_type(BITS))
            slot_ptr = peer_ptr + ((half + RANK) * MAX_PROGRAMS + program) * SLOT_SIZE
            tl.store(slot_ptr + place, x, mask=element < num_elements)
    # Of two ranks the other one's part is enough. A sum of more has the order of the ranks, so that its bits are equal.
    source = tl.arange(0, NUM_ROWS)[:, None] + (1 - RANK if NUM_RANKS == 2 else 0)
    own_ptr = tl.load(addresses_ptr + RANK).to(tl.pointer_type(BITS))
    slot_ptr = own_ptr + ((half + source) * MAX_PROGRAMS + program) * SLOT_SIZE
    dtype = total_ptr.dtype.element_ty
    is_aborted = 0
    for start in tl.static_range(0, SLOT_SIZE, TILE_SIZE):
        place = start + tl.arange(0, TILE_SIZE)
        element = program * SLOT_SIZE + place
        mask = element < num_elements
        part_ptr = slot_ptr + place[None, :]
        arrives = (source != RANK) & (source < NUM_RANKS) & mask[None, :]
        parts = tl.load(part_ptr, mask=arrives, other=0, volatile=True)
        num_polls = 0
        while (tl.max((parts == EMPTY).to(tl.int32)) > 0) & (is_aborted == 0):
            parts = tl.load(part_ptr, mask=arrives, other=0, volatile=True)
            num_polls += 1
            if num_polls % POLLS_BEFORE_CHECK == 0:
                is_aborted = tl.max(tl.load(is_aborted_ptr + 0 * place, mask=place == start, other=0, volatile=True))
        tl.store(part_ptr, tl.full(parts.shape, EMPTY, BITS), mask=arrives)
        x = load_bits(x_ptr + element, mask, BITS, EMPTY)
        parts = tl.where(source == RANK, x[None, :], parts)
        total = tl.sum(parts.to(dtype, bitcast=True).to(tl.float32), axis=0)
        if NUM_RANKS == 2:
            total += x.to(dtype, bitcast=True).to(tl.float32)
        tl.store(total_ptr + element, total.to(dtype), mask=mask)
    tl.store(counts_ptr + program, count + 1)


@triton.jit
def load_bits(x_ptr, mask, BITS: tl.constexpr, EMPTY: tl.constexpr):
    """The bits of x as a rank sends them: 0 for EMPTY."""
    bits = tl.load(x_ptr, mask=mask, other=0.0).to(BITS, bitcast=True)
    return tl.where(bits == EMPTY, 0, bits).to(BITS)
