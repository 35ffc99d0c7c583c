"""What is measured of store_kvcache."""

import torch

from benchmarks.arithmetic import Work
from benchmarks.kernels.inputs import randn
from benchmarks.measuring import Measured
from benchmarks.shapes import Shape
from tests.support.kernels.registry import lazy

store_kvcache = lazy("store_kvcache.store_kvcache")


def measured(shape: Shape, num_tokens: int) -> Measured:
    num_heads, num_kv_heads, head_dim = shape[:3]
    block_size = 256
    num_blocks = 1 + num_tokens // block_size
    num_bytes = 2 * num_tokens * num_kv_heads * head_dim * 2

    def make(index: int) -> tuple[torch.Tensor, ...]:
        qkv = randn(index, num_tokens, num_heads + 2 * num_kv_heads, head_dim)
        _, key, value = qkv.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        k_cache, v_cache = randn(index, 2, num_blocks, block_size, num_kv_heads, head_dim)
        generator = torch.Generator().manual_seed(index)
        if num_tokens > 256:  # prefill: whole blocks, which lie anywhere
            blocks = torch.randperm(num_blocks, generator=generator)[: num_tokens // block_size]
            slots = (blocks[:, None] * block_size + torch.arange(block_size)).flatten()
        else:  # decode: one slot here, one there
            slots = torch.randperm(num_blocks * block_size, generator=generator)[:num_tokens]
        return key, value, k_cache, v_cache, slots.cuda()

    def run(key, value, k_cache, v_cache, slot_mapping):
        store_kvcache(key, value, k_cache, v_cache, slot_mapping)
        return k_cache, v_cache

    def plain(key, value, k_cache, v_cache, slot_mapping):
        k_cache.flatten(0, 1)[slot_mapping] = key
        v_cache.flatten(0, 1)[slot_mapping] = value
        return k_cache, v_cache

    return Measured(
        make=make,
        run=run,
        expected=lambda key, value, k, v, slots: plain(key, value, k.clone(), v.clone(), slots),
        work=Work(num_bytes, num_bytes),  # keys and values, read and written
        peers={"torch": plain},
        tolerance=0.0,
    )
