"""How many parts paged_attention splits the keys of a sequence into. test_kernels.py tests the kernel."""

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize("num_seqs", [1, 2, 3, 8, 33, 64, 256, 512])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 8])
@pytest.mark.parametrize("max_context_len", [16, 4096, 131072])
def test_splits_fill_the_gpu_once(num_seqs, num_kv_heads, max_context_len):
    """At most 2 programs a multiprocessor, and more would be too many or have no keys, or the keys are not split."""
    from nanovllm.kernels.paged_attention import choose_num_splits

    splits = choose_num_splits(num_seqs, num_kv_heads, max_context_len, 132)
    programs = num_seqs * num_kv_heads
    assert splits == 1 or programs * splits <= 264
    assert programs * (splits + 1) > 264 or splits * 32 >= max_context_len
