"""Computes the number of KV blocks that fit in memory, and allocates the KV cache."""

import math

import psutil
import torch

CPU_KV_CACHE_SHARE = 0.25  # fraction of the memory that is available when the engine starts


def num_blocks_that_fit(total: int, utilization: float, used: int, step_bytes: int, bytes_per_block: int) -> int:
    """The number of blocks that fit on a GPU. All sizes are in bytes.

    total: the GPU's memory. used: memory in use now, other processes included. step_bytes: what a step needs more.
    Raises ValueError if not even one block fits.
    """
    num_free_bytes = int(total * utilization) - used - step_bytes
    num_blocks = num_free_bytes // bytes_per_block
    if num_blocks < 1:
        gib = 2**30
        needed = -(-1000 * (used + step_bytes + bytes_per_block) // total) / 1000  # rounded up
        higher = f"set it to at least {needed}, " if needed <= 1 else ""
        raise ValueError(
            f"gpu_memory_utilization must leave room for at least one KV block of {bytes_per_block / gib:.3f} GiB, got "
            f"{utilization} of {total / gib:.2f} GiB: {used / gib:.2f} GiB are in use (other processes included) and a "
            f"step needs {step_bytes / gib:.2f} GiB more; {higher}free the GPU, or lower "
            "max_num_batched_tokens, max_num_seqs or max_model_len"
        )
    return num_blocks


def num_blocks_on_cpu(available: int, bytes_per_block: int, max_num_seqs: int, max_blocks_per_seq: int) -> int:
    """The number of blocks that fit in CPU_KV_CACHE_SHARE of `available` bytes, or that all sequences can use, if less.

    Raises ValueError if not even one block fits.
    """
    num_blocks = min(int(available * CPU_KV_CACHE_SHARE) // bytes_per_block, max_num_seqs * max_blocks_per_seq)
    if num_blocks < 1:
        raise ValueError(
            f"a KV block of {bytes_per_block} bytes must fit in {CPU_KV_CACHE_SHARE:.0%} of the available memory, "
            f"got {available} bytes; free memory, or set num_kv_cache_blocks to use more of it"
        )
    return num_blocks


def empty_cache(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, is_given: bool) -> torch.Tensor:
    """An uninitialised tensor of `shape` for ModelRunner.kv_cache.

    is_given: whether the user has set the number of blocks. Raises ValueError if the device's memory cannot hold it.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    try:
        if device.type == "cpu" and num_bytes > psutil.virtual_memory().total:
            raise MemoryError  # Linux would overcommit, and kill the process when it writes to the cache
        return torch.empty(shape, dtype=dtype, device=device)
    except (RuntimeError, MemoryError) as error:  # torch raises a RuntimeError when memory is exhausted
        remedy = "lower it, or leave it out to size the cache from free memory" if is_given else "set it to fewer"
        raise ValueError(
            f"num_kv_cache_blocks must fit in the memory of {device}, got {shape[2]}, which take "
            f"{num_bytes / 2**30:.4g} GiB; {remedy}"
        ) from error
