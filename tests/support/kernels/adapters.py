"""Adapters: attention functions with the signatures of FlashInfer, flash-attn and vLLM, called by our launchers' names.

ADAPTERS is a table. A row says for which of our kernels it is, by which parameters a signature is recognised, and how
the arguments follow from ours. A function gets those of the arguments that it has parameters for. It returns its
output, alone or as the first of several, or writes it to `out`. layer_adapters.py has the other layers.

It is one file, since a row of the table is understood with the functions that it names.
"""

import inspect
from collections.abc import Callable
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


# --- the table ---


@dataclass(frozen=True)
class Adapter:
    """arguments(call, plans): theirs by name. marks: the parameters by which such a function is recognised."""

    origin: str
    kernels: tuple[str, ...]
    marks: frozenset[str]
    arguments: Callable[[Call, Plans], dict[str, Any]]
    has_query_axis: bool = False  # query and output are [B, 1, H, D]


def _flash_attn_with_kvcache(call: Call, _: Plans) -> dict[str, Any]:
    return {
        "q": call.query[:, None],
        "k_cache": call.key,
        "v_cache": call.value,
        "cache_seqlens": call.context_lens,
        "block_table": _paged(call),
        "softmax_scale": call.scale,
        "causal": True,
    }


def _flash_attn_varlen(call: Call, _: Plans) -> dict[str, Any]:
    arguments = {
        "q": call.query,
        "k": call.key,
        "v": call.value,
        "cu_seqlens_q": call.cu_seqlens_q,
        "cu_seqlens_k": call.cu_seqlens_k,
        "max_seqlen_q": call.max_seqlen_q,
        "max_seqlen_k": call.max_seqlen_k,
        "softmax_scale": call.scale,
        "causal": True,
    }
    return arguments if call.block_tables is None else {**arguments, "block_table": call.block_tables}


def _vllm_unified(call: Call, _: Plans) -> dict[str, Any]:
    return {
        "q": call.query,
        "k": call.key,
        "v": call.value,
        "out": torch.empty_like(call.query),
        "cu_seqlens_q": call.cu_seqlens_q,
        "max_seqlen_q": call.max_seqlen_q,
        "seqused_k": call.context_lens,
        "max_seqlen_k": call.max_seqlen_k,
        "softmax_scale": call.scale,
        "causal": True,
        "window_size": (-1, -1),
        "block_table": _paged(call),
        "softcap": 0.0,
        **dict.fromkeys(("q_descale", "k_descale", "v_descale")),
    }


def _flashinfer_paged(call: Call, plans: Plans) -> dict[str, Any]:
    tables = _paged(call)
    pages = plans.get(tables, lambda: pages_of(tables, call.context_lens, call.key.shape[1]))
    return {
        "q": call.query,
        "k_cache": call.key,
        "v_cache": call.value,
        "qo_indptr": call.cu_seqlens_q,
        "kv_indptr": pages.indptr,
        "kv_indices": pages.indices,
        "kv_last_page_len": pages.last_page_len,
        "sm_scale": call.scale,
    }


