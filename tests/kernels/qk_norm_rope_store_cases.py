"""Cases of qk_norm_rope_store against the references of what it fuses. D52"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from hypothesis import strategies as st
from torch.nn import functional

from benchmarks.arithmetic import Work
from benchmarks.kernels.inputs import randn
from benchmarks.measuring import Measured
from benchmarks.shapes import Shape
from nanovllm.layers.torch_ops import apply_rotary_embedding
from reference.rms_norm import rms_norm
from reference.store_kvcache import store_kvcache
from tests.kernels.rotary_embedding_cases import angles, tables, turn
from tests.support.kernels.accuracy import (
    assert_rounded_alike,
    assert_same_bits,
    assert_within_twice_the_error_of_plain_torch,
)
from tests.support.kernels.guards import Guards
from tests.support.kernels.registry import Compilation, Kernel, Limits, Refusals, Steps, lazy, meta

qk_norm_rope_store = lazy("qk_norm_rope_store.qk_norm_rope_store")
rms_norm_kernel = lazy("rms_norm.rms_norm")
rotary_embedding_kernel = lazy("rotary_embedding.rotary_embedding")
store_kvcache_kernel = lazy("store_kvcache.store_kvcache")
HEAD_AXES = ("token", "head", "dimension")
CACHE_AXES = ("block", "slot", "head", "dimension")

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

    def assert_close(actual: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, axes: tuple[str, ...]) -> None:
        assert_within_twice_the_error_of_plain_torch("qk_norm_rope_store", actual, plain, exact, axes)

    plain, exact = (head_of(case, query.to(dtype), q_weight, cos, sin) for dtype in (case.dtype, torch.float64))
    assert_close(rotated_query, plain, exact, HEAD_AXES)
    assert (rotated_key is not None) == case.returns_key
    if rotated_key is not None:
        assert_close(rotated_key, plain_key, exact_key, HEAD_AXES)
    if not case.has_cache:
        assert k_cache.isnan().all()
        assert v_cache.isnan().all()
        return
    assert_same_bits("qk_norm_rope_store", v_cache, expected_v_cache, CACHE_AXES)
    is_empty = plain_k_cache.isnan()
    assert torch.equal(k_cache.isnan(), is_empty), "a slot that no token has was written, or one was left out"
    assert_close(*(cache.masked_fill(is_empty, 0) for cache in (k_cache, plain_k_cache, exact_k_cache)), CACHE_AXES)


def check_rounding(device: str) -> None:
    """Rounds where the kernels that it stands for round: rms_norm, then rotary_embedding."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(6, 8, 32, generator=generator).to(device, torch.float16)
    q_weight, k_weight = ((1 + 0.3 * torch.randn(32, generator=generator)).to(device, torch.float16) for _ in "qk")
    cos, sin = (table.to(device) for table in tables(6, 32))
    weights = (q_weight, k_weight)
    fused = qk_norm_rope_store(
        qkv.flatten(1), cos, sin, *weights, EPS, 4, None, None, None, num_kv_heads=2, returns_key=True
    )
    query, key = rms_norm_kernel(qkv[:, :4], q_weight, EPS), rms_norm_kernel(qkv[:, 4:6], k_weight, EPS)
    for actual, expected in zip(fused, rotary_embedding_kernel(query, key, cos, sin), strict=True):
        assert_rounded_alike(actual, expected)


def check_far_slot(device: str) -> None:
    """D52: a slot whose elements lie beyond 2**31, from an int32 mapping; one cache for both, in which all is equal."""
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
REAL = {
    "qwen3-0.6b": Case(16, 8, 128),
    "llama-3-8b": Case(32, 8, 128, has_norm=False),
    "qwen2.5-0.5b": Case(14, 2, 64, has_norm=False),
    "qwen3-30b-a3b": Case(32, 4, 128),
    "head size 256": Case(16, 8, 256),
    "head size 80": Case(8, 8, 80),
}
MIXED_SLOTS = tuple(slot if slot % 5 else -1 for slot in torch.randperm(48, generator=torch.Generator()).tolist())


