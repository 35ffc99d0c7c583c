"""Rotary embedding against reference.rotary_embedding, which computes in float64.

Ours takes angles in float32: an angle of p radians is off by p times a few units of 2**-24 (frequency, product), and
so are cos and sin, which x then scales.
"""

import pytest
import torch

from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.layers.torch_ops import apply_rotary_embedding
from nanovllm.rope_config import RopeConfig
from reference.rotary_embedding import rotary_embedding
from tests.support.counts import count_comparisons, record_error

D = 32
ROPE = "layers: rotary embedding against the reference"
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
YARN_FACTOR = 1.1386294361119891  # 0.1 ln 4 + 1
CASES = {
    "default": (RopeConfig(), None),
    "theta": (RopeConfig(theta=1e6), None),
    "linear": (RopeConfig("linear", factor=2.5), {"factor": 2.5}),
    "llama3": (RopeConfig("llama3", **LLAMA3), LLAMA3),
    "yarn": (RopeConfig("yarn", **YARN, attention_factor=YARN_FACTOR), YARN),
    "yarn-betas": (
        RopeConfig("yarn", **YARN, beta_fast=8.0, beta_slow=2.0, truncate=False, attention_factor=0.5),
        YARN | {"beta_fast": 8.0, "beta_slow": 2.0, "truncate": False, "attention_factor": 0.5},
    ),
    "yarn-one-pair": (  # both ends of the ramp fall on one index
        RopeConfig("yarn", **YARN, beta_fast=2.0, beta_slow=2.0, truncate=False, attention_factor=YARN_FACTOR),
        YARN | {"beta_fast": 2.0, "beta_slow": 2.0, "truncate": False},
    ),
    "yarn-backwards": (  # the ramp ends before it begins
        RopeConfig("yarn", **YARN, beta_fast=1.0, beta_slow=32.0, attention_factor=YARN_FACTOR),
        YARN | {"beta_fast": 1.0, "beta_slow": 32.0},
    ),
}


@pytest.mark.parametrize(("rope", "scaling"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rotation_equals_the_reference(rope, scaling, dtype):
    """D65: every rope type"""
    positions = torch.tensor([0, 1, 2, 63, 64, 501, 3])  # bfloat16 has no 501
    x = torch.randn(7, 3, D).to(dtype)
    scaling = None if scaling is None else {"rope_type": rope.rope_type, **scaling}
    expected = rotary_embedding(positions, x.double(), rope.theta, scaling)
    actual = apply_rotary_embedding(x, *RotaryEmbedding(D, rope)(positions))
    assert actual.dtype == dtype
    angle_error = 4 * 2.0**-24 * (positions + 1)[:, None, None]
    bound = angle_error * x.abs().max() * 2 + torch.finfo(dtype).eps * expected.abs()
    error = (actual.double() - expected).abs()
    assert bool((error <= bound).all())
    count_comparisons(ROPE, error.numel())
    worst = (error / bound).argmax()
    record_error(ROPE, float(error.flatten()[worst]), float(bound.flatten()[worst]))


def test_two_models_do_not_share_anything():
    """D54: another theta or head_dim beside it changes nothing, nor does a like one, also on another device."""
    positions = torch.arange(50)
    first = RotaryEmbedding(D, RopeConfig())
    alone, _ = first(positions)
    second = RotaryEmbedding(D, RopeConfig(theta=5e5)).double()
    for other in (second, RotaryEmbedding(2 * D, RopeConfig())):
        other(positions)
    with torch.device("meta"):
        assert RotaryEmbedding(D, RopeConfig()).inv_freq.is_meta
    RotaryEmbedding(D, RopeConfig()).inv_freq.zero_()
    assert torch.equal(first(positions)[0], alone)
    assert second.inv_freq.data_ptr() != first.inv_freq.data_ptr()
