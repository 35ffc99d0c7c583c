"""Cases of shared_prefix_attention, together with paged_attention, against reference.shared_prefix_attention. D53"""

from dataclasses import dataclass
from functools import partial

import torch
from hypothesis import strategies as st

from benchmarks.arithmetic import Work
from benchmarks.kernels.inputs import int32, randn
from benchmarks.measuring import Measured
from reference.paged_attention import paged_attention as reference_paged_attention
from reference.shared_prefix_attention import shared_prefix_attention as reference_shared_prefix_attention
from tests.support.kernels.accuracy import assert_within_the_error_of_plain_torch
from tests.support.kernels.attention import AttentionCase
from tests.support.kernels.guards import Guards
from tests.support.kernels.registry import DTYPES, Compilation, Kernel, Limits, Refused, lazy, meta

paged_attention = lazy("paged_attention.paged_attention")
shared_prefix_attention = lazy("shared_prefix_attention.shared_prefix_attention")


@dataclass(frozen=True)
class Case:
    """tiles: of each tile of sequences, how many blocks they share, and how many tokens each has of its own (from 1).

    All tiles but the last have seqs_per_tile sequences. own_splits: of paged_attention.
    """

    tiles: tuple[tuple[int, tuple[int, ...]], ...]
    seqs_per_tile: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    num_splits: int = 2
    own_splits: int = 1
    tile_size: int | None = 16
    seed: int = 0


CASES = {
    "one tile": Case(((3, (5, 1, 20, 33)),)),
    "nothing shared": Case(((0, (5, 1, 20, 33)),)),
    "a tile that shares, one that does not, a part of a tile": Case(
        ((2, (1, 7, 3, 9)), (0, (4, 40, 1, 2)), (5, (3, 17)))
    ),
    "own keys are split": Case(((2, (50, 7, 33, 90)), (0, (4, 40))), own_splits=3),
    "one split": Case(((4, (5, 1, 20)),), num_splits=1),
    "more splits than tiles of keys": Case(((1, (5, 40)),), num_splits=5, own_splits=2),
    "3 query heads a kv head": Case(((2, (5, 40, 3)),), num_heads=6),
    "8 query heads a kv head": Case(((2, (5, 40)),), num_heads=8, num_kv_heads=1, seqs_per_tile=2),
    "tile of keys within a block": Case(((2, (5, 40)),), block_size=64),
    "tile of keys over blocks": Case(((3, (5, 40)),), tile_size=64),
    "float16": Case(((3, (5, 40, 7)),), dtype=torch.float16),
}


def make_inputs(case: Case, device: str) -> tuple[torch.Tensor, ...]:
    """(query, k_cache, v_cache, block_tables, context_lens, sequence_order, shared_lens); rows are shuffled."""
    shared = [num_blocks * case.block_size for num_blocks, owns in case.tiles for _ in owns]
    context_lens = [
        length + own for length, own in zip(shared, (own for _, owns in case.tiles for own in owns), strict=True)
    ]
    sequences = AttentionCase(
        tuple((1, length) for length in context_lens),
        case.block_size,
        case.num_heads,
        case.num_kv_heads,
        case.head_dim,
        case.dtype,
        seed=case.seed,
    ).make_inputs(device)
    tables = sequences.block_tables
    assert tables is not None
    first = 0
    for num_blocks, owns in case.tiles:  # the tile's first sequence gives its blocks; the others' become unused
        tables[first : first + len(owns), :num_blocks] = tables[first, :num_blocks].clone()
        first += len(owns)
    rows = torch.randperm(len(shared), generator=torch.Generator().manual_seed(case.seed))  # place in the order -> row
    place_of_row = rows.argsort().to(device)
    lens = torch.tensor(shared, dtype=torch.int32, device=device)
    by_row = (tensor[place_of_row] for tensor in (tables, sequences.context_lens))
    return sequences.query, sequences.key, sequences.value, *by_row, rows.int().to(device), lens[place_of_row]


def check(case: Case, device: str) -> None:
    guards = Guards(device)
    inputs = [guards.read(tensor) for tensor in make_inputs(case, device)]
    query, k_cache, v_cache, tables, context_lens, order, lens = inputs
    with guards:
        part = shared_prefix_attention(
            query,
            k_cache,
            v_cache,
            tables,
            order,
            lens,
            seqs_per_tile=case.seqs_per_tile,
            num_splits=case.num_splits,
            tile_size=case.tile_size,
        )
        output = paged_attention(
            query, k_cache, v_cache, tables, context_lens, num_splits=case.own_splits, shared_prefix=part
        )
    exact = reference_shared_prefix_attention(
        query.double(), k_cache.double(), v_cache.double(), tables, context_lens, lens
    )
    plain = reference_paged_attention(query, k_cache, v_cache, tables, context_lens)
    places = ("sequence", "head", "element")
    assert_within_the_error_of_plain_torch("shared_prefix_attention", output, plain, exact, places)


