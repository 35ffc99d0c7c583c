"""Counts of the parameters in the matrices of a model's layers, from its configuration."""

from nanovllm.model_config import ModelConfig


def parameters_per_token(model: ModelConfig) -> float:
    """Parameters of the layers' matrices with which one token is multiplied."""
    return _parameters(model, 0 if model.moe is None else model.moe.num_experts_per_tok)


def layer_parameters(model: ModelConfig, num_tokens: int) -> float:
    """Parameters of the layers' matrices that a step over num_tokens tokens reads.

    Of the experts these are the ones that some token chooses: of X experts, n tokens that choose k each at random leave
    a fraction (1 - k/X)^n unread. Tokens that prefer the same experts read fewer.
    """
    if model.moe is None:
        return _parameters(model, 0)
    num_experts, chosen = model.moe.num_experts, model.moe.num_experts_per_tok
    return _parameters(model, num_experts * (1 - (1 - chosen / num_experts) ** num_tokens))


def _parameters(model: ModelConfig, num_experts: float) -> float:
    """Parameters of the matrices of all layers, with num_experts experts in each layer of experts."""
    heads = 2 * model.num_attention_heads + 2 * model.num_key_value_heads
    attention = model.num_hidden_layers * model.hidden_size * model.head_dim * heads
    return attention + sum(mlp_parameters(model, layer, num_experts) for layer in range(model.num_hidden_layers))


def mlp_parameters(model: ModelConfig, layer: int, num_experts: float) -> float:
    """Parameters of the MLP of a dense layer, or of num_experts experts and the router."""
    moe = model.moe
    if moe is None or layer not in moe.layers:
        return 3 * model.hidden_size * model.intermediate_size
    return model.hidden_size * (3 * num_experts * moe.moe_intermediate_size + moe.num_experts)
