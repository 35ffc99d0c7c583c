"""LayerOps of Triton kernels: NVIDIA GPUs, kernels.DTYPES. Importing this module imports triton: see select_ops."""

from torch import Tensor
from torch.nn import functional

from nanovllm.attention.triton import TritonAttentionBackend
from nanovllm.distributed.peer_memory import fits
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.kernels.all_reduce import all_reduce as peer_all_reduce
from nanovllm.kernels.grouped_gemm import choose_tile_config, grouped_gemm
from nanovllm.kernels.launching import compile_ahead
from nanovllm.kernels.moe_routing import moe_routing
from nanovllm.kernels.paged_attention import paged_attention
from nanovllm.kernels.qk_norm_rope_store import qk_norm_rope_store
from nanovllm.kernels.rms_norm import add_rms_norm, rms_norm
from nanovllm.kernels.rotary_embedding import rotary_embedding
from nanovllm.kernels.sampling import sampling
from nanovllm.kernels.shared_prefix_attention import shared_prefix_attention
from nanovllm.kernels.silu_and_mul import silu_and_mul
from nanovllm.kernels.skinny_linear import DTYPES as SKINNY_DTYPES
from nanovllm.kernels.skinny_linear import norm_skinny_linear, skinny_linear
from nanovllm.kernels.store_kvcache import store_kvcache
from nanovllm.kernels.varlen_attention import varlen_attention
from nanovllm.layers.ops import LayerOps, norm_then_linear

# Measured on an H200, in decode steps of four models: cuBLAS is as fast or faster for more rows and larger matrices.
MAX_SKINNY_ROWS = 16
MAX_SKINNY_ROWS_WITH_NORM = 8
MAX_VALUES_WITH_NORM = 2**14  # of x, which each program reads: 8 rows of 4096 take 18 us, 12 with a kernel for the norm
MAX_SKINNY_WEIGHTS = 2**24


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if is_skinny(x, weight, MAX_SKINNY_ROWS):
        return skinny_linear(x, weight, bias)
    return functional.linear(x, weight, bias)


_norm_then_linear = norm_then_linear(rms_norm, add_rms_norm, linear, silu_and_mul)


def norm_linear(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    is_gated: bool = False,
) -> tuple[Tensor, Tensor]:
    is_fused = is_skinny(x, weight, MAX_SKINNY_ROWS_WITH_NORM) and x.numel() <= MAX_VALUES_WITH_NORM
    run = norm_skinny_linear if is_fused else _norm_then_linear
    return run(x, residual, norm_weight, eps, weight, bias, is_gated=is_gated)


def is_skinny(x: Tensor, weight: Tensor, max_rows: int) -> bool:
    return len(x) <= max_rows and weight.numel() < MAX_SKINNY_WEIGHTS and x.dtype in SKINNY_DTYPES


def all_reduce(x: Tensor, tp: TensorParallel) -> Tensor:
    if tp.peers is None or not fits(x.nbytes, tp.size):
        return tp.all_reduce(x)
    with tp.guard:
        return peer_all_reduce(x, tp.peers.buffers)


def moe(
    x: Tensor, router_logits: Tensor, gate_up_proj: Tensor, down_proj: Tensor, top_k: int, norm_topk_prob: bool
) -> Tensor:
    tiles = choose_tile_config(len(x) * top_k, len(down_proj), x.element_size())
    routing = moe_routing(router_logits, top_k, norm_topk_prob, tiles.rows)
    return grouped_gemm(x, gate_up_proj, down_proj, routing, tiles=tiles)


TRITON_OPS = LayerOps(
    attention=TritonAttentionBackend(varlen_attention, paged_attention, shared_prefix_attention),
    linear=linear,
    all_reduce=all_reduce,
    norm_linear=norm_linear,
    rms_norm=rms_norm,
    add_rms_norm=add_rms_norm,
    rotary_embedding=rotary_embedding,
    store_kvcache=store_kvcache,
    qk_norm_rope_store=qk_norm_rope_store,
    moe=moe,
    sample_unfiltered=sampling,
    compile_ahead=compile_ahead,
)
