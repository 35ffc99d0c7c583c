"""Cases of paged_attention for a device: see tests/support/kernels/interpreting.py. The kernel is imported late."""

from dataclasses import dataclass, replace
from functools import partial

import torch

from reference.paged_attention import paged_attention as reference_paged_attention
from tests.support.kernels.accuracy import assert_within_twice_the_error_of_plain_torch
from tests.support.kernels.interpreting import Guards

NO_BLOCK = 2**30  # fills the block tables: who follows it leaves the cache by far


@dataclass(frozen=True)
class Case:
    context_lens: tuple[int, ...] = (1, 33, 0, 70)
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    query_size: float = 1.0
    num_splits: int | None = 1
    tiling: tuple[int, int, int] | None = None
    is_ordered: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Inputs:
    query: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_tables: torch.Tensor
    context_lens: torch.Tensor

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.query, self.k_cache, self.v_cache, self.block_tables, self.context_lens

    def expected(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        query, k_cache, v_cache = (tensor.to(dtype) for tensor in self.tensors()[:3])
        return reference_paged_attention(query, k_cache, v_cache, self.block_tables, self.context_lens)

    def on_guards(self, guards: Guards) -> "Inputs":
        return Inputs(*(guards.read(tensor) for tensor in self.tensors()))


CASES = {
    "one key": Case((1,)),
    "ragged": Case(),
    "no context": Case((0, 0)),
    "no sequences": Case(()),
    "one query head a kv head": Case(num_heads=2),
    "7 query heads a kv head": Case(num_heads=14),
    "20 query heads a kv head": Case(num_heads=20, num_kv_heads=1),
    "head size 64": Case(head_dim=64),
    "head size 128": Case(head_dim=128),
    "head size 256": Case((33, 5), head_dim=256),
    "tile within a block": Case(block_size=64, tiling=(16, 4, 2)),
    "tile is a block": Case(block_size=32, tiling=(32, 4, 2)),
    "tile of 4 blocks": Case(tiling=(64, 4, 2)),
    "block size 256": Case((256, 257), block_size=256, tiling=(64, 4, 2)),
    "2 splits": Case(num_splits=2, tiling=(16, 4, 2)),
    "3 splits of several tiles": Case(num_splits=3, block_size=32, tiling=(16, 4, 2)),
    "head size 64, split": Case(head_dim=64, num_splits=3, tiling=(16, 4, 2)),  # several programs combine a head
    "more splits than tiles": Case((70, 5), num_splits=8, tiling=(16, 4, 2)),
    "7 query heads a kv head, split": Case(num_heads=7, num_kv_heads=1, num_splits=4, tiling=(16, 4, 2)),
    "more splits than are combined at once": Case((1280,), 16, 1, num_splits=80, tiling=(16, 4, 2)),
    "splits by default": Case(num_splits=None),
    "in another order": Case(is_ordered=True),
    "in another order, split": Case(is_ordered=True, num_splits=3, tiling=(16, 4, 2)),
    "one key has all the weight": Case(query_size=1000.0, num_splits=2, tiling=(16, 4, 2)),
}
CASES |= {
    f"{name}, float16": replace(CASES[name], dtype=torch.float16)
    for name in ("ragged", "7 query heads a kv head", "head size 128", "tile of 4 blocks", "3 splits of several tiles")
}


def make_inputs(case: Case, device: str = "cpu") -> Inputs:
    """The caches have 2 more blocks than are used. D53: every slot that no sequence owns is NaN."""
    generator = torch.Generator().manual_seed(case.seed)
    num_blocks = [-(-length // case.block_size) for length in case.context_lens]
    block_ids = torch.randperm(sum(num_blocks) + 2, generator=generator)
    block_tables = torch.full((len(num_blocks), max(num_blocks, default=0) + 1), NO_BLOCK, dtype=torch.int32)
    is_owned = torch.zeros(len(block_ids), case.block_size, dtype=torch.bool)
    for table, ids, length in zip(block_tables, block_ids.split([*num_blocks, 2]), case.context_lens, strict=False):
        table[: len(ids)] = ids
        position = torch.arange(length)
        is_owned[ids[position // case.block_size], position % case.block_size] = True

    device_generator = torch.Generator(device).manual_seed(case.seed)
    caches = []
    for _ in range(2):
        shape = (*is_owned.shape, case.num_kv_heads, case.head_dim)
        cache = torch.randn(shape, generator=device_generator, device=device).to(case.dtype)
        caches.append(cache.masked_fill_(~is_owned.to(device)[:, :, None, None], torch.nan))
    shape = (len(num_blocks), case.num_heads, case.head_dim)
    query = (torch.randn(shape, generator=generator) * case.query_size).to(device, case.dtype)
    context_lens = torch.tensor(case.context_lens, dtype=torch.int32, device=device)
    return Inputs(query, *caches, block_tables.to(device), context_lens)


def run(case: Case, inputs: Inputs, **options) -> torch.Tensor:
    from nanovllm.kernels.paged_attention import Tiling, paged_attention

    if case.is_ordered:
        options["sequence_order"] = inputs.context_lens.argsort(descending=True).int()
    if case.tiling is not None:
        options["tiling"] = Tiling(*case.tiling)
    return paged_attention(*inputs.tensors(), num_splits=case.num_splits, **options)


def assert_right(inputs: Inputs, output: torch.Tensor) -> None:
    """Off by at most twice what the reference errs in the inputs' own dtype, and one unit in the last place."""
    if len(output):
        plain, exact = inputs.expected(output.dtype), inputs.expected()
        assert_within_twice_the_error_of_plain_torch("paged_attention", output, plain, exact)


def check_case(case: Case, device: str) -> None:
    guards = Guards(device)
    inputs = make_inputs(case, device).on_guards(guards)
    with guards:
        output = run(case, inputs)
    guards.assert_intact()
    assert output.shape == inputs.query.shape
    assert_right(inputs, output)


def check_strides(num_splits: int, device: str) -> None:
    """Views: query of a packed qkv, keys of a cache of 2 layers that stores head by head, values of one that stores
    token by token, a narrow table of a wide one, every other row of out. What lies between is NaN and stays."""
    case = Case(num_splits=num_splits)
    plain = make_inputs(case, device)
    guards = Guards(device)
    qkv = guards.unwritten(*plain.query.shape[:1], 8, case.head_dim, dtype=case.dtype)
    num_blocks, block_size, heads, dim = plain.k_cache.shape
    k_caches = guards.unwritten(num_blocks, 2, heads, block_size, dim, dtype=case.dtype)
    v_caches = guards.unwritten(2, num_blocks, block_size, heads + 1, dim, dtype=case.dtype)
    tables = guards.unwritten(len(plain.block_tables), 20, dtype=torch.int32)
    table = tables[:, 3 : 3 + plain.block_tables.shape[1]]
    views = (qkv[:, :4], k_caches[:, 1].transpose(1, 2), v_caches[1, :, :, 1:], table)
    for view, tensor in zip(views, plain.tensors(), strict=False):
        view.copy_(tensor)
    wide_out = guards.unwritten(len(qkv), 8, 2 * dim, dtype=case.dtype)
    out = wide_out[:, ::2, :dim]
    with guards:
        output = run(case, Inputs(*views, guards.read(plain.context_lens)), out=out)
    guards.assert_intact()
    assert output is out
    assert_right(plain, out)
    assert wide_out[:, 1::2].isnan().all()
    assert wide_out[:, :, dim:].isnan().all()


def check_order(device: str) -> None:
    """sequence_order is followed: if it names one sequence only, the others are not computed."""
    inputs = make_inputs(Case(), device)
    out = torch.full_like(inputs.query, torch.nan)
    order = torch.full_like(inputs.context_lens, 3)
    run(Case(), inputs, out=out, sequence_order=order)
    assert out.isnan().flatten(1).all(dim=1).tolist() == [True, True, True, False]


def check_far_block(device: str) -> None:
    """D52: a block whose elements lie beyond 2**31. Keys and values share one cache of 4 GiB, of which a CPU touches a
    few pages."""
    case = Case((40,), 2, 1, head_dim=32, block_size=16, dtype=torch.float16, num_splits=2, tiling=(16, 4, 2))
    near = make_inputs(case, device)
    num_blocks = 2**31 // near.k_cache[0].numel() + 8
    far = torch.empty(num_blocks, *near.k_cache.shape[1:], dtype=case.dtype, device=device)
    first = num_blocks - len(near.k_cache)
    far[first:] = near.k_cache
    output = run(case, replace(near, k_cache=far, v_cache=far, block_tables=near.block_tables + first))
    assert_right(replace(near, v_cache=near.k_cache), output)


CHECKS = {name: partial(check_case, case) for name, case in CASES.items()}
CHECKS |= {"strides": partial(check_strides, 1), "strides, split": partial(check_strides, 3)}
CHECKS |= {"order": check_order, "far block": check_far_block}
