"""Batches for attention tests: a paged cache poisoned with NaN, a Context, and what the reference makes of them."""

from dataclasses import dataclass

import torch

from nanovllm.attention.backend import AttentionBackend
from nanovllm.context import Context, set_context
from nanovllm.layers.attention import Attention
from reference.paged_attention import paged_attention
from reference.store_kvcache import store_kvcache
from tests.support.comparing import assert_within


@dataclass(frozen=True)
class Case:
    """A step over sequences of (number of queries, number of keys). The keys before the queries are in the cache."""

    lengths: tuple[tuple[int, int], ...]
    is_prefill: bool = True
    block_size: int = 16
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    seed: int = 0

    @property
    def has_cached_keys(self) -> bool:
        return any(q_len != k_len for q_len, k_len in self.lengths)

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


@dataclass(frozen=True)
class Step:
    """One step's inputs: q, k, v as views of a packed qkv; caches in which every slot no sequence owns is NaN."""

    case: Case
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    context: Context
    block_tables: torch.Tensor

    def expected_caches(self) -> tuple[torch.Tensor, torch.Tensor]:
        return store_kvcache(self.key, self.value, self.k_cache, self.v_cache, self.context.slot_mapping)

    def expected_output(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """reference.paged_attention in `dtype`."""
        k_cache, v_cache = self.expected_caches()
        lens, cu_seqlens_q = self.context.context_lens, self.context.cu_seqlens_q
        query, k_cache, v_cache = self.query.to(dtype), k_cache.to(dtype), v_cache.to(dtype)
        return paged_attention(query, k_cache, v_cache, self.block_tables, lens, cu_seqlens_q, self.case.scale)

    def run(self, backend: AttentionBackend) -> torch.Tensor:
        """Attention.forward, which also stores into the caches."""
        case = self.case
        layer = Attention(case.num_heads, case.head_dim, case.scale, case.num_kv_heads, backend)
        layer.bind_kv_cache(self.k_cache, self.v_cache)
        with set_context(self.context), torch.inference_mode():
            return layer(self.query, self.key, self.value)


def make_step(case: Case, dtype: torch.dtype = torch.float64, device: str = "cpu", block_seed: int = 0) -> Step:
    """The step of `case`; block_seed permutes which blocks the sequences own and nothing else."""
    generator = torch.Generator().manual_seed(case.seed)
    q_lens, k_lens = zip(*case.lengths, strict=True)
    num_tokens, heads, kv_heads = sum(q_lens), case.num_heads, case.num_kv_heads
    row = torch.randn(num_tokens, heads + 2 * kv_heads, case.head_dim, generator=generator).to(device, dtype)
    query, key, value = row.split([heads, kv_heads, kv_heads], dim=1)

    num_blocks = [-(-k_len // case.block_size) for k_len in k_lens]
    # Nobody owns block 0 (nor two others): a masked read that is sent there meets NaN.
    block_ids = 1 + torch.randperm(sum(num_blocks) + 2, generator=torch.Generator().manual_seed(block_seed))
    block_tables = torch.full((len(k_lens), max(num_blocks)), -1, dtype=torch.int32)
    for index, ids in enumerate(block_ids[: sum(num_blocks)].split(num_blocks)):
        block_tables[index, : len(ids)] = ids

    shape = (len(block_ids) + 1, case.block_size, kv_heads, case.head_dim)
    k_cache, v_cache = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
    slots = []
    for table, (q_len, k_len) in zip(block_tables.long(), case.lengths, strict=True):
        positions = torch.arange(k_len)
        all_slots = table[positions // case.block_size] * case.block_size + positions % case.block_size
        cached, new = all_slots[: k_len - q_len], all_slots[k_len - q_len :]
        k_cache.flatten(0, 1)[cached] = torch.randn(len(cached), *shape[2:], generator=generator)
        v_cache.flatten(0, 1)[cached] = torch.randn(len(cached), *shape[2:], generator=generator)
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
    return Step(case, query, key, value, k_cache.to(device, dtype), v_cache.to(device, dtype), context, block_tables)


def running_sum(lengths) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def assert_within_twice_the_error_of_plain_torch(
    backend: str, step: Step, output: torch.Tensor, expected: torch.Tensor
) -> None:
    """flash-attention's own bound: the same formula in plain PyTorch and the same dtype errs at least half as much.

    One unit in the last place of the largest output is allowed besides, for the rounding of the output itself.
    """
    plain_error = (step.expected_output(output.dtype).double() - expected).abs().max()
    last_place = torch.finfo(output.dtype).eps * expected.abs().max()
    allowed = float(2 * plain_error + last_place)
    assert_within(f"attention: {backend} against the reference", output, expected, allowed)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bit for bit, NaN included."""
    assert torch.equal(actual.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))
