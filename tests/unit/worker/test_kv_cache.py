"""kv_cache: the sizes by hand, and the errors when not even one block fits."""

import pytest

from nanovllm.worker.kv_cache import block_bytes, num_blocks_on_cpu, num_blocks_that_fit

GIB = 2**30


def test_a_block_of_qwen3_0_6b_takes_28_mib() -> None:
    """Keys and values, 28 layers, 256 tokens, 8 heads of 128, 2 bytes each."""
    assert block_bytes(num_layers=28, block_size=256, num_kv_heads=8, head_dim=128, itemsize=2) == 28 * 2**20


def test_a_block_by_hand() -> None:
    assert block_bytes(num_layers=3, block_size=5, num_kv_heads=7, head_dim=11, itemsize=4) == 2 * 3 * 5 * 7 * 11 * 4


def test_what_fits_is_the_share_less_what_is_used_less_what_a_step_needs_on_top() -> None:
    """(1000 * 0.9 - 300 - (250 - 200)) / 10 = 55, and 559 bytes hold no more blocks than 550."""
    sizes = {"total": 1000, "utilization": 0.9, "peak": 250, "current": 200, "bytes_per_block": 10}
    assert num_blocks_that_fit(used=300, **sizes) == 55
    assert num_blocks_that_fit(used=291, **sizes) == 55
    assert num_blocks_that_fit(used=290, **sizes) == 56


def test_one_block_may_be_all_that_fits() -> None:
    sizes = {"total": 100, "utilization": 1.0, "peak": 0, "current": 0, "bytes_per_block": 10}
    assert num_blocks_that_fit(used=90, **sizes) == 1
    with pytest.raises(ValueError, match="gpu_memory_utilization"):
        num_blocks_that_fit(used=91, **sizes)


def test_memory_of_another_process_is_an_error_with_the_figures() -> None:
    """D43: 80 GiB at 0.9 with 75 GiB taken is less than nothing."""
    with pytest.raises(
        ValueError, match=r"^gpu_memory_utilization must leave room for at least one KV block"
    ) as caught:
        num_blocks_that_fit(80 * GIB, 0.9, used=75 * GIB, peak=6 * GIB, current=4 * GIB, bytes_per_block=GIB // 2)
    message = str(caught.value)
    for figure in ("0.500 GiB", "got 0.9 of 80.00 GiB", "75.00 GiB are in use (other processes", "needs 2.00 GiB more"):
        assert figure in message
    assert "GiB more; set it to at least 0.969, free the GPU, or lower max_num_batched_tokens" in message


@pytest.mark.parametrize(
    ("available", "max_num_seqs", "max_blocks_per_seq", "num_blocks"),
    [(4000, 512, 16, 100), (4039, 512, 16, 100), (4040, 512, 16, 101), (4000, 3, 4, 12), (40, 512, 16, 1)],
)
def test_a_quarter_of_memory_but_no_more_than_all_sequences_can_use(
    available: int, max_num_seqs: int, max_blocks_per_seq: int, num_blocks: int
) -> None:
    assert num_blocks_on_cpu(available, 10, max_num_seqs, max_blocks_per_seq) == num_blocks


def test_too_little_memory_on_the_cpu_is_an_error_with_the_figures() -> None:
    """D43."""
    with pytest.raises(ValueError, match=r"a KV block of 10 bytes must fit in 25% of .* got 39 bytes; free memory"):
        num_blocks_on_cpu(39, 10, 4, 4)
