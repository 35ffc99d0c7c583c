"""What varlen_attention_hopper takes. test_kernels.py tests the kernel."""

import pytest
import torch

pytest.importorskip("triton")


@pytest.mark.parametrize(
    ("change", "is_taken"),
    [
        (lambda key: key, True),
        (lambda key: key[3:], True),
        (lambda key: key.float(), False),
        (lambda key: key[..., ::2, :], False),  # heads apart
        (lambda key: key[:, :8], False),  # blocks further apart than their slots say
        (lambda key: key[:, :, :, :32], False),  # head size
        (lambda key: key[:0], False),
    ],
)
def test_what_it_takes(change, is_taken):
    from nanovllm.kernels.varlen_attention_hopper import takes

    key = change(torch.empty(8, 16, 4, 64, dtype=torch.float16))
    query = torch.empty(5, 8, key.shape[-1], dtype=key.dtype)
    assert takes(query, key, key) == is_taken


def test_it_takes_views_of_a_packed_qkv_at_multiples_of_16_bytes():
    from nanovllm.kernels.varlen_attention_hopper import takes

    query, key, value = torch.empty(5, 8, 64, dtype=torch.float16).split([4, 2, 2], dim=1)
    assert takes(query, key, value)
    odd = torch.empty(5 * 8 * 64 + 1, dtype=torch.float16)[1:].view(5, 8, 64)
    assert not takes(query, odd[:, :2], value)
