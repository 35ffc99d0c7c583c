"""Calls of operations in a run of the engine, as calls of their references.

The engine computes with LayerOps in plain PyTorch on the CPU. Each operation notes its arguments before it computes.
The reference of the rotary embedding takes positions, which its operation does not get: the layer that makes the angles
notes them.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from nanovllm.attention.torch import TorchAttentionBackend
from nanovllm.context import Context
from nanovllm.layers.ops import LayerOps, norm_then_linear, separate_steps
from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.layers.torch_ops import TORCH_OPS
from nanovllm.layers.torch_ops import silu_and_mul as silu_and_mul_in_torch
from reference.attention import attention
from reference.linear import linear
from reference.moe import moe
from reference.packing import varlen_attention
from reference.paged_attention import paged_attention
from reference.rms_norm import rms_norm
from reference.rotary_embedding import rotary_embedding
from reference.sampling import sampling
from reference.silu_and_mul import silu_and_mul
from reference.slot_mapping import slot_mapping
from reference.store_kvcache import store_kvcache

PROMPTS = ([*range(5, 45)], [7, 8, 9], [*range(5, 30), *range(60, 75)])  # the third begins as the first does


@dataclass(frozen=True)
class Operation:
    """What a Definition is made of besides one call: names of the outputs, and the category in FlashInfer-Trace."""

    function: Callable[..., Any]
    op_type: str
    outputs: tuple[str, ...] = ("output",)


OPERATIONS = {
    "attention": Operation(attention, "gqa"),
    "varlen_attention": Operation(varlen_attention, "gqa_ragged"),
    "paged_attention_decode": Operation(paged_attention, "gqa_paged"),
    "paged_attention_prefill": Operation(paged_attention, "gqa_paged"),
    "slot_mapping": Operation(slot_mapping, "kv_cache", ("slots",)),
    "store_kvcache": Operation(store_kvcache, "kv_cache", ("new_k_cache", "new_v_cache")),
    "linear": Operation(linear, "gemm"),
    "rms_norm": Operation(rms_norm, "rmsnorm"),
    "add_rms_norm": Operation(rms_norm, "rmsnorm", ("output", "total")),
    "rotary_embedding": Operation(rotary_embedding, "rope"),
    "silu_and_mul": Operation(silu_and_mul, "activation"),
    "moe": Operation(moe, "moe"),
    "sampling": Operation(sampling, "sampling", ("token",)),
}


@dataclass(frozen=True)
class Call:
    """One call of OPERATIONS[name].function(**inputs)."""

    name: str
    inputs: Mapping[str, Any]


@dataclass
class Recorder:
    """Notes calls. positions: of the forward pass that runs, as the rotary embedding got them."""

    rope_theta: float
    calls: list[Call] = field(default_factory=list)
    positions: Tensor | None = None

    def note(self, name: str, **inputs: Any) -> None:
        copies = {key: value.clone() if isinstance(value, Tensor) else value for key, value in inputs.items()}
        self.calls.append(Call(name, copies))

    def ops(self) -> LayerOps:
        """TORCH_OPS, whose operations are noted."""

        def noted_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
            self.note("rms_norm", x=x, weight=weight, eps=eps)
            return TORCH_OPS.rms_norm(x, weight, eps)

        def noted_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
            self.note("add_rms_norm", x=x, weight=weight, eps=eps, residual=residual)
            return TORCH_OPS.add_rms_norm(x, residual, weight, eps)

        def noted_rotary_embedding(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
            for x in (query, key):
                self.note("rotary_embedding", positions=self.positions, x=x, rope_theta=self.rope_theta)
            return TORCH_OPS.rotary_embedding(query, key, cos, sin)

        def noted_store(key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
            caches = {"k_cache": k_cache, "v_cache": v_cache}
            self.note("store_kvcache", key=key, value=value, **caches, slot_mapping=slot_mapping)
            TORCH_OPS.store_kvcache(key, value, k_cache, v_cache, slot_mapping)

        def noted_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            self.note("linear", x=x, weight=weight, **({} if bias is None else {"bias": bias}))
            return TORCH_OPS.linear(x, weight, bias)

        def noted_silu_and_mul(x: Tensor) -> Tensor:
            self.note("silu_and_mul", x=x)
            return silu_and_mul_in_torch(x)

        def noted_moe(
            x: Tensor, router_logits: Tensor, gate_up_proj: Tensor, down_proj: Tensor, top_k: int, norm_topk_prob: bool
        ) -> Tensor:
            router = x.new_empty(router_logits.shape[1], x.shape[1])  # its shape alone: floats of a workload are drawn
            weights = {"router_weight": router, "gate_up_proj": gate_up_proj, "down_proj": down_proj}
            self.note("moe", hidden_states=x, **weights, top_k=top_k, norm_topk_prob=norm_topk_prob)
            return TORCH_OPS.moe(x, router_logits, gate_up_proj, down_proj, top_k, norm_topk_prob)

        def noted_sampling(
            logits: Tensor,
            temperature: Tensor,
            seed_low: Tensor,
            seed_high: Tensor,
            position: Tensor,
            takes_argmax: Tensor,
        ) -> Tensor:
            for row in (~takes_argmax).nonzero()[:, 0].tolist():
                place = {"seed": int(seed_low[row]) | int(seed_high[row]) << 32, "position": int(position[row])}
                self.note("sampling", logits=logits[row], temperature=float(temperature[row]), **place)
            return TORCH_OPS.sample_unfiltered(logits, temperature, seed_low, seed_high, position, takes_argmax)

        return replace(
            TORCH_OPS,
            attention=_NotedAttention(self),
            rms_norm=noted_rms_norm,
            add_rms_norm=noted_add_rms_norm,
            rotary_embedding=noted_rotary_embedding,
            store_kvcache=noted_store,
            qk_norm_rope_store=separate_steps(noted_rms_norm, noted_rotary_embedding, noted_store),
            linear=noted_linear,
            norm_linear=norm_then_linear(noted_rms_norm, noted_add_rms_norm, noted_linear, noted_silu_and_mul),
            moe=noted_moe,
            sample_unfiltered=noted_sampling,
        )


class _NotedAttention(TorchAttentionBackend):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def prefill(self, query: Tensor, key: Tensor, value: Tensor, context: Context, scale: float) -> Tensor:
        bounds = {"cu_seqlens_q": context.cu_seqlens_q}
        if context.block_tables is None:
            keys = {"key": key, "value": value, "cu_seqlens_k": context.cu_seqlens_k}
            self.recorder.note("varlen_attention", query=query, **keys, **bounds, scale=scale)
            first = slice(0, int(context.cu_seqlens_k[1]))
            self.recorder.note("attention", query=query[first], key=key[first], value=value[first], scale=scale)
        else:
            lens = {"block_tables": context.block_tables, "context_lens": context.cu_seqlens_k.diff()}
            caches = {"k_cache": key, "v_cache": value}
            self.recorder.note("paged_attention_prefill", query=query, **caches, **lens, **bounds, scale=scale)
        return super().prefill(query, key, value, context, scale)

    def decode(self, query: Tensor, cache: Any, context: Context, scale: float) -> Tensor:
        lens = {"block_tables": context.block_tables, "context_lens": context.context_lens}
        self.recorder.note("paged_attention_decode", query=query, k_cache=cache.k, v_cache=cache.v, **lens, scale=scale)
        assert context.block_tables is not None
        positions, block_size = torch.arange(int(context.context_lens[0])), cache.k.shape[1]
        table = context.block_tables[0, : -(-len(positions) // block_size)]
        self.recorder.note("slot_mapping", positions=positions, block_table=table, block_size=block_size)
        return super().decode(query, cache, context, scale)


@contextmanager
def _noted_positions(recorder: Recorder) -> Iterator[None]:
    forward = RotaryEmbedding.forward

    def noted(self: RotaryEmbedding, positions: Tensor) -> tuple[Tensor, Tensor]:
        recorder.positions = positions
        return forward(self, positions)

    with patch.object(RotaryEmbedding, "forward", noted):
        yield


def record(model_dir: Path) -> list[Call]:
    """The calls of a short run on the CPU: packed prefill, prefill after a cached prefix, decode, sampling."""
    from nanovllm import LLM, SamplingParams
    from nanovllm.models.registry import load_model_config
    from nanovllm.worker import model_runner

    rope = load_model_config(model_dir).rope
    if rope.rope_type != "default":
        raise ValueError(f"{model_dir}: rope_type must be default, got {rope.rope_type}; take another model")
    recorder = Recorder(rope.theta)
    options: dict[str, Any] = {"device": "cpu", "attention_backend": "torch", "kv_cache_block_size": 16}
    with (
        patch.object(model_runner, "select_ops", lambda *_: recorder.ops()),
        _noted_positions(recorder),
        LLM(str(model_dir), num_kv_cache_blocks=32, max_num_seqs=4, **options) as llm,
    ):
        recorder.calls.clear()  # what start-up computed
        for prompts in (PROMPTS[:2], PROMPTS[2:]):
            params = SamplingParams(temperature=0.8, max_tokens=3, ignore_eos=True, seed=1)
            llm.generate(list(prompts), params, use_tqdm=False)
    return recorder.calls
