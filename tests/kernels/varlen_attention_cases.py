"""Cases of varlen_attention: see tests/support/kernels/interpreting.py. The kernel is imported late, for triton's sake."""

from dataclasses import dataclass, replace
from functools import partial

import torch

from reference.packing import varlen_attention as reference_varlen_attention
from reference.paged_attention import paged_attention as reference_paged_attention
from tests.attention_cases import running_sum
from tests.support.kernels.accuracy import assert_within_twice_the_error_of_plain_torch
from tests.support.kernels.interpreting import Guards

NO_BLOCK = 2**30  # fills the block tables: who follows it leaves the cache by far


@dataclass(frozen=True)
class Case:
    """Sequences of (number of queries, number of keys). block_size 0: key and value are packed."""

    lengths: tuple[tuple[int, int], ...]
    block_size: int = 16
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    dtype: torch.dtype = torch.float32
    tiles: tuple[int, int, int, int] | None = (16, 16, 4, 2)
    query_size: float = 1.0
    seed: int = 0

    @property
    def max_seqlen_q(self) -> int:
        return max((q_len for q_len, _ in self.lengths), default=0)


@dataclass(frozen=True)
class Inputs:
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    block_tables: torch.Tensor | None

    def on_guards(self, guards: Guards) -> "Inputs":
        def read(tensor: torch.Tensor) -> torch.Tensor:
            return guards.read(tensor)

        tables = None if self.block_tables is None else read(self.block_tables)
        cu_seqlens = read(self.cu_seqlens_q), read(self.cu_seqlens_k)
        return Inputs(read(self.query), read(self.key), read(self.value), *cu_seqlens, tables)

    def expected(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """What the reference computes in `dtype`."""
        query, key, value = (tensor.to(dtype) for tensor in (self.query, self.key, self.value))
        if self.block_tables is None:
            return reference_varlen_attention(query, key, value, self.cu_seqlens_q, self.cu_seqlens_k)
        context_lens = self.cu_seqlens_k.diff()
        return reference_paged_attention(query, key, value, self.block_tables, context_lens, self.cu_seqlens_q)


RAGGED = ((5, 5), (1, 1), (33, 33), (16, 16), (17, 17))
CACHED = ((5, 21), (1, 16), (17, 17), (3, 40), (1, 1), (16, 32), (2, 65))

CASES = {
    "one query": Case(((1, 1),)),
    "whole prompts": Case(RAGGED),
    "packed keys": Case(RAGGED, block_size=0),
    "cached keys": Case(CACHED),
    "packed keys, more than queries": Case(CACHED, block_size=0),
    "no sequences": Case(()),
    "sequences of nothing": Case(((0, 0), (3, 3), (0, 0), (0, 5))),
    "one query head a kv head": Case(CACHED, num_heads=2),
    "7 query heads a kv head": Case(CACHED, num_heads=7, num_kv_heads=1),
    "20 query heads a kv head": Case(((3, 9), (2, 2)), num_heads=20, num_kv_heads=1),
    "head size 64": Case(CACHED, head_dim=64),
    "head size 128": Case(CACHED, head_dim=128),
    "head size 256": Case(((3, 20), (5, 5)), head_dim=256),
    "tile within a block": Case(CACHED, block_size=64),
    "tile of 2 blocks": Case(CACHED, tiles=(16, 32, 4, 2)),
    "tile of 4 blocks": Case(CACHED, tiles=(32, 64, 4, 2)),
    "block size 256": Case(((5, 300), (40, 256), (3, 257)), block_size=256, tiles=(32, 64, 4, 2)),
    "more rows than keys in a tile": Case(CACHED, tiles=(64, 16, 4, 2)),
    "more keys than rows in a tile": Case(CACHED, block_size=0, tiles=(16, 64, 4, 2)),
    "tiles by default": Case(CACHED, tiles=None),
    "tiles by default, packed": Case(RAGGED, block_size=0, tiles=None),
    "one key has all the weight": Case(CACHED, query_size=1000.0),
}
CASES |= {
    f"{name}, float16": replace(CASES[name], dtype=torch.float16)
    for name in ("whole prompts", "packed keys", "cached keys", "7 query heads a kv head", "head size 128")
}


def make_inputs(case: Case, device: str = "cpu") -> Inputs:
    """D53: every slot that no sequence owns is NaN, and so are two blocks that none uses."""
    generator = torch.Generator().manual_seed(case.seed)
    q_lens, k_lens = [q for q, _ in case.lengths], [k for _, k in case.lengths]
    shape = (sum(q_lens), case.num_heads, case.head_dim)
    query = torch.randn(shape, generator=generator) * case.query_size
    cu_seqlens = running_sum(q_lens).to(device), running_sum(k_lens).to(device)
    if not case.block_size:
        shape = (sum(k_lens), case.num_kv_heads, case.head_dim)
        key, value = (torch.randn(shape, generator=generator).to(device, case.dtype) for _ in range(2))
        return Inputs(query.to(device, case.dtype), key, value, *cu_seqlens, None)

    num_blocks = [-(-k_len // case.block_size) for k_len in k_lens]
    block_ids = torch.randperm(sum(num_blocks) + 2, generator=generator)
    block_tables = torch.full((len(k_lens), max(num_blocks, default=0) + 1), NO_BLOCK, dtype=torch.int32)
    is_owned = torch.zeros(len(block_ids), case.block_size, dtype=torch.bool)
    for table, ids, k_len in zip(block_tables, block_ids.split([*num_blocks, 2]), k_lens, strict=False):
        table[: len(ids)] = ids
        position = torch.arange(k_len)
        is_owned[ids[position // case.block_size], position % case.block_size] = True
    device_generator = torch.Generator(device).manual_seed(case.seed)
    caches = []
    for _ in range(2):
        shape = (*is_owned.shape, case.num_kv_heads, case.head_dim)
        cache = torch.randn(shape, generator=device_generator, device=device).to(case.dtype)
        caches.append(cache.masked_fill_(~is_owned.to(device)[:, :, None, None], torch.nan))
    return Inputs(query.to(device, case.dtype), *caches, *cu_seqlens, block_tables.to(device))


def run(case: Case, inputs: Inputs) -> torch.Tensor:
    from nanovllm.kernels.varlen_attention import Tiles, varlen_attention

    return varlen_attention(
        inputs.query,
        inputs.key,
        inputs.value,
        inputs.cu_seqlens_q,
        inputs.cu_seqlens_k,
        max_seqlen_q=case.max_seqlen_q,
        block_tables=inputs.block_tables,
        tiles=None if case.tiles is None else Tiles(*case.tiles),
    )


def assert_right(inputs: Inputs, output: torch.Tensor, kernel: str = "varlen_attention") -> None:
    """Off by at most twice what the reference errs in the inputs' own dtype, and one unit in the last place."""
    assert output.shape == inputs.query.shape
    if not len(output):
        return
    plain, exact = inputs.expected(output.dtype), inputs.expected()
    assert_within_twice_the_error_of_plain_torch(kernel, output, plain, exact)


def check_case(case: Case, device: str) -> None:
    guards = Guards(device)
    inputs = make_inputs(case, device).on_guards(guards)
    with guards:
        output = run(case, inputs)
    guards.assert_intact()
    assert_right(inputs, output)


def check_strides(block_size: int, device: str) -> None:
    """Views: query, key and value of a packed qkv, or caches of a cache of 2 layers that stores head by head and a
    narrow table of a wide one. What lies between is NaN."""
    case = Case(CACHED if block_size else RAGGED, block_size)
    plain = make_inputs(case, device)
    guards = Guards(device)
    qkv = guards.unwritten(len(plain.query), 8, case.head_dim, dtype=case.dtype)
    query, key, value = qkv.split([4, 2, 2], dim=1)
    tables = None
    if plain.block_tables is not None:
        num_blocks, _, heads, dim = plain.key.shape
        kv_cache = guards.unwritten(2, num_blocks, 2, heads, block_size, dim, dtype=case.dtype)
        key, value = kv_cache[:, :, 1].transpose(2, 3)
        tables = guards.unwritten(len(plain.block_tables), 20, dtype=torch.int32)[
            :, 3 : 3 + plain.block_tables.shape[1]
        ]
        tables.copy_(plain.block_tables)
    for view, tensor in zip((query, key, value), (plain.query, plain.key, plain.value), strict=True):
        view.copy_(tensor)
    cu_seqlens = guards.read(plain.cu_seqlens_q), guards.read(plain.cu_seqlens_k)
    with guards:
        output = run(case, Inputs(query, key, value, *cu_seqlens, tables))
    guards.assert_intact()
    assert_right(plain, output)


def check_far_block(device: str) -> None:
    """D52: a block whose elements lie beyond 2**31. Keys and values share one cache of 4 GiB, of which a CPU touches a
    few pages."""
    case = Case(((7, 40),), 16, 2, 1, 32, torch.float16)
    near = make_inputs(case, device)
    assert near.block_tables is not None
    num_blocks = 2**31 // near.key[0].numel() + 8
    far = torch.empty(num_blocks, *near.key.shape[1:], dtype=case.dtype, device=device)
    first = num_blocks - len(near.key)
    far[first:] = near.key
    output = run(case, replace(near, key=far, value=far, block_tables=near.block_tables + first))
    assert_right(replace(near, value=near.key), output)


def check_far_token(device: str) -> None:
    """D52: the second of two packed tokens lies beyond 2**31, and so it does in query, key and value alike."""
    case = Case(((1, 1), (1, 1)), 0, 1, 1, 32, torch.float16)
    near = make_inputs(case, device)
    far = torch.empty(2**31 + 64, dtype=case.dtype, device=device)
    views = [far[start:].as_strided(near.query.shape, (2**31 - 64, 32, 1)) for start in (0, 32, 64)]
    for view, tensor in zip(views, (near.query, near.key, near.value), strict=True):
        view.copy_(tensor)
    assert_right(near, run(case, Inputs(*views, near.cu_seqlens_q, near.cu_seqlens_k, None)))


CHECKS = {name: partial(check_case, case) for name, case in CASES.items()}
CHECKS |= {"strides, packed": partial(check_strides, 0), "strides, paged": partial(check_strides, 16)}
CHECKS |= {"far block": check_far_block, "far token": check_far_token}
