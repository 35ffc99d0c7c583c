"""Transformer: a stream of vectors, one a token, to which each layer adds what it reads, first from the other tokens
(attention), then from its own weights (feed-forward); the last vector gives the logits of the next token.

    x         = embed[token]
    each layer:
        x     = x + o_proj . attention(rope(norm(q_proj . h)), rope(norm(k_proj . h)), v_proj . h),   h = rms_norm(x)
        x     = x + feed_forward(rms_norm(x))          feed_forward = down . silu_and_mul(gate, up), or a mixture
    logits    = lm_head . rms_norm(x)

Why one file for every architecture: they differ in what their checkpoints hold. Qwen2 has biases on q, k and v (Llama
may have them, and on o), Qwen3 normalises each head's query and key, Qwen3-MoE has a mixture of experts in some or all
layers. A weight is used if the checkpoint has it.
Why the sum: the stream passes every layer's result to all later layers unchanged.

Letters: T tokens of one sequence, V vocabulary, E hidden size, H query heads, K key/value heads, D head_dim.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from reference.attention import attention
from reference.checkpoint import ModelConfig
from reference.moe import moe
from reference.rms_norm import rms_norm
from reference.rotary_embedding import rotary_embedding
from reference.silu_and_mul import silu_and_mul


@torch.no_grad()
def transformer(token_ids: Sequence[int], weights: Mapping[str, Tensor], config: ModelConfig) -> Float[Tensor, "T V"]:
    """The logits after each token of one sequence, from position 0, without a cache.

    A model of no layers maps the last token to the next by two matrices; here row v of the head matches token v - 1:

    >>> embed = torch.eye(3)
    >>> weights = {"model.embed_tokens.weight": embed, "model.norm.weight": torch.ones(3) / 3**0.5}
    >>> weights["lm_head.weight"] = embed.roll(1, dims=0)
    >>> config = ModelConfig(num_hidden_layers=0, num_attention_heads=1, num_key_value_heads=1, head_dim=2)
    >>> transformer([0, 1], weights, config).round(decimals=3)
    tensor([[0., 1., 0.],
            [0., 0., 1.]])
    """

    def linear(x: Tensor, name: str) -> Tensor:
        y = x @ weights[f"{name}.weight"].T
        return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y

    def norm(x: Tensor, name: str) -> Tensor:
        y = rms_norm(x, weights[f"{name}.weight"], config.rms_norm_eps)
        assert isinstance(y, Tensor)  # a pair only with a residual
        return y

    def heads(x: Tensor, name: str) -> Tensor:
        x = x.unflatten(-1, (-1, config.head_dim))  # [T, H or K, D]
        x = norm(x, name) if f"{name}.weight" in weights else x
        return rotary_embedding(positions, x, config.rope_theta, config.rope_scaling)

    def self_attention(x: Tensor, name: str) -> Tensor:
        query = heads(linear(x, f"{name}.q_proj"), f"{name}.q_norm")
        key = heads(linear(x, f"{name}.k_proj"), f"{name}.k_norm")
        value = linear(x, f"{name}.v_proj").unflatten(-1, (-1, config.head_dim))
        return linear(attention(query, key, value).flatten(1), f"{name}.o_proj")

    def feed_forward(x: Tensor, name: str) -> Tensor:
        if f"{name}.gate.weight" in weights:
            return mixture(x, name)
        gate_up = torch.cat([linear(x, f"{name}.gate_proj"), linear(x, f"{name}.up_proj")], dim=-1)
        return linear(silu_and_mul(gate_up), f"{name}.down_proj")

    def mixture(x: Tensor, name: str) -> Tensor:
        router = weights[f"{name}.gate.weight"]
        gate, up, down = (
            torch.stack([weights[f"{name}.experts.{n}.{part}_proj.weight"] for n in range(len(router))])
            for part in ("gate", "up", "down")
        )
        gate_up = torch.cat([gate, up], dim=1)
        return moe(x, router, gate_up, down, config.num_experts_per_tok, config.norm_topk_prob)

    positions = torch.arange(len(token_ids))
    x = weights["model.embed_tokens.weight"][torch.tensor(token_ids)]
    for n in range(config.num_hidden_layers):
        layer = f"model.layers.{n}"
        x = x + self_attention(norm(x, f"{layer}.input_layernorm"), f"{layer}.self_attn")
        x = x + feed_forward(norm(x, f"{layer}.post_attention_layernorm"), f"{layer}.mlp")
    return linear(norm(x, "model.norm"), "lm_head")


if __name__ == "__main__":
    __import__("reference").show_examples(__file__)