def launch(dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    cache, rows = meta(40, 256, num_kv_heads, head_dim, dtype=dtype), meta(64, dtype=torch.int32)
    query, tables = meta(64, num_heads, head_dim, dtype=dtype), meta(64, 16, dtype=torch.int32)
    part = shared_prefix_attention(query, cache, cache, tables, rows, rows)
    paged_attention(query, cache, cache, tables, rows, shared_prefix=part)


def measured(num_seqs: int, num_shared: int, num_own: int, num_heads: int, num_kv_heads: int) -> Measured:
    """All sequences share num_shared tokens, in blocks of 256, and have num_own of their own. Peers read all keys."""
    head_dim, block_size = 128, 256
    shared_blocks, own_blocks = num_shared // block_size, -(-num_own // block_size)
    tables = torch.arange(shared_blocks + num_seqs * own_blocks).int()
    own = tables[shared_blocks:].view(num_seqs, own_blocks)
    tables = torch.cat([tables[:shared_blocks].expand(num_seqs, -1), own], dim=1).cuda()
    order, lens = torch.arange(num_seqs).int().cuda(), int32([num_shared] * num_seqs)
    context_lens = int32([num_shared + num_own] * num_seqs)

    def make(index: int) -> tuple[torch.Tensor, ...]:
        caches = (
            randn(index + i, shared_blocks + num_seqs * own_blocks, block_size, num_kv_heads, head_dim) for i in (0, 1)
        )
        return randn(index, num_seqs, num_heads, head_dim), *caches

    def run(query, k_cache, v_cache):
        part = shared_prefix_attention(query, k_cache, v_cache, tables, order, lens)
        return paged_attention(query, k_cache, v_cache, tables, context_lens, shared_prefix=part)

    def alone(query, k_cache, v_cache):
        return paged_attention(query, k_cache, v_cache, tables, context_lens)

    num_keys, num_queries = num_shared + num_seqs * num_own, num_seqs * num_heads * head_dim
    work = Work(2 * num_keys * num_kv_heads * head_dim * 2 + num_queries * 2, num_queries * 2)
    return Measured(make=make, run=run, expected=alone, work=work, peers={"paged_attention": alone})


KERNEL = Kernel(
    name="shared_prefix_attention",
    launched={"shared_prefix_attention_kernel": Limits()},
    cases={name: partial(check, case) for name, case in CASES.items()},
    on_gpu={
        f"{num_seqs} sequences, {h}/{k} heads, {str(dtype)[6:]}": partial(
            check,
            Case(
                tuple((4, tuple(range(1, 1 + min(32, num_seqs - first)))) for first in range(0, num_seqs, 32)),
                seqs_per_tile=32,
                num_heads=h,
                num_kv_heads=k,
                head_dim=128,
                block_size=256,
                dtype=dtype,
                num_splits=splits,
                tile_size=None,
            ),
        )
        for num_seqs, splits in ((16, 8), (100, 3))
        for h, k in ((16, 8), (32, 8), (14, 2))
        for dtype in DTYPES
    },
    drawn=st.builds(
        lambda blocks, own, last, heads, block_size, dtype, splits, own_splits, seed: partial(
            check,
            Case(
                (*((number, (own, 1, 2 * own, 3)) for number in blocks), (1, (own,) * last)),
                num_heads=heads[0],
                num_kv_heads=heads[1],
                block_size=block_size,
                dtype=dtype,
                num_splits=splits,
                own_splits=own_splits,
                seed=seed,
            ),
        ),
        st.lists(st.integers(0, 9), max_size=4),
        st.integers(1, 100),
        st.integers(1, 4),
        st.sampled_from([(4, 2), (6, 2), (8, 1), (3, 3)]),
        st.sampled_from([16, 64]),
        st.sampled_from(DTYPES),
        st.integers(1, 5),
        st.integers(1, 5),
        st.integers(0, 2**16),
    ),
    compiled={
        f"{h}/{k} heads": Compilation(lambda dtype, _, h=h, k=k: launch(dtype, h, k, 128))
        for h, k in ((16, 8), (14, 2))
    },
    refused=Refused(
        lambda **inputs: shared_prefix_attention(
            torch.zeros(3, 2, 32),
            torch.zeros(2, 16, 1, 32),
            torch.zeros(2, 16, 1, 32),
            torch.zeros(3, 1).int(),
            **inputs,
        ),
        lambda: {"sequence_order": torch.arange(3).int(), "shared_lens": torch.zeros(3).int()},
        (
            ({"sequence_order": torch.arange(3)}, r"sequence_order must be \[3\], contiguous, int32"),
            ({"shared_lens": torch.zeros(4).int()}, r"shared_lens must be \[3\]"),
        ),
    ),
    measured={"shared_prefix_attention": measured},
    reached_by="shared prefix",
)