def launch(case: Case, num_tokens: int, dtype: torch.dtype, returns_key: bool) -> None:
    """On meta tensors. With the key as in prefill, where nothing is cached yet; without it as in decode."""
    dim, heads = case.head_dim, case.num_kv_heads
    table = meta(num_tokens, dim // 2, dtype=torch.float32)
    weights = (meta(dim, dtype=dtype), meta(dim, dtype=dtype)) if case.has_norm else (None, None)
    cache, slots = meta(100, 256, heads, dim, dtype=dtype), meta(num_tokens, dtype=torch.int64)
    inputs = (meta(num_tokens, (case.num_heads + 2 * heads) * dim, dtype=dtype), table, table, *weights, 1e-6)
    qk_norm_rope_store(*inputs, case.num_heads, cache, cache, slots, num_kv_heads=heads, returns_key=returns_key)


def valid_inputs() -> dict[str, object]:
    inputs: dict[str, object] = {name: torch.empty(3, 8) for name in ("cos", "sin")}
    inputs |= {name: torch.empty(16) for name in ("q_weight", "k_weight")}
    inputs |= {name: torch.empty(2, 16, 2, 16) for name in ("k_cache", "v_cache")}
    inputs |= {"qkv": torch.empty(3, 128), "slot_mapping": torch.zeros(3, dtype=torch.int64)}
    return inputs | {"eps": 1e-6, "num_heads": 4, "num_kv_heads": 2}


def measured(shape: Shape, num_tokens: int) -> Measured:
    """Beside plain PyTorch, the three kernels that it fuses, one after the other."""
    num_heads, num_kv_heads, head_dim = shape[:3]
    block_size = 256
    num_blocks = 1 + num_tokens // block_size
    num_bytes = num_tokens * (num_heads + 2 * num_kv_heads) * head_dim * 2

    def make(index: int) -> tuple[torch.Tensor | None, ...]:
        weights = randn(index, 2, head_dim) if shape.has_head_norm else (None, None)
        generator = torch.Generator().manual_seed(index)
        slots = torch.randperm(num_blocks * block_size, generator=generator)[:num_tokens].cuda()
        return (
            randn(index, num_tokens, (num_heads + 2 * num_kv_heads) * head_dim),
            *angles(index, num_tokens, head_dim),
            *weights,
            *randn(index, 2, num_blocks, block_size, num_kv_heads, head_dim),
            slots,
        )

    def run(qkv, cos, sin, q_weight, k_weight, k_cache, v_cache, slots):
        arguments = (qkv, cos, sin, q_weight, k_weight, EPS, num_heads, k_cache, v_cache, slots)
        query, _ = qk_norm_rope_store(*arguments, num_kv_heads=num_kv_heads)
        return query, k_cache, v_cache

    def split(qkv):
        return qkv.unflatten(1, (-1, head_dim)).split([num_heads, num_kv_heads, num_kv_heads], dim=1)

    def apart(qkv, cos, sin, q_weight, k_weight, k_cache, v_cache, slots):
        query, key, value = split(qkv)
        if shape.has_head_norm:
            query, key = rms_norm_kernel(query, q_weight, EPS), rms_norm_kernel(key, k_weight, EPS)
        query, key = rotary_embedding_kernel(query, key, cos, sin)
        store_kvcache_kernel(key, value, k_cache, v_cache, slots)
        return query, k_cache, v_cache

    def plain(qkv, cos, sin, q_weight, k_weight, k_cache, v_cache, slots, wide=torch.float32):
        query, key, value = split(qkv)
        query, key = query.to(wide), key.to(wide)
        if shape.has_head_norm:
            query = functional.rms_norm(query, (head_dim,), q_weight.to(wide), EPS)
            key = functional.rms_norm(key, (head_dim,), k_weight.to(wide), EPS)
        k_cache.flatten(0, 1)[slots] = turn(key, cos, sin).to(k_cache.dtype)
        v_cache.flatten(0, 1)[slots] = value.to(v_cache.dtype)
        return turn(query, cos, sin).to(k_cache.dtype), k_cache, v_cache

    def expected(qkv, cos, sin, q_weight, k_weight, k_cache, v_cache, slots):
        caches = k_cache.double(), v_cache.double()
        return plain(qkv, cos, sin, q_weight, k_weight, *caches, slots, wide=torch.float64)

    # queries, keys and values in; queries out, keys and values out to the cache; cosines and sines in
    work = Work(num_bytes + num_tokens * head_dim * 4, num_bytes)
    return Measured(make=make, run=run, expected=expected, work=work, peers={"torch": plain, "apart": apart})


KERNEL = Kernel(
    name="qk_norm_rope_store",
    # ptxas may keep two values in memory so that another block fits on a multiprocessor.
    launched={"qk_norm_rope_store_kernel": Limits(max_registers=128, max_shared_bytes=8192, max_stack_bytes=16)},
    cases={name: partial(check_case, case) for name, case in CASES.items()}
    | {"rounding": check_rounding, "far slot": check_far_slot},
    on_gpu={
        f"{name} {str(dtype)[6:]}": partial(check_case, replace(case, dtype=dtype, slots=MIXED_SLOTS))
        for name, case in REAL.items()
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    },
    drawn=st.builds(
        lambda heads, dim, slots, dtype, has_norm, returns_key: partial(
            check_case, Case(*heads, dim, tuple(slots), dtype, has_norm=has_norm, returns_key=returns_key)
        ),
        st.sampled_from([(1, 1), (3, 1), (14, 2), (6, 3)]),
        st.sampled_from([2, 32, 80]),
        st.lists(st.integers(0, 47), unique=True, max_size=48),
        st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
        st.booleans(),
        st.booleans(),
    ),
    compiled={
        f"{name}, {n} tokens": Compilation(lambda dtype, _, case=case, n=n: launch(case, n, dtype, returns_key=n > 9))
        for name, case in REAL.items()
        for n in (9, 9000)
    },
    refused=Refusals(
        qk_norm_rope_store,
        valid_inputs,
        (
            ({"qkv": torch.empty(3, 127)}, r"qkv must be \[T, 128\]"),
            ({"qkv": torch.empty(3, 128, dtype=torch.float64)}, r"qkv must be \[T, 128\]"),
            ({"cos": torch.empty(2, 8)}, "cos must be"),
            ({"sin": torch.empty(3, 8, dtype=torch.float16)}, "sin must be"),
            ({"q_weight": None}, "given together"),
            ({"k_weight": torch.empty(8)}, "k_weight must be"),
            ({"k_cache": torch.empty(2, 16, 4, 8)}, "k_cache must be"),
            ({"v_cache": torch.empty(2, 16, 2, 16, dtype=torch.float16)}, "v_cache must be"),
            ({"v_cache": None}, "given together"),
            ({"slot_mapping": torch.empty(2, dtype=torch.int64)}, r"slot_mapping must be \[3\]"),
        ),
    ),
    steps={
        # few tokens and many
        "decode": Steps(lambda n: launch(REAL["qwen3-0.6b"], n, torch.bfloat16, False), 2, met_at_start=True),
        "prefill": Steps(lambda n: launch(REAL["qwen3-0.6b"], n, torch.bfloat16, True), None, met_at_start=True),
    },
    measured={"qk_norm_rope_store": measured},
)
