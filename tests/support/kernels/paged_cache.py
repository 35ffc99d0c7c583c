"""A paged KV cache for the cases of attention kernels: what no sequence owns is NaN, and padding names no block."""

import math

import torch

NO_BLOCK = 2**30  # fills the block tables: a kernel that follows it leaves the cache by far


def poisoned_caches(
    lengths: list[int], block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, seed: int, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(k_cache, v_cache, block_tables) of sequences of `lengths` keys, which are random.

    D53: every slot that no sequence owns is NaN. There are two blocks more than are used.
    """
    generator = torch.Generator().manual_seed(seed)
    num_blocks = [-(-length // block_size) for length in lengths]
    block_ids = torch.randperm(sum(num_blocks) + 2, generator=generator)
    block_tables = torch.full((len(lengths), max(num_blocks, default=0) + 1), NO_BLOCK, dtype=torch.int32)
    is_owned = torch.zeros(len(block_ids), block_size, dtype=torch.bool)
    for table, ids, length in zip(block_tables, block_ids.split([*num_blocks, 2]), lengths, strict=False):
        table[: len(ids)] = ids
        position = torch.arange(length)
        is_owned[ids[position // block_size], position % block_size] = True
    is_free = ~is_owned.to(device)[:, :, None, None]
    shape = (*is_owned.shape, num_kv_heads, head_dim)
    # Small caches are drawn on the CPU, so that a case is the same on every device; large ones where that is fast.
    drawn_on = "cpu" if math.prod(shape) < 2**20 else device
    value_generator = torch.Generator(drawn_on).manual_seed(seed)
    k_cache, v_cache = (
        torch.randn(shape, generator=value_generator, device=drawn_on)
        .to(device, dtype)
        .masked_fill_(is_free, torch.nan)
        for _ in range(2)
    )
    return k_cache, v_cache, block_tables.to(device)
