"""The torch backend and its store against reference.paged_attention, over a cache whose other slots are NaN (D53)."""

from dataclasses import replace

import pytest
import torch

from nanovllm.attention import torch as torch_attention
from nanovllm.attention.torch import TorchAttentionBackend
from nanovllm.layers.torch_ops import TORCH_OPS, store_kvcache
from tests.support.attention_cases import Case, assert_within_the_error_of_plain_torch, make_step
from tests.support.comparing import assert_close, same_bits
from tests.support.counts import count_comparisons

STEPS = {
    "prefill": Case(((5, 5), (1, 1), (33, 33), (16, 16))),
    "prefill over cached keys": Case(((5, 21), (1, 16), (17, 17), (3, 40), (1, 1), (16, 32))),
    "decode": Case(((1, 1), (1, 2), (1, 16), (1, 17), (1, 45)), is_prefill=False),
}
each_step = pytest.mark.parametrize("case", STEPS.values(), ids=STEPS)

# float64 has 2**-53 of rounding; scores and sums of at most 300 terms of size 5 stay below 1e5 of them.
ATTENTION = "attention: torch backend against the reference, float64"
FLOAT64_TOLERANCE = 1e5 * 2**-53


def assert_attends_like_the_reference(case: Case) -> None:
    step = make_step(case)
    k_cache, v_cache = step.expected_caches()
    expected = step.expected_output()
    assert_close(ATTENTION, step.run(), expected, rtol=0, atol=FLOAT64_TOLERANCE)
    assert same_bits(step.k_cache, k_cache)
    assert same_bits(step.v_cache, v_cache)
    count_comparisons("attention: KV cache against reference.store_kvcache", 2 * k_cache.numel())


@pytest.mark.parametrize(
    "changes",
    [
        *({"num_heads": 8, "num_kv_heads": num_kv_heads} for num_kv_heads in (8, 4, 2, 1)),
        *({"block_size": block_size} for block_size in (1, 2, 256)),
        *({"head_dim": head_dim} for head_dim in (2, 24, 128)),
    ],
    ids=str,
)
@each_step
def test_equals_the_reference(case: Case, changes: dict[str, int]) -> None:
    """D53: heads share kv heads in order; any block size and any head_dim. Blocks lie in random order."""
    assert_attends_like_the_reference(replace(case, **changes))


@pytest.mark.parametrize("max_tokens", [1, 45])  # 5 groups, and 3; the other tests have 2
def test_groups_of_a_decode_change_nothing(monkeypatch: pytest.MonkeyPatch, max_tokens: int) -> None:
    case = STEPS["decode"]
    token_bytes = 2 * case.num_kv_heads * case.head_dim * torch.float64.itemsize
    monkeypatch.setitem(torch_attention.MAX_GATHERED_BYTES, "cpu", max_tokens * token_bytes)
    assert_attends_like_the_reference(case)


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "expected"),
    [
        ([7], 1, [(0, 1)]),  # longer than the limit, hence alone
        ([5, 5, 5, 5], 10, [(0, 2), (2, 4)]),
        ([4, 5, 5, 4], 10, [(0, 2), (2, 4)]),  # 3 of 5 would be 15
        ([10, 1, 1], 100, [(0, 2), (2, 3)]),  # 3 of 10 would be 30 for 12 tokens
        ([10, 1, 1, 9], 100, [(0, 2), (2, 4)]),  # nor 4 of 10 for 21
        ([10, 5, 3, 2], 100, [(0, 4)]),  # just half
        ([1, 1, 1, 100], 1000, [(0, 3), (3, 4)]),  # the longest may come last
    ],
)
def test_groups_are_bounded_and_at_most_half_padding(
    lengths: list[int], max_tokens: int, expected: list[tuple[int, int]]
) -> None:
    assert list(torch_attention.group_bounds(lengths, max_tokens)) == expected


def test_groups_are_made_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers of a step have its Context; when it ends, its groups do."""
    backend, step = TorchAttentionBackend(), make_step(STEPS["decode"])
    made: list[list[torch_attention.Group]] = []
    make_groups = torch_attention._make_groups
    monkeypatch.setattr(torch_attention, "_make_groups", lambda *args: made.append(make_groups(*args)) or made[-1])
    ops = replace(TORCH_OPS, attention=backend)
    first, second = step.run(ops), step.run(ops)
    assert same_bits(second, first)
    assert len(made) == len(backend.groups) == 1
    step.with_context(max_seqlen_q=1, max_seqlen_k=45, block_tables=step.block_tables.clone()).run(ops)
    assert len(made) == 2
    del step
    assert len(backend.groups) == 0


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_masking_few_queries_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(torch_attention, "MAX_MASKED_QUERIES", limit)
    assert_attends_like_the_reference(STEPS["prefill over cached keys"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@each_step
def test_error_in_lower_precision(case: Case, device: str, dtype: torch.dtype) -> None:
    assert_within_the_error_of_plain_torch("torch backend", make_step(replace(case, head_dim=64), dtype, device))


# --- store_kvcache ---


@pytest.mark.parametrize("padding", [[0], [2, 4], [0, 1, 2, 3, 4]], ids=str)
def test_padded_tokens_are_not_stored(padding: list[int]) -> None:
    """Slot -1 leaves the cache alone; whole-cache comparison, never-written slots included."""
    step = make_step(STEPS["decode"])
    slot_mapping = step.context.slot_mapping.clone()
    slot_mapping[padding] = -1
    k_cache, v_cache = step.with_context(slot_mapping=slot_mapping).expected_caches()
    store_kvcache(*step.heads[1:], step.k_cache, step.v_cache, slot_mapping)
    assert same_bits(step.k_cache, k_cache)
    assert same_bits(step.v_cache, v_cache)


def test_cache_of_one_layer_leaves_the_others_alone() -> None:
    step = make_step(STEPS["decode"])
    _, key, value = step.heads
    caches = torch.full((2, 3, *step.k_cache.shape), torch.nan, dtype=torch.float64)
    slots = torch.tensor([0, *step.context.slot_mapping[1:].tolist()])  # slot 0 is a slot like any other
    TORCH_OPS.store_kvcache(key, value, caches[0, 1], caches[1, 1], slots)
    assert torch.equal(caches[0, 1].flatten(0, 1)[slots], key)
    assert torch.equal(caches[1, 1].flatten(0, 1)[slots], value)
    assert caches.isnan().sum() == caches.numel() - key.numel() - value.numel()


def test_store_beyond_2_31_elements() -> None:
    """D52: int8, so that 2 GiB hold that many slots; memory that is not touched takes no room."""
    slot = 2**31 + 5
    cache = torch.empty(2**23 + 1, 256, 1, 1, dtype=torch.int8)
    cache.view(-1)[[5, slot]] = 1
    token = torch.full((1, 1, 1), 7, dtype=torch.int8)
    store_kvcache(token, token, cache, cache, torch.tensor([slot]))
    assert cache.view(-1)[[5, slot]].tolist() == [1, 7]


def test_slots_beyond_2_31() -> None:
    """D52: block tables are int32, their slots are not."""
    slots = torch_attention._slots(torch.tensor([[2**30]], dtype=torch.int32), torch.tensor([[3]]), 256)
    assert slots.tolist() == [[2**38 + 3]]
