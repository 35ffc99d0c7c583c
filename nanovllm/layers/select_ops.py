"""Selects the LayerOps of a model, once, when its ModelRunner starts. The only place that imports triton's kernels."""

from dataclasses import replace

from nanovllm import kernels
from nanovllm.attention.backend import AttentionRequirements
from nanovllm.attention.flash_attn import FlashAttentionBackend
from nanovllm.attention.select import select_attention_backend
from nanovllm.attention.torch import TorchAttentionBackend
from nanovllm.layers.ops import LayerOps, separate_steps
from nanovllm.layers.torch_ops import TORCH_OPS


def select_ops(attention_backend: str, requirements: AttentionRequirements) -> LayerOps:
    """Triton kernels where they support device and dtype, else PyTorch; with the attention backend of that name.

    Norm, rotation and store are one fused kernel, unless attention_backend is "flash_attn": then each is a kernel of
    its own, as in nano-vllm. If "auto" selects flash-attn, its attention is combined with the fused kernel. Raises
    ValueError as select_attention_backend does.
    """
    backend = select_attention_backend(attention_backend, requirements)
    if kernels.unsupported_reason(requirements.device, requirements.dtype) is not None:
        return TORCH_OPS  # the other attention backends require Triton too
    from nanovllm.kernels.launching import hash_compiler
    from nanovllm.layers.triton_ops import TRITON_OPS

    hash_compiler()
    if backend is TorchAttentionBackend:
        return replace(TRITON_OPS, attention=TorchAttentionBackend(), compile_ahead=None)
    if backend is FlashAttentionBackend:
        return flash_attn_ops(TRITON_OPS, is_fused=attention_backend != "flash_attn")
    return TRITON_OPS


def flash_attn_ops(ops: LayerOps, is_fused: bool) -> LayerOps:
    """`ops` with flash-attn's attention; without is_fused, norm, rotation and store are separate steps of `ops`."""
    ops = replace(ops, attention=FlashAttentionBackend(), compile_ahead=None)  # flash-attn would compute
    if is_fused:
        return ops
    return replace(ops, qk_norm_rope_store=separate_steps(ops.rms_norm, ops.rotary_embedding, ops.store_kvcache))
