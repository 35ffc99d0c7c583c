"""parameter_counts: against numbers computed by hand, and against checkpoints."""

import dataclasses

import pytest

from nanovllm.model_config import MoEConfig
from nanovllm.models.registry import load_model_config
from nanovllm.parameter_counts import layer_parameters, parameters_per_token
from tests.support.checkpoints import counted_by_hand
from tests.support.tiny_models import ARCHITECTURES, tiny_model


def test_experts_that_no_token_chooses_are_not_read() -> None:
    """4 experts, 2 a token: one token reads 2 of them, two tokens 4 (1 - 1/2 x 1/2) = 3, many tokens all."""
    moe = MoEConfig(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=5, norm_topk_prob=True, layers=frozenset({1, 2})
    )
    sparse = dataclasses.replace(counted_by_hand(), moe=moe)
    rest = 3 * 8 * 4 * 6 + 3 * 8 * 16 + 2 * 8 * 4  # attention, the dense layer, two routers
    expert = 2 * 3 * 8 * 5  # in both layers
    assert layer_parameters(sparse, 1) == rest + 2 * expert == parameters_per_token(sparse)
    assert layer_parameters(sparse, 2) == rest + 3 * expert
    assert layer_parameters(sparse, 1000) == pytest.approx(rest + 4 * expert)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parameters_are_those_of_the_checkpoint(architecture: str) -> None:
    """All matrices of the checkpoint but the embedding, read from its file."""
    from safetensors.torch import load_file

    directory = tiny_model(architecture)
    tensors = load_file(directory / "model.safetensors")
    matrices = {name: tensor for name, tensor in tensors.items() if tensor.dim() > 1 and ".layers." in name}
    found = layer_parameters(load_model_config(directory), num_tokens=10**6)
    assert found == pytest.approx(sum(tensor.numel() for tensor in matrices.values()))
