"""What is measured of qk_norm_rope_store, beside the kernels that it fuses."""

import torch
from torch.nn import functional

from benchmarks.arithmetic import Work
from benchmarks.kernels.inputs import randn
from benchmarks.kernels.rotary_embedding import angles, turn
from benchmarks.measuring import Measured
from benchmarks.shapes import Shape
from tests.support.kernels.registry import lazy

qk_norm_rope_store = lazy("qk_norm_rope_store.qk_norm_rope_store")
rms_norm_kernel = lazy("rms_norm.rms_norm")
rotary_embedding_kernel = lazy("rotary_embedding.rotary_embedding")
store_kvcache_kernel = lazy("store_kvcache.store_kvcache")

EPS = 1e-5


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
