"""The decoder of all supported models, built from a ModelConfig.

Letters: T packed tokens, E hidden size, H query heads, K key/value heads, D head_dim, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from nanovllm.distributed.tensor_parallel import SINGLE_RANK, TensorParallel
from nanovllm.layers.attention import Attention
from nanovllm.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from nanovllm.layers.moe import SparseMoeBlock
from nanovllm.layers.ops import LayerOps
from nanovllm.layers.parameter import parameter_dtype
from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.model_config import ModelConfig


class SelfAttention(nn.Module):
    """Norm, projections, rotary embedding and attention of one layer."""

    def __init__(self, config: ModelConfig, ops: LayerOps, tp: TensorParallel) -> None:
        super().__init__()
        sizes = (config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads)
        self.qkv_proj = QKVParallelLinear(*sizes, bias=config.qkv_bias, tp=tp, ops=ops)
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * config.head_dim, config.hidden_size, bias=config.o_bias, tp=tp, ops=ops
        )
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, ops)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, ops)
        self.has_qk_norm = config.qk_norm
        self.ops = ops
        self.attn = Attention(
            self.qkv_proj.num_heads, config.head_dim, config.head_dim**-0.5, self.qkv_proj.num_kv_heads, ops
        )

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None,
        norm: RMSNorm,
        cos: Tensor,
        sin: Tensor,
        last_tokens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """(output [T, E] of the normalised sum, hidden_states + residual, to which it is to be added).

        last_tokens: see Decoder.forward; both results have these rows only.
        """
        qkv_proj = self.qkv_proj
        qkv, residual = self.ops.norm_linear(  # qkv: [T, (H + 2 K) * D]
            hidden_states, residual, norm.weight, norm.eps, qkv_proj.weight, qkv_proj.bias
        )
        head_norms = (self.q_norm, self.k_norm) if self.has_qk_norm else None
        heads = self.attn(qkv, cos, sin, head_norms, last_tokens)
        if last_tokens is not None:
            residual = residual.index_select(0, last_tokens)
        return self.o_proj(heads.flatten(1)), residual


class MLP(nn.Module):
    """Norm and gated feed-forward network."""

    def __init__(self, config: ModelConfig, ops: LayerOps, tp: TensorParallel) -> None:
        super().__init__()
        sizes = [config.intermediate_size] * 2
        self.gate_up_proj = MergedColumnParallelLinear(config.hidden_size, sizes, bias=config.mlp_bias, tp=tp, ops=ops)
        self.ops = ops
        self.down_proj = RowParallelLinear(
            config.intermediate_size, config.hidden_size, bias=config.mlp_bias, tp=tp, ops=ops
        )

    def forward(self, hidden_states: Tensor, residual: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        """(output [T, E] of the normalised sum, hidden_states + residual, to which it is to be added)."""
        gate_up = self.gate_up_proj
        activated, residual = self.ops.norm_linear(
            hidden_states, residual, norm.weight, norm.eps, gate_up.weight, gate_up.bias, is_gated=True
        )
        return self.down_proj(activated), residual


class DecoderLayer(nn.Module):
    """Attention and MLP, each with the norm before it, which adds the previous output to the residual stream."""

    def __init__(self, config: ModelConfig, layer_index: int, ops: LayerOps, tp: TensorParallel) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config, ops, tp)
        if config.moe is not None and layer_index in config.moe.layers:
            self.mlp = SparseMoeBlock(config.hidden_size, config.moe, ops, tp)
        else:
            self.mlp = MLP(config, ops, tp)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops)

    def forward(
        self, hidden_states: Tensor, residual: Tensor | None, cos: Tensor, sin: Tensor, last_tokens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(last output, stream without it) -> the same of this layer. The first layer gets None as the stream."""
        hidden_states, residual = self.self_attn(hidden_states, residual, self.input_layernorm, cos, sin, last_tokens)
        return self.mlp(hidden_states, residual, self.post_attention_layernorm)


class Decoder(nn.Module):
    """Embedding, layers and last norm: the part of a checkpoint whose names begin with `model.`."""

    def __init__(self, config: ModelConfig, ops: LayerOps, tp: TensorParallel) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, tp, ops)
        self.rotary_emb = RotaryEmbedding(config.head_dim, config.rope)
        self.layers = nn.ModuleList(DecoderLayer(config, index, ops, tp) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops)

    def forward(self, input_ids: Tensor, positions: Tensor, last_tokens: Tensor | None) -> Tensor:
        """As DecoderForCausalLM.forward. Of the other tokens the last layer computes keys and values, and no more."""
        hidden_states = self.embed_tokens(input_ids)
        cos, sin = self.rotary_emb(positions)
        residual = None
        *layers, last_layer = self.layers
        for layer in layers:
            hidden_states, residual = layer(hidden_states, residual, cos, sin, None)
        hidden_states, residual = last_layer(hidden_states, residual, cos, sin, last_tokens)
        return self.norm(hidden_states, residual)[0]


class DecoderForCausalLM(nn.Module):
    """A whole model. Its parameters have torch's default dtype and device and must be loaded before use.

    packed_modules_mapping: module of the checkpoint -> (packed module of this model that holds it, shard_id).
    """

    packed_modules_mapping: ClassVar[dict[str, tuple[str, str | int]]] = {
        "q_proj": ("qkv_proj", "q"),
        "k_proj": ("qkv_proj", "k"),
        "v_proj": ("qkv_proj", "v"),
        "gate_proj": ("gate_up_proj", 0),
        "up_proj": ("gate_up_proj", 1),
    }

    def __init__(self, config: ModelConfig, ops: LayerOps, tp: TensorParallel) -> None:
        super().__init__()
        self.model = Decoder(config, ops, tp)
        tied_to = self.model.embed_tokens if config.tie_word_embeddings else None
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, tp, tied_to)

    @property
    def is_tied(self) -> bool:
        """Whether lm_head and the embedding are one Parameter: as in config.json, unless the files hold two weights."""
        return self.lm_head.weight is self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor, positions: Tensor, last_tokens: Tensor | None = None) -> Tensor:
        """input_ids [T], positions [T] -> hidden states [T, E], under a Context.

        last_tokens: [num_seqs] int64, the index of each sequence's last token: then theirs only, [num_seqs, E].
        """
        return self.model(input_ids, positions, last_tokens)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """[T, E] -> [T, V/size]: see ParallelLMHead."""
        return self.lm_head(hidden_states)


@contextmanager
def one_layer_of_each_kind(model: DecoderForCausalLM) -> Iterator[None]:
    """In the `with` block, `model` has its first layer, which gets no residual, its last, which may compute fewer
    rows, and between them one with each other kind of MLP. All other layers launch the same kernels.
    """
    decoder, layers = model.model, model.model.layers
    first, *others = layers
    others_by_mlp = {type(layer.mlp): layer for layer in others[:-1] if type(layer.mlp) is not type(first.mlp)}
    decoder.layers = nn.ModuleList([first, *others_by_mlp.values(), *others[-1:]])
    try:
        yield
    finally:
        decoder.layers = layers


def build_model(config: ModelConfig, ops: LayerOps, tp: TensorParallel = SINGLE_RANK) -> DecoderForCausalLM:
    """The model with uninitialised parameters of config.dtype on torch's default device (`with torch.device(...)`).

    Raises ValueError if the model cannot be divided evenly over the ranks.
    """
    config.check_tensor_parallel_size(tp.size)
    with parameter_dtype(getattr(torch, config.dtype)):
        return DecoderForCausalLM(config, ops, tp)