def _flashinfer_slots(call: Call, plans: Plans) -> dict[str, Any]:
    """Pages of one token, without last_page_len: a slot is a page."""
    tables, block_size = _paged(call), call.key.shape[1]

    def slots() -> Pages:
        positions = torch.arange(call.max_seqlen_k, device=tables.device)
        of_positions = tables[:, positions // block_size] * block_size + positions % block_size
        return pages_of(of_positions.int(), call.context_lens, 1)

    pages = plans.get(tables, slots)
    return {
        "q": call.query,
        "k_cache": call.key.flatten(0, 1)[:, None],
        "v_cache": call.value.flatten(0, 1)[:, None],
        "qo_indptr": call.cu_seqlens_q,
        "kv_indptr": pages.indptr,
        "kv_indices": pages.indices,
        "sm_scale": call.scale,
    }


def _own_reference(call: Call, _: Plans) -> dict[str, Any]:
    return {
        "query": call.query,
        "k_cache": call.key,
        "v_cache": call.value,
        "block_tables": _paged(call),
        "context_lens": call.context_lens,
        "cu_seqlens_q": call.cu_seqlens_q,
        "scale": call.scale,
    }


def _flashinfer_ragged(call: Call, _: Plans) -> dict[str, Any]:
    if call.block_tables is not None:
        raise NotImplementedError("keys in a paged cache")
    return {
        "q": call.query,
        "k": call.key,
        "v": call.value,
        "qo_indptr": call.cu_seqlens_q,
        "kv_indptr": call.cu_seqlens_k,
        "sm_scale": call.scale,
    }


def _paged(call: Call) -> Tensor:
    if call.block_tables is None:
        raise NotImplementedError("packed keys")
    return call.block_tables


ADAPTERS = (
    Adapter(
        "flash-attn's flash_attn_with_kvcache", ("paged_attention",),
        frozenset({"q", "k_cache", "v_cache", "cache_seqlens", "block_table"}), _flash_attn_with_kvcache, True,
    ),
    Adapter(
        "vLLM's unified_attention", ("paged_attention", *PREFILL),
        frozenset({"q", "k", "v", "out", "cu_seqlens_q", "seqused_k", "block_table"}), _vllm_unified,
    ),
    Adapter(
        "flash-attn's flash_attn_varlen_func", PREFILL,
        frozenset({"q", "k", "v", "cu_seqlens_q", "cu_seqlens_k"}), _flash_attn_varlen,
    ),
    Adapter(
        "FlashInfer's pages", ("paged_attention", *PREFILL),
        frozenset({"q", "k_cache", "v_cache", "kv_indptr", "kv_indices", "kv_last_page_len"}), _flashinfer_paged,
    ),
    Adapter(
        "FlashInfer's pages of one token", ("paged_attention", *PREFILL),
        frozenset({"q", "k_cache", "v_cache", "kv_indptr", "kv_indices"}), _flashinfer_slots,
    ),
    Adapter(
        "FlashInfer's packed keys", PREFILL,
        frozenset({"q", "k", "v", "qo_indptr", "kv_indptr"}), _flashinfer_ragged,
    ),
    Adapter(
        "our reference.paged_attention", PREFILL,
        frozenset({"query", "k_cache", "v_cache", "block_tables", "context_lens", "cu_seqlens_q"}), _own_reference,
    ),
)  # fmt: skip


def adapt(name: str, function: Any) -> Callable[..., Any]:
    """`function` with the parameters of our launcher `name`, if a row or a FlashInfer wrapper fits; else as it is."""
    if inspect.isclass(function) and hasattr(function, "plan") and hasattr(function, "run"):
        return _with_our_parameters(name, _flashinfer_wrapper(function), function)
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return function
    row = next((row for row in ADAPTERS if name in row.kernels and row.marks <= parameters.keys()), None)
    if row is None:
        return function
    plans = Plans()

    def run(call: Call) -> Tensor:
        arguments = row.arguments(call, plans)
        absent = {"block_table"} & arguments.keys() - parameters.keys()
        if absent:
            raise NotImplementedError("keys in a paged cache")
        result = function(**{name: value for name, value in arguments.items() if name in parameters})
        output = arguments["out"] if result is None else result[0] if isinstance(result, tuple) else result
        return output[:, 0] if row.has_query_axis else output

    return _with_our_parameters(name, run, function)


def _flashinfer_wrapper(wrapper_class: Any) -> Callable[[Call], Tensor]:
    """BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper, BatchPrefillWithRaggedKVCacheWrapper."""
    plans, parameters = Plans(), inspect.signature(wrapper_class.plan).parameters

    def run(call: Call) -> Tensor:
        is_paged = "page_size" in parameters
        if is_paged != (call.block_tables is not None):
            raise NotImplementedError("packed keys" if is_paged else "keys in a paged cache")
        lengths = call.context_lens if call.block_tables is None else call.block_tables

        def plan() -> Any:
            wrapper = wrapper_class(_workspace(call.query.device), "NHD")
            pages = Pages(call.cu_seqlens_k, call.cu_seqlens_k, call.cu_seqlens_k)
            if call.block_tables is not None:
                pages = pages_of(call.block_tables, call.context_lens, call.key.shape[1])
            values = {
                "indptr": pages.indptr,
                "indices": pages.indices,
                "last_page_len": pages.last_page_len,
                "kv_indptr": pages.indptr,
                "paged_kv_indptr": pages.indptr,
                "paged_kv_indices": pages.indices,
                "paged_kv_last_page_len": pages.last_page_len,
                "qo_indptr": call.cu_seqlens_q,
                "num_qo_heads": call.query.shape[1],
                "num_kv_heads": call.key.shape[-2],
                "head_dim": call.query.shape[2],
                "head_dim_qk": call.query.shape[2],
                "page_size": call.key.shape[1],
                "causal": True,
                "sm_scale": call.scale,
                "q_data_type": call.query.dtype,
            }
            wrapper.plan(**{name: value for name, value in values.items() if name in parameters})
            return wrapper

        keys = ((call.key, call.value),) if is_paged else (call.key, call.value)
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
