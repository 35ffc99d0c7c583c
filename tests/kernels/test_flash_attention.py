"""The flash_attn backend against reference.paged_attention, on a GPU."""

import pytest
import torch

from tests.support.attention_cases import Case, assert_within_the_error_of_plain_torch, make_step

STEPS = {
    "prefill": (((5, 5), (1, 1), (300, 300), (256, 256)), True),
    "prefill over cached keys": (((5, 21), (1, 256), (17, 17), (3, 600), (300, 512)), True),
    "decode": (((1, 1), (1, 2), (1, 256), (1, 257), (1, 1000)), False),
}


@pytest.mark.gpu
@pytest.mark.parametrize(("block_size", "is_fused"), [(256, False), (512, True)])
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [
        (torch.bfloat16, 32),
        (torch.bfloat16, 64),
        (torch.bfloat16, 128),
        (torch.float16, 64),
        (torch.float16, 128),
    ],
)
@pytest.mark.parametrize(("lengths", "is_prefill"), STEPS.values(), ids=STEPS)
def test_equals_the_reference(lengths, is_prefill, dtype, head_dim, num_kv_heads, block_size, is_fused):
    """D53: every slot that no sequence owns is NaN. With separate kernels to store, and with the fused one."""
    pytest.importorskip("flash_attn")
    from nanovllm.layers.select_ops import flash_attn_ops
    from nanovllm.layers.triton_ops import TRITON_OPS

    case = Case(lengths, is_prefill, block_size, num_heads=4, num_kv_heads=num_kv_heads, head_dim=head_dim)
    step = make_step(case, dtype, "cuda")
    assert_within_the_error_of_plain_torch("flash_attn backend", step, flash_attn_ops(TRITON_OPS, is_fused))
