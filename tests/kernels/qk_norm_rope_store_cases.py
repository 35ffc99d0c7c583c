"""Cases of qk_norm_rope_store for a device: see tests/support/kernels/interpreting.py."""

from dataclasses import dataclass, replace
from functools import partial

import torch

from nanovllm.layers.rotary_embedding import apply_rotary_embedding
from reference.rms_norm import rms_norm
from reference.store_kvcache import store_kvcache
from tests.attention_cases import assert_same_bits
from tests.kernels.rotary_embedding_cases import tables
from tests.support.kernels.accuracy import assert_rounded_alike, assert_within_twice_the_error_of_plain_torch, counted
from tests.support.kernels.interpreting import Guards

EPS = 1e-5


@dataclass(frozen=True)
class Case:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    slots: tuple[int, ...] = (7, -1, 0, 39, 16, -1, 15)
    dtype: torch.dtype = torch.float32
    slot_dtype: torch.dtype = torch.int64
    has_norm: bool = True
    has_cache: bool = True
    returns_key: bool = True


def head_of(case: Case, x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The reference of what is done to query and key, in x's dtype."""
    normed = rms_norm(x, weight.to(x.dtype), EPS) if case.has_norm else x
    assert isinstance(normed, torch.Tensor)
    return apply_rotary_embedding(normed, cos.to(torch.promote_types(x.dtype, torch.float32)), sin)


def check_case(case: Case, device: str) -> None:
    """Query, key and keys in the cache within the bound; values in the cache and all other slots to the bit."""
    from nanovllm.kernels.qk_norm_rope_store import qk_norm_rope_store

    guards, generator = Guards(device), torch.Generator().manual_seed(0)
    num_tokens, heads, dim = len(case.slots), case.num_kv_heads, case.head_dim
    width = (case.num_heads + 2 * heads) * dim
    qkv = guards.read(torch.randn(num_tokens, width + 8, generator=generator).to(case.dtype))[:, :width]
    query, key, value = qkv.unflatten(1, (-1, dim)).split([case.num_heads, heads, heads], dim=1)
    q_weight, k_weight = (guards.read((1 + 0.3 * torch.randn(dim, generator=generator)).to(case.dtype)) for _ in "qk")
    cos, sin = (guards.read(table) for table in tables(num_tokens, dim))
    slot_mapping = guards.read(torch.tensor(case.slots, dtype=case.slot_dtype))
    k_cache, v_cache = (guards.unwritten(3, 16, heads, dim, dtype=case.dtype) for _ in "kv")
    store = (k_cache, v_cache, slot_mapping) if case.has_cache else (None, None, None)
    plain_key, exact_key = (head_of(case, key.to(dtype), k_weight, cos, sin) for dtype in (case.dtype, torch.float64))
    exact_k_cache, expected_v_cache = store_kvcache(exact_key, value, k_cache.double(), v_cache, slot_mapping)
    plain_k_cache, _ = store_kvcache(plain_key, value, k_cache, v_cache, slot_mapping)
    with guards:
        rotated_query, rotated_key = qk_norm_rope_store(
            qkv,
            cos,
            sin,
            q_weight if case.has_norm else None,
            k_weight if case.has_norm else None,
            EPS,
            case.num_heads,
            *store,
            num_kv_heads=heads,
            returns_key=case.returns_key,
        )
    guards.assert_intact()
    plain, exact = (head_of(case, query.to(dtype), q_weight, cos, sin) for dtype in (case.dtype, torch.float64))
    assert_within_twice_the_error_of_plain_torch("qk_norm_rope_store", rotated_query, plain, exact)
    assert (rotated_key is not None) == case.returns_key
    if rotated_key is not None:
        assert_within_twice_the_error_of_plain_torch("qk_norm_rope_store", rotated_key, plain_key, exact_key)
    if not case.has_cache:
        assert k_cache.isnan().all()
        assert v_cache.isnan().all()
        return
    assert_same_bits(v_cache, expected_v_cache)
    counted("qk_norm_rope_store", v_cache)
    assert torch.equal(k_cache.isnan(), plain_k_cache.isnan()), "a slot that is nobody's was written, or one left out"
    actual, plain, exact = (cache[~plain_k_cache.isnan()] for cache in (k_cache, plain_k_cache, exact_k_cache))
    assert_within_twice_the_error_of_plain_torch("qk_norm_rope_store", actual, plain, exact)


def check_rounding(device: str) -> None:
    """Rounds where the kernels that it stands for round: rms_norm, then rotary_embedding."""
    from nanovllm.kernels.qk_norm_rope_store import qk_norm_rope_store
    from nanovllm.kernels.rms_norm import rms_norm
    from nanovllm.kernels.rotary_embedding import rotary_embedding

    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(6, 8, 32, generator=generator).to(device, torch.float16)
    q_weight, k_weight = ((1 + 0.3 * torch.randn(32, generator=generator)).to(device, torch.float16) for _ in "qk")
    cos, sin = (table.to(device) for table in tables(6, 32))
    weights = (q_weight, k_weight)
    fused = qk_norm_rope_store(
        qkv.flatten(1), cos, sin, *weights, EPS, 4, None, None, None, num_kv_heads=2, returns_key=True
    )
    query, key = rms_norm(qkv[:, :4], q_weight, EPS), rms_norm(qkv[:, 4:6], k_weight, EPS)
    for actual, expected in zip(fused, rotary_embedding(query, key, cos, sin), strict=True):
        assert_rounded_alike(actual, expected)


def check_far_slot(device: str) -> None:
    """D52: a slot whose elements lie beyond 2**31, from an int32 mapping; one cache for both, in which all is equal."""
    from nanovllm.kernels.qk_norm_rope_store import qk_norm_rope_store

    heads, dim = 4, 64
    num_slots = 2**31 // (heads * dim) + 256
    cache = torch.empty(num_slots // 256, 256, heads, dim, dtype=torch.float16, device=device)
    rows = cache.view(num_slots, heads, dim)
    rows[-1] = 1
    qkv = torch.full((1, 3 * heads * dim), 7.0, dtype=torch.float16, device=device)
    cos, sin = torch.ones(1, dim // 2, device=device), torch.zeros(1, dim // 2, device=device)
    slots = torch.tensor([num_slots - 1], dtype=torch.int32, device=device)
    qk_norm_rope_store(qkv, cos, sin, None, None, EPS, heads, cache, cache, slots, num_kv_heads=heads)
    assert (rows[-1] == 7).all()


SMALL = Case(4, 2, 16)
CASES = {
    "4 / 2 heads of 16": SMALL,
    "heads that are no power of two": Case(6, 3, 24),
    "14 / 2 heads of 64, as qwen2.5": Case(14, 2, 64, slots=(3, -1, 4), has_norm=False),
    "one head of 2": Case(1, 1, 2),
    "odd half": Case(3, 1, 18),
    "float16": replace(SMALL, dtype=torch.float16),
    "float16, no norm": replace(SMALL, dtype=torch.float16, has_norm=False),
    "int32 slots": replace(SMALL, slot_dtype=torch.int32),
    "no key": replace(SMALL, returns_key=False),
    "no cache": replace(SMALL, has_cache=False),
    "nothing to store": replace(SMALL, slots=(-1, -1)),
    "no tokens": replace(SMALL, slots=()),
    "every slot": replace(SMALL, slots=tuple(reversed(range(48)))),
}
CHECKS = {name: partial(check_case, case) for name, case in CASES.items()} | {
    "rounding": check_rounding,
    "far slot": check_far_slot,
}
