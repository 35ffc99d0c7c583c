"""Adapters: attention functions with the signatures of FlashInfer, flash-attn and vLLM, called by our launchers' names.

SIGNATURES_OF says by which parameters a signature is recognised, and values_of what a parameter of each name is given.
A function returns its output, alone or as the first of several, or writes it to `out`. layer_adapters.py has the other
layers.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tests.support.kernels.plans import Pages, Plans, pages_of

SIGNATURES = "docs/own_kernels.md lists the signatures of FlashInfer, flash-attn and vLLM that are adapted"
WORKSPACE_BYTES = 128 * 2**20  # what FlashInfer's documentation recommends
HALF = (torch.float16, torch.bfloat16)
PREFILL = ("varlen_attention", "varlen_attention_hopper")
Parameters = Mapping[str, inspect.Parameter]


@dataclass(frozen=True)
class Call:
    """One call of a launcher: paged_attention (decode), or varlen_attention with block_tables or on packed keys."""

    query: Tensor  # [T, H, D]
    key: Tensor  # [num_blocks, block_size, K, D], or packed [Tk, K, D] without block_tables
    value: Tensor
    cu_seqlens_q: Tensor  # [B + 1] int32
    cu_seqlens_k: Tensor
    context_lens: Tensor  # [B] int32
    block_tables: Tensor | None
    max_seqlen_q: int
    scale: float

    @property
    def max_seqlen_k(self) -> int:
        """An upper bound that shapes tell: to look for the maximum would wait for the GPU."""
        if self.block_tables is None:
            return len(self.key)
        return self.block_tables.shape[1] * self.key.shape[1]


# Parameters that a function must have -> the launchers that it may take the place of.
SIGNATURES_OF: dict[frozenset[str], tuple[str, ...]] = {
    # flash-attn: flash_attn_with_kvcache, flash_attn_varlen_func
    frozenset({"q", "k_cache", "v_cache", "cache_seqlens", "block_table"}): ("paged_attention",),
    frozenset({"q", "k", "v", "cu_seqlens_q", "cu_seqlens_k"}): PREFILL,
    # vLLM: unified_attention
    frozenset({"q", "k", "v", "out", "cu_seqlens_q", "seqused_k", "block_table"}): ("paged_attention", *PREFILL),
    # FlashInfer: a paged cache (without kv_last_page_len, a slot is a page), and packed keys
    frozenset({"q", "k_cache", "v_cache", "kv_indptr", "kv_indices"}): ("paged_attention", *PREFILL),
    frozenset({"q", "k", "v", "qo_indptr", "kv_indptr"}): PREFILL,
    # our reference.paged_attention
    frozenset({"query", "k_cache", "v_cache", "block_tables", "context_lens", "cu_seqlens_q"}): PREFILL,
}


def values_of(call: Call, parameters: Parameters, plans: Plans) -> dict[str, Any]:
    """The value of each of `parameters` that we give. Raises NotImplementedError if it cannot have these keys."""
    pages_without_lengths = "kv_indices" in parameters and "kv_last_page_len" not in parameters
    is_required = {name for name, one in parameters.items() if one.default is one.empty}
    takes_tables = parameters.keys() & {"block_table", "block_tables", "kv_indices"}
    if call.block_tables is None and takes_tables & is_required:
        raise NotImplementedError("packed keys")
    if call.block_tables is not None and not takes_tables:
        raise NotImplementedError("keys in a paged cache")
    query, key, value = call.query, call.key, call.value
    if pages_without_lengths:
        key, value = (cache.flatten(0, 1)[:, None] for cache in (key, value))
    values = {
        **dict.fromkeys(("q", "query"), query[:, None] if "cache_seqlens" in parameters else query),
        **dict.fromkeys(("k_cache",) if "k_cache" in parameters else ("k", "key"), key),
        **dict.fromkeys(("v_cache",) if "v_cache" in parameters else ("v", "value"), value),
        **dict.fromkeys(("cu_seqlens_q", "qo_indptr"), call.cu_seqlens_q),
        "cu_seqlens_k": call.cu_seqlens_k,
        "max_seqlen_q": call.max_seqlen_q,
        "max_seqlen_k": call.max_seqlen_k,
        **dict.fromkeys(("context_lens", "cache_seqlens"), call.context_lens),
        **dict.fromkeys(("block_table", "block_tables"), call.block_tables),
        **dict.fromkeys(("scale", "softmax_scale", "sm_scale"), call.scale),
        "causal": True,
    }
    usual = {"out": torch.empty_like(query), "seqused_k": call.context_lens, "window_size": (-1, -1), "softcap": 0.0}
    usual |= dict.fromkeys(("q_descale", "k_descale", "v_descale"))
    values |= {name: value for name, value in usual.items() if name in is_required}
    if "kv_indptr" in parameters:
        pages = _pages(call, plans, 1 if pages_without_lengths else call.key.shape[1])
        values |= {f"kv_{name}": value for name, value in pages._asdict().items()}
    return {name: value for name, value in values.items() if name in parameters}


def _pages(call: Call, plans: Plans, page_size: int) -> Pages:
    """FlashInfer's pages of one block, or of one slot, each. Of packed keys, where each sequence begins."""
    if call.block_tables is None:
        return Pages(call.cu_seqlens_k, call.cu_seqlens_k, call.cu_seqlens_k)
    tables, block_size = call.block_tables, call.key.shape[1]

    def make() -> Pages:
        if page_size == block_size:
            return pages_of(tables, call.context_lens, block_size)
        positions = torch.arange(call.max_seqlen_k, device=tables.device)
        slots = tables[:, positions // block_size] * block_size + positions % block_size
        return pages_of(slots.int(), call.context_lens, 1)

    return plans.get(tables, make)


def adapt(name: str, function: Any) -> Callable[..., Any]:
    """`function` with the parameters of our launcher `name`, if a signature or a wrapper fits; else as it is."""
    if inspect.isclass(function) and hasattr(function, "plan") and hasattr(function, "run"):
        return _with_our_parameters(name, _flashinfer_wrapper(function), function)
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return function
    if not any(name in names and marks <= parameters.keys() for marks, names in SIGNATURES_OF.items()):
        return function
    plans = Plans()

    def run(call: Call) -> Tensor:
        values = values_of(call, parameters, plans)
        result = function(**values)
        output = values["out"] if result is None else result[0] if isinstance(result, tuple) else result
        return output[:, 0] if "cache_seqlens" in parameters else output

    return _with_our_parameters(name, run, function)


def _flashinfer_wrapper(wrapper_class: Any) -> Callable[[Call], Tensor]:
    """BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper, BatchPrefillWithRaggedKVCacheWrapper."""
    plans, parameters = Plans(), inspect.signature(wrapper_class.plan).parameters

    def run(call: Call) -> Tensor:
        is_paged = "page_size" in parameters
        if is_paged != (call.block_tables is not None):
            raise NotImplementedError("packed keys" if is_paged else "keys in a paged cache")

        def plan() -> Any:
            wrapper = wrapper_class(_workspace(call.query.device), "NHD")
            pages = _pages(call, Plans(), call.key.shape[1])._asdict()
            values = {
                **{f"{prefix}{name}": value for prefix in ("", "kv_", "paged_kv_") for name, value in pages.items()},
                "qo_indptr": call.cu_seqlens_q,
                "num_qo_heads": call.query.shape[1],
                "num_kv_heads": call.key.shape[-2],
                **dict.fromkeys(("head_dim", "head_dim_qk"), call.query.shape[2]),
                "page_size": call.key.shape[1],
                "causal": True,
                "sm_scale": call.scale,
                "q_data_type": call.query.dtype,
            }
            wrapper.plan(**{name: value for name, value in values.items() if name in parameters})
            return wrapper

        keys = ((call.key, call.value),) if is_paged else (call.key, call.value)
        lengths = call.context_lens if call.block_tables is None else call.block_tables
        return plans.get(lengths, plan).run(call.query, *keys)

    return run


@cache
def _workspace(device: torch.device) -> Tensor:
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


# --- our side ---


def _with_our_parameters(name: str, run: Callable[[Call], Tensor], function: Any) -> Callable[..., Tensor]:
    package = (getattr(function, "__module__", None) or "").partition(".")[0]

    def checked(call: Call) -> Tensor:
        reason = unsupported_reason(package, call)
        if reason:
            raise NotImplementedError(reason)
        return run(call) if len(call.query) else torch.empty_like(call.query)

    def paged_attention(
        query: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_tables: Tensor,
        context_lens: Tensor,
        scale: float | None = None,
    ) -> Tensor:
        bounds = torch.arange(len(query) + 1, dtype=torch.int32, device=query.device)
        scale = query.shape[2] ** -0.5 if scale is None else scale
        call = Call(query, k_cache, v_cache, bounds, bounds, context_lens, block_tables, 1, scale)
        return checked(call)

    def varlen_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        scale: float | None = None,
        *,
        max_seqlen_q: int,
        block_tables: Tensor | None = None,
    ) -> Tensor:
        scale = query.shape[2] ** -0.5 if scale is None else scale
        lens = cu_seqlens_k.diff()
        return checked(Call(query, key, value, cu_seqlens_q, cu_seqlens_k, lens, block_tables, max_seqlen_q, scale))

    return paged_attention if name == "paged_attention" else varlen_attention


def unsupported_reason(package: str, call: Call) -> str | None:
    """Why the library does not support the inputs, by its documentation; None if it may, or the package is another."""
    head_dim, block_size = call.query.shape[2], None if call.block_tables is None else call.key.shape[1]
    if package not in ("flash_attn", "flashinfer", "vllm"):
        return None
    if call.query.dtype not in HALF:
        return f"{package} takes float16 and bfloat16"
    if package == "flash_attn" and block_size is not None and block_size % 256:
        return "flash-attn takes a block_size that is a multiple of 256"
    if package == "flashinfer" and head_dim not in (64, 128, 256):
        return "FlashInfer takes a head_dim of 64, 128 or 256"
    if package == "flashinfer" and not (call.query.is_contiguous() and call.key.is_contiguous()):
        return "FlashInfer takes contiguous tensors"
    return None
