"""Everything between qkv_proj and attention in one launch, beside the kernels that do it one after the other."""

import pytest
import torch
from torch.nn import functional

from benchmarks import arithmetic
from benchmarks.kernels.inputs import randn
from benchmarks.kernels.test_bench_rotary_embedding import angles, turn
from benchmarks.shapes import NUM_TOKENS, SHAPES

EPS = 1e-6
BLOCK_SIZE = 256


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("shape", SHAPES)
def test_qk_norm_rope_store(measure, shape, num_tokens):
    from nanovllm.kernels.qk_norm_rope_store import qk_norm_rope_store
    from nanovllm.kernels.rms_norm import rms_norm
    from nanovllm.kernels.rotary_embedding import rotary_embedding
    from nanovllm.kernels.store_kvcache import store_kvcache

    num_heads, num_kv_heads, head_dim = SHAPES[shape][:3]
    has_norm = shape.startswith("qwen3-")
    num_blocks = 1 + num_tokens // BLOCK_SIZE

    def make(index: int) -> tuple[torch.Tensor | None, ...]:
        weights = randn(index, 2, head_dim) if has_norm else (None, None)
        generator = torch.Generator().manual_seed(index)
        slots = torch.randperm(num_blocks * BLOCK_SIZE, generator=generator)[:num_tokens].cuda()
        return (
            randn(index, num_tokens, (num_heads + 2 * num_kv_heads) * head_dim),
            *angles(index, num_tokens, head_dim),
            *weights,
            *randn(index, 2, num_blocks, BLOCK_SIZE, num_kv_heads, head_dim),
            slots,
        )

    def run(qkv, cos, sin, q_weight, k_weight, k_cache, v_cache, slots):
        arguments = (qkv, cos, sin, q_weight, k_weight, EPS, num_heads, k_cache, v_cache, slots)
        query, _ = qk_norm_rope_store(*arguments, num_kv_heads=num_kv_heads)
        return query, k_cache, v_cache

    def split(qkv):
        heads = qkv.unflatten(1, (-1, head_dim))
        return heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)

    def apart(qkv, cos, sin, q_weight, k_weight, k_cache, v_cache, slots):
        query, key, value = split(qkv)
        if has_norm:
            query, key = rms_norm(query, q_weight, EPS), rms_norm(key, k_weight, EPS)
        query, key = rotary_embedding(query, key, cos, sin)
        store_kvcache(key, value, k_cache, v_cache, slots)
        return query, k_cache, v_cache

    def plain(qkv, cos, sin, q_weight, k_weight, k_cache, v_cache, slots, wide=torch.float32):
        query, key, value = split(qkv)
        query, key = query.to(wide), key.to(wide)
        if has_norm:
            query = functional.rms_norm(query, (head_dim,), q_weight.to(wide), EPS)
            key = functional.rms_norm(key, (head_dim,), k_weight.to(wide), EPS)
        k_cache.flatten(0, 1)[slots] = turn(key, cos, sin).to(k_cache.dtype)
        v_cache.flatten(0, 1)[slots] = value.to(v_cache.dtype)
        return turn(query, cos, sin).to(k_cache.dtype), k_cache, v_cache

    def expected(qkv, cos, sin, q_weight, k_weight, k_cache, v_cache, slots):
        caches = k_cache.double(), v_cache.double()
        return plain(qkv, cos, sin, q_weight, k_weight, *caches, slots, wide=torch.float64)

    measure(
        "qk_norm_rope_store",
        f"{shape}, {num_tokens} tokens",
        make=make,
        run=run,
        expected=expected,
        work=arithmetic.qk_norm_rope_store(num_tokens, num_heads, num_kv_heads, head_dim),
        peers={"torch": plain, "apart": apart},
    )
