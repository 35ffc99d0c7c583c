"""Whole models without transformers: tensor parallelism of all layers together, and their last layer, in float64.

Rounding in float64 is about 1e-15 of logits in the order of 10, grown by a few layers; 1e-10 is far above that and far
below any wrong row, head or order.
"""

import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from nanovllm.context import Context, set_context
from nanovllm.distributed.tensor_parallel import SINGLE_RANK, TensorParallel
from nanovllm.layers.torch_ops import TORCH_OPS
from nanovllm.models.decoder import build_model, one_layer_of_each_kind
from nanovllm.models.loader import load_model
from nanovllm.models.registry import architectures
from tests.support.checkpoints import SMALL_MOE, checkpoint_tensors, small_config
from tests.support.comparing import assert_close
from tests.support.parallel_ranks import run_together, threaded_ranks


def config(model_type, **changes):
    """Sizes that up to eight ranks can share."""
    moe = dataclasses.replace(SMALL_MOE, moe_intermediate_size=8) if model_type == "qwen3_moe" else None
    sizes = {"vocab_size": 32, "intermediate_size": 16, "num_attention_heads": 8, "num_key_value_heads": 4, "moe": moe}
    return small_config(model_type, **(sizes | changes))


def loaded_models(model_config, directory, ranks):
    """Models of each rank, with random weights, which are written into `directory`."""
    save_file(checkpoint_tensors(model_config, torch.float64), directory / "model.safetensors")
    models = [build_model(model_config, TORCH_OPS, rank) for rank in ranks]
    for model in models:
        load_model(model, directory, use_tqdm=False)
    return models


BOUNDS = torch.tensor([0, 1, 5, 12]).int()  # of packed prompts of 1, 4 and 7 tokens
POSITIONS = torch.cat([torch.arange(length) for length in BOUNDS.diff()])
CONTEXT = Context(True, torch.full((12,), -1), BOUNDS, BOUNDS, 7, 7, BOUNDS.diff(), None)


@pytest.mark.parametrize("model_type", architectures())
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_of_several_ranks_equal_those_of_one(tmp_path, model_type, num_kv_heads, size, tied):
    """D36, D38, D39: replicated kv heads, order of the ranks' columns, biases, vocabulary range."""
    sizes = {"num_key_value_heads": num_kv_heads, "tie_word_embeddings": tied, "dtype": "float64"}
    model_config = config(model_type, **sizes, o_bias=True, mlp_bias=model_type == "llama")
    one, *ranks = loaded_models(model_config, tmp_path, [SINGLE_RANK, *threaded_ranks(size)])
    input_ids = torch.randint(32, (12,))

    def logits_of(model):
        with set_context(CONTEXT), torch.no_grad():  # both belong to the thread
            return model.compute_logits(model(input_ids, POSITIONS))

    expected = logits_of(one)
    actual = torch.cat(run_together(logits_of, ranks), dim=1)
    assert expected.shape == (12, 32)
    assert_close("models: logits of several ranks against those of one", actual, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("model_type", architectures())
def test_the_last_layer_computes_what_is_asked_for(tmp_path, model_type):
    """Packed prompts of 1, 4 and 7 tokens: three rows go through its MLP, and equal those among all."""
    model_config = config(model_type, dtype="float64")
    (model,) = loaded_models(model_config, tmp_path, [SINGLE_RANK])
    input_ids, last_tokens = torch.randint(32, (12,)), torch.tensor([0, 4, 11])
    num_rows = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, inputs, output: num_rows.append(len(output[0])))
    with set_context(CONTEXT), torch.no_grad():
        expected = model(input_ids, POSITIONS)[last_tokens]
        num_rows.clear()
        actual = model(input_ids, POSITIONS, last_tokens)
    assert_close("models: rows of the last layer against all rows", actual, expected, rtol=0, atol=1e-10)
    assert num_rows == [12] * (model_config.num_hidden_layers - 1) + [3]


def test_one_layer_of_each_kind_has_the_first_and_the_last_and_the_others_that_differ():
    moe = dataclasses.replace(SMALL_MOE, layers=frozenset({2, 3, 5}))
    model = build_model(config("qwen3_moe", num_hidden_layers=6, moe=moe), TORCH_OPS)
    layers = list(model.model.layers)
    with one_layer_of_each_kind(model):
        first, middle, last = model.model.layers
        assert (first, last) == (layers[0], layers[5])
        assert middle in (layers[2], layers[3])
    assert list(model.model.layers) == layers
    dense = build_model(config("llama", num_hidden_layers=6), TORCH_OPS)
    with one_layer_of_each_kind(dense):
        assert len(dense.model.layers) == 2
    single = build_model(config("llama", num_hidden_layers=1), TORCH_OPS)
    with one_layer_of_each_kind(single):
        assert len(single.model.layers) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_parameters_have_the_configs_dtype_and_torchs_default_is_unchanged(dtype):
    """D44"""
    model = build_model(config("qwen3_moe", dtype=dtype), TORCH_OPS)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 2}, "num_attention_heads=6"),
        ({"vocab_size": 30}, "vocab_size=30"),
        ({"intermediate_size": 18}, "intermediate_size=18"),
        ({"moe": dataclasses.replace(SMALL_MOE, moe_intermediate_size=6)}, "moe_intermediate_size=6"),
        ({"num_attention_heads": 12, "num_key_value_heads": 3}, "num_key_value_heads=3 "),
    ],
)
def test_model_that_does_not_divide_over_the_ranks_is_refused_by_name(changes, named):
    """D36: before a process starts, with a number that fits."""
    match = f"tensor_parallel_size must divide the model's {named}.*got 4; [12] would fit"
    with pytest.raises(ValueError, match=match):
        config("qwen3_moe", **changes).check_tensor_parallel_size(4)
    with pytest.raises(ValueError, match=match):
        build_model(config("qwen3_moe", **changes), TORCH_OPS, TensorParallel(0, 4))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_model_that_divides_over_the_ranks_is_accepted(size):
    for num_kv_heads in (1, 2, 4, 8):
        config("llama", num_key_value_heads=num_kv_heads).check_tensor_parallel_size(size)
    all_sparse = dataclasses.replace(SMALL_MOE, moe_intermediate_size=8, layers=frozenset({0, 1}))
    config("qwen3_moe", intermediate_size=7, moe=all_sparse).check_tensor_parallel_size(size)  # no layer is dense
