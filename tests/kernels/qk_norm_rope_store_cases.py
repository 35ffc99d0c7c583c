"""Cases of qk_norm_rope_store against the references of what it fuses. D52"""

from collections.abc import Sequence
from functools import partial

import torch
from hypothesis import strategies as st

from benchmarks.kernels.qk_norm_rope_store import measured
from nanovllm.layers.torch_ops import apply_rotary_embedding
from reference.rms_norm import rms_norm
from reference.store_kvcache import store_kvcache
from tests.kernels.rotary_embedding_cases import tables
from tests.support.kernels import accuracy
from tests.support.kernels.guards import Guards
from tests.support.kernels.registry import DTYPES, Compilation, Kernel, Limits, Refused, Steps, case, each, lazy, meta

qk_norm_rope_store = lazy("qk_norm_rope_store.qk_norm_rope_store")
rms_norm_kernel = lazy("rms_norm.rms_norm")
rotary_embedding_kernel = lazy("rotary_embedding.rotary_embedding")
HEAD_AXES = ("token", "head", "dimension")
CACHE_AXES = ("block", "slot", "head", "dimension")

EPS = 1e-5


def head_of(x: torch.Tensor, weight: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The reference of what is done to query and key, in x's dtype."""
    normed = x if weight is None else rms_norm(x, weight, EPS)
    assert isinstance(normed, torch.Tensor)
    return apply_rotary_embedding(normed, cos, sin)


@case
def check(
    device: str,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    slots: Sequence[int] = (7, -1, 0, 39, 16, -1, 15),
    dtype: torch.dtype = torch.float32,
    slot_dtype: torch.dtype = torch.int64,
    has_norm: bool = True,
    has_cache: bool = True,
    returns_key: bool = True,
) -> None:
    """Query, key and keys in the cache within the bound; values in the cache and all other slots to the bit."""
    guards, heads = Guards(device), [num_heads, num_kv_heads, num_kv_heads]
    width = sum(heads) * head_dim
    qkv = guards.randn(len(slots), width + 8, dtype=dtype)[:, :width]
    query, key, value = qkv.unflatten(1, (-1, head_dim)).split(heads, dim=1)
    weights = [guards.randn(head_dim, mean=1, std=0.3, dtype=dtype) if has_norm else None for _ in "qk"]
    cos, sin = (guards.read(table) for table in tables(len(slots), head_dim))
    slot_mapping = guards.read(torch.tensor(slots, dtype=slot_dtype))
    caches = [guards.unwritten(3, 16, num_kv_heads, head_dim, dtype=dtype) for _ in "kv"]
    empty = [cache.clone() for cache in caches]
    _, expected_v_cache = store_kvcache(key, value, *empty, slot_mapping)
    with guards:
        rotated_query, rotated_key = qk_norm_rope_store(
            qkv,
            cos,
            sin,
            *weights,
            EPS,
            num_heads,
            *(caches if has_cache else (None, None)),
            slot_mapping if has_cache else None,
            num_kv_heads=num_kv_heads,
            returns_key=returns_key,
        )

    def assert_like(actual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, reference, axes) -> None:
        accuracy.assert_like_reference("qk_norm_rope_store", actual, reference, (x, weight, cos, sin), axes)

    def keys_of_cache(x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        """The key cache as the reference stores it, 0 where nothing is stored."""
        turned = head_of(x, *others)
        return store_kvcache(turned, turned, *(torch.zeros_like(empty[0], dtype=x.dtype),) * 2, slot_mapping)[0]

    assert_like(rotated_query, query, weights[0], head_of, HEAD_AXES)
    assert (rotated_key is not None) == returns_key
    if rotated_key is not None:
        assert_like(rotated_key, key, weights[1], head_of, HEAD_AXES)
    if not has_cache:
        assert all(cache.isnan().all() for cache in caches)
        return
    accuracy.assert_same_bits("qk_norm_rope_store", caches[1], expected_v_cache, CACHE_AXES)
    is_empty = expected_v_cache.isnan()
    assert torch.equal(caches[0].isnan(), is_empty), "a slot that no token has was written, or one was left out"
    assert_like(caches[0].masked_fill(is_empty, 0), key, weights[1], keys_of_cache, CACHE_AXES)


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
        accuracy.assert_rounded_alike(actual, expected)


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


small = partial(check, 4, 2, 16)
CASES = {
    "4 / 2 heads of 16": small(),
    "heads that are no power of two": check(6, 3, 24),
    "14 / 2 heads of 64, as qwen2.5": check(14, 2, 64, slots=(3, -1, 4), has_norm=False),
    "one head of 2": check(1, 1, 2),
    "odd half": check(3, 1, 18),
    "float16": small(dtype=torch.float16),
    "int32 slots": small(slot_dtype=torch.int32),
    "no key": small(returns_key=False),
    "no cache": small(has_cache=False),
    "no tokens": small(slots=()),
    "rounding": check_rounding,
    "far slot": check_far_slot,
}
REAL = {  # heads, kv heads, head_dim, has_norm
    "qwen3-0.6b": (16, 8, 128, True),
    "llama-3-8b": (32, 8, 128, False),
    "qwen2.5-0.5b": (14, 2, 64, False),
    "qwen3-30b-a3b": (32, 4, 128, True),
    "head size 256": (16, 8, 256, True),
    "head size 80": (8, 8, 80, True),
}
MIXED_SLOTS = tuple(slot if slot % 5 else -1 for slot in torch.randperm(48, generator=torch.Generator()).tolist())


def launch(model: tuple[int, int, int, bool], num_tokens: int, dtype: torch.dtype, returns_key: bool) -> None:
    """On meta tensors. With the key as in prefill, where nothing is cached yet; without it as in decode."""
    num_heads, heads, dim, has_norm = model
    table = meta(num_tokens, dim // 2, dtype=torch.float32)
    weights = (meta(dim, dtype=dtype), meta(dim, dtype=dtype)) if has_norm else (None, None)
    cache, slots = meta(100, 256, heads, dim, dtype=dtype), meta(num_tokens, dtype=torch.int64)
    inputs = (meta(num_tokens, (num_heads + 2 * heads) * dim, dtype=dtype), table, table, *weights, 1e-6)
    qk_norm_rope_store(*inputs, num_heads, cache, cache, slots, num_kv_heads=heads, returns_key=returns_key)


def valid_inputs() -> dict[str, object]:
    inputs: dict[str, object] = {name: torch.empty(3, 8) for name in ("cos", "sin")}
    inputs |= {name: torch.empty(16) for name in ("q_weight", "k_weight")}
    inputs |= {name: torch.empty(2, 16, 2, 16) for name in ("k_cache", "v_cache")}
    inputs |= {"qkv": torch.empty(3, 128), "slot_mapping": torch.zeros(3, dtype=torch.int64)}
    return inputs | {"eps": 1e-6, "num_heads": 4, "num_kv_heads": 2}


KERNEL = Kernel(
    name="qk_norm_rope_store",
    # ptxas may keep two values in memory so that another block fits on a multiprocessor.
    launched={"qk_norm_rope_store_kernel": Limits(max_registers=128, max_shared_bytes=8192, max_stack_bytes=16)},
    cases=CASES,
    on_gpu=each(
        lambda model, dtype: check(*model[:3], MIXED_SLOTS, dtype, has_norm=model[3]), model=REAL, dtype=DTYPES
    ),
    drawn=st.builds(
        lambda heads, *others, **options: check(*heads, *others, **options),
        st.sampled_from([(1, 1), (3, 1), (14, 2), (6, 3)]),
        st.sampled_from([2, 32, 80]),
        st.lists(st.integers(0, 47), unique=True, max_size=48),
        st.sampled_from(DTYPES),
        has_norm=st.booleans(),
        returns_key=st.booleans(),
    ),
    compiled={
        f"{name}, {n} tokens": Compilation(
            lambda dtype, _, model=model, n=n: launch(model, n, dtype, returns_key=n > 9)
        )
        for name, model in REAL.items()
        for n in (9, 9000)
    },
    refused=Refused(
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
