"""Storing new keys and values in the paged cache."""

import pytest
import torch

from benchmarks import arithmetic
from benchmarks.kernels.inputs import randn
from benchmarks.shapes import NUM_TOKENS, SHAPES

BLOCK_SIZE = 256


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("shape", SHAPES)
def test_store_kvcache(measure, shape, num_tokens):
    from nanovllm.kernels.store_kvcache import store_kvcache

    num_heads, num_kv_heads, head_dim = SHAPES[shape][:3]
    num_blocks = 1 + num_tokens // BLOCK_SIZE

    def make(index: int) -> tuple[torch.Tensor, ...]:
        qkv = randn(index, num_tokens, num_heads + 2 * num_kv_heads, head_dim)
        _, key, value = qkv.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        k_cache, v_cache = randn(index, 2, num_blocks, BLOCK_SIZE, num_kv_heads, head_dim)
        generator = torch.Generator().manual_seed(index)
        if num_tokens > 256:  # prefill: whole blocks, which lie anywhere
            blocks = torch.randperm(num_blocks, generator=generator)[: num_tokens // BLOCK_SIZE]
            slots = (blocks[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)).flatten()
        else:  # decode: one slot here, one there
            slots = torch.randperm(num_blocks * BLOCK_SIZE, generator=generator)[:num_tokens]
        return key, value, k_cache, v_cache, slots.cuda()

    def run(key, value, k_cache, v_cache, slot_mapping):
        store_kvcache(key, value, k_cache, v_cache, slot_mapping)
        return k_cache, v_cache

    def plain(key, value, k_cache, v_cache, slot_mapping):
        k_cache.flatten(0, 1)[slot_mapping] = key
        v_cache.flatten(0, 1)[slot_mapping] = value
        return k_cache, v_cache

    def expected(key, value, k_cache, v_cache, slot_mapping):
        return plain(key, value, k_cache.clone(), v_cache.clone(), slot_mapping)

    measure(
        "store_kvcache",
        f"{shape}, {num_tokens} tokens",
        make=make,
        run=run,
        expected=expected,
        work=arithmetic.store_kvcache(num_tokens, num_kv_heads, head_dim),
        peers={"torch": plain},
        tolerance=0.0,
    )
