"""Batches for attention tests: a paged cache poisoned with NaN, a Context, and the outputs of the reference."""

from dataclasses import dataclass, replace

import torch

from nanovllm.attention.backend import KVCache
from nanovllm.context import Context, set_context
from nanovllm.layers.attention import Attention
from nanovllm.layers.ops import LayerOps
from nanovllm.layers.torch_ops import TORCH_OPS
from reference.paged_attention import paged_attention
from reference.store_kvcache import store_kvcache
from tests.support.comparing import assert_within, same_bits


@dataclass(frozen=True)
class Case:
    """A step over sequences of (number of queries, number of keys). The keys before the queries are in the cache."""

    lengths: tuple[tuple[int, int], ...]
    is_prefill: bool = True
    block_size: int = 16
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    scale: float = 0.3  # neither torch's default nor the engine's

    @property
    def has_cached_keys(self) -> bool:
        return any(q_len != k_len for q_len, k_len in self.lengths)


@dataclass(frozen=True)
class Step:
    """One step's inputs: packed heads [T, H + 2 K, D]; caches in which every slot that no sequence owns is NaN."""

    case: Case
    qkv: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    context: Context
    block_tables: torch.Tensor

    @property
    def heads(self) -> tuple[torch.Tensor, ...]:
        """Query, key and value."""
        return self.qkv.split([self.case.num_heads, self.case.num_kv_heads, self.case.num_kv_heads], dim=1)

    def expected_caches(self) -> tuple[torch.Tensor, torch.Tensor]:
        _, key, value = self.heads
        return store_kvcache(key, value, self.k_cache, self.v_cache, self.context.slot_mapping)

    def expected_output(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """reference.paged_attention in `dtype`."""
        query, k_cache, v_cache = (x.to(dtype) for x in (self.heads[0], *self.expected_caches()))
        lens, cu_seqlens_q = self.context.context_lens, self.context.cu_seqlens_q
        return paged_attention(query, k_cache, v_cache, self.block_tables, lens, cu_seqlens_q, self.case.scale)

    def run(self, ops: LayerOps = TORCH_OPS, has_cache: bool = True) -> torch.Tensor:
        """Attention.forward, which also stores into the caches. The rotation is by an angle of zero."""
        case = self.case
        layer = Attention(case.num_heads, case.head_dim, case.scale, case.num_kv_heads, ops)
        if has_cache:
            layer.kv_cache = KVCache(self.k_cache, self.v_cache)
        cos = torch.ones(len(self.qkv), case.head_dim // 2, device=self.qkv.device)
        with set_context(self.context), torch.inference_mode():
            return layer(self.qkv.flatten(1), cos, torch.zeros_like(cos))

    def with_context(self, **changes: object) -> "Step":
        return replace(self, context=replace(self.context, **changes))


def make_step(case: Case, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Step:
    """The step of `case`, whose sequences own blocks in random order."""
    generator = torch.Generator().manual_seed(0)
    q_lens, k_lens = zip(*case.lengths, strict=True)
    heads, kv_heads = case.num_heads, case.num_kv_heads
    qkv = torch.randn(sum(q_lens), heads + 2 * kv_heads, case.head_dim, generator=generator).to(device, dtype)

    num_blocks = [-(-k_len // case.block_size) for k_len in k_lens]
    # No sequence owns block 0 (nor two others): a masked read that is sent there meets NaN.
    block_ids = 1 + torch.randperm(sum(num_blocks) + 2, generator=torch.Generator().manual_seed(0))
    block_tables = torch.full((len(k_lens), max(num_blocks)), -1, dtype=torch.int32)
    for index, ids in enumerate(block_ids[: sum(num_blocks)].split(num_blocks)):
        block_tables[index, : len(ids)] = ids

    caches = torch.full((2, len(block_ids) + 1, case.block_size, kv_heads, case.head_dim), torch.nan)
    slots = []
    for table, (q_len, k_len) in zip(block_tables.long(), case.lengths, strict=True):
        positions = torch.arange(k_len)
        all_slots = table[positions // case.block_size] * case.block_size + positions % case.block_size
        cached, new = all_slots[: k_len - q_len], all_slots[k_len - q_len :]
        for cache in caches:
            cache.flatten(0, 1)[cached] = torch.randn(len(cached), kv_heads, case.head_dim, generator=generator)
        slots.append(new)

    block_tables = block_tables.to(device)
    context = Context(
        is_prefill=case.is_prefill,
        slot_mapping=torch.cat(slots).to(device),
        cu_seqlens_q=running_sum(q_lens).to(device),
        cu_seqlens_k=running_sum(k_lens).to(device),
        max_seqlen_q=max(q_lens),
        max_seqlen_k=max(k_lens),
        context_lens=torch.tensor(k_lens, dtype=torch.int32, device=device),
        block_tables=block_tables if case.has_cached_keys or not case.is_prefill else None,
    )
    return Step(case, qkv, *caches.to(device, dtype), context, block_tables)


def running_sum(lengths) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def assert_within_the_error_of_plain_torch(name: str, step: Step, ops: LayerOps = TORCH_OPS) -> None:
    """flash-attention's own bound: the same formula in plain PyTorch and the same dtype errs at least half as much.

    One unit in the last place of the largest output is allowed besides, for the rounding of the output itself. The
    caches are those of the reference, bit for bit.
    """
    caches, expected, dtype = step.expected_caches(), step.expected_output(), step.qkv.dtype
    plain_error = (step.expected_output(dtype).double() - expected).abs().max()
    last_place = torch.finfo(dtype).eps * expected.abs().max()
    allowed = float(2 * plain_error + last_place)
    assert_within(f"attention: {name} against the reference", step.run(ops), expected, allowed)
    assert same_bits(torch.stack([step.k_cache, step.v_cache]), torch.stack(caches))
