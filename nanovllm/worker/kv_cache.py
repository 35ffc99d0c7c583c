"""How many KV blocks fit in memory: pure arithmetic on bytes."""

CPU_KV_CACHE_SHARE = 0.25  # of the memory that is available when the engine starts, unless num_kv_cache_blocks is set


def block_bytes(num_layers: int, block_size: int, num_kv_heads: int, head_dim: int, itemsize: int) -> int:
    """Bytes of one block: keys and values of block_size tokens in every layer."""
    return 2 * num_layers * block_size * num_kv_heads * head_dim * itemsize


def num_blocks_that_fit(
    total: int, utilization: float, used: int, peak: int, current: int, bytes_per_block: int
) -> int:
    """Blocks that fit on a GPU; all sizes in bytes.

    total: the GPU's memory; used: what is taken now, by other processes too; current: what this process's tensors
    take now; peak: what they took at most in warm-up. So peak - current is what a step needs on top.
    Raises ValueError when not even one fits.
    """
    num_free_bytes = int(total * utilization) - used - (peak - current)
    num_blocks = num_free_bytes // bytes_per_block
    if num_blocks < 1:
        gib = 2**30
        raise ValueError(
            f"gpu_memory_utilization must leave room for at least one KV block of {bytes_per_block / gib:.3f} GiB, got "
            f"{utilization} of {total / gib:.2f} GiB: {used / gib:.2f} GiB are in use (other processes included) and a "
            f"step needs {(peak - current) / gib:.2f} GiB more; raise it, free the GPU, or lower "
            "max_num_batched_tokens, max_num_seqs or max_model_len"
        )
    return num_blocks


def num_blocks_on_cpu(available: int, bytes_per_block: int, max_num_seqs: int, max_blocks_per_seq: int) -> int:
    """Blocks that fit in CPU_KV_CACHE_SHARE of `available` bytes, but no more than all sequences can use.

    Raises ValueError when not even one fits.
    """
    num_blocks = min(int(available * CPU_KV_CACHE_SHARE) // bytes_per_block, max_num_seqs * max_blocks_per_seq)
    if num_blocks < 1:
        raise ValueError(
            f"a KV block of {bytes_per_block} bytes must fit in {CPU_KV_CACHE_SHARE:.0%} of the available memory, "
            f"got {available} bytes; free memory, lower kv_cache_block_size or set num_kv_cache_blocks"
        )
    return num_blocks
