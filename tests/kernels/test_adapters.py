"""Functions and classes with the signatures of FlashInfer, flash-attn and vLLM, run on the cases of our kernels.

Here they are fakes: the libraries' parameters, which were read from their documentation, over our references. Each fake
refuses what its library does not document. On a GPU machine, the libraries themselves run where they are installed.
"""

import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from reference.packing import varlen_attention
from reference.paged_attention import paged_attention
from tests.kernels import paged_attention_cases, varlen_attention_cases
from tests.support.kernels import adapters, own_kernels
from tests.support.kernels.interpreting import failure_of
from tests.support.kernels.reaching import flash_attn_varlen_func, flash_attn_with_kvcache

# --- vLLM ---


def unified_attention(
    q, k, v, out, cu_seqlens_q, max_seqlen_q, seqused_k, max_seqlen_k, softmax_scale, causal, window_size, block_table,
    softcap, q_descale, k_descale, v_descale, alibi_slopes=None, sinks=None,
):  # fmt: skip
    assert (causal, window_size, softcap) == (True, (-1, -1), 0)
    assert (q_descale, k_descale, v_descale) == (None, None, None)
    assert max_seqlen_q >= cu_seqlens_q.diff().max()
    assert max_seqlen_k >= seqused_k.max()
    out.copy_(paged_attention(q, k, v, block_table, seqused_k, cu_seqlens_q, softmax_scale))


# --- FlashInfer ---


def tables_of(indptr, indices, last_page_len, page_size):
    """(block_tables, context_lens) of FlashInfer's pages; a missing place of a table is a page that there is not."""
    assert indptr.dtype == indices.dtype == last_page_len.dtype == torch.int32
    rows = [indices[start:end] for start, end in zip(indptr[:-1].tolist(), indptr[1:].tolist(), strict=True)]
    tables = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=2**30)
    return tables, (indptr.diff() - 1).clamp(min=0) * page_size + last_page_len


def paged_decode(q, k_cache, v_cache, kv_indptr, kv_indices, kv_last_page_len, sm_scale):
    """As definitions of gqa_paged in FlashInfer-Trace: returns (output, lse)."""
    tables, lens = tables_of(kv_indptr, kv_indices, kv_last_page_len, k_cache.shape[1])
    return paged_attention(q, k_cache, v_cache, tables, lens, scale=sm_scale), None


def paged_prefill(q, k_cache, v_cache, qo_indptr, kv_indptr, kv_indices, kv_last_page_len, sm_scale):
    tables, lens = tables_of(kv_indptr, kv_indices, kv_last_page_len, k_cache.shape[1])
    return paged_attention(q, k_cache, v_cache, tables, lens, qo_indptr, sm_scale), None


def ragged_prefill(q, k, v, qo_indptr, kv_indptr, sm_scale):
    return varlen_attention(q, k, v, qo_indptr, kv_indptr, sm_scale), None


class BatchDecodeWithPagedKVCacheWrapper:
    def __init__(self, float_workspace_buffer, kv_layout="NHD"):
        assert (float_workspace_buffer.dtype, kv_layout) == (torch.uint8, "NHD")

    def plan(
        self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, q_data_type="float16",
        sm_scale=None,
    ):  # fmt: skip
        self.shape, self.dtype = (num_qo_heads, head_dim), q_data_type
        self.tables, self.lens = tables_of(indptr, indices, last_page_len, page_size)
        self.cu_seqlens_q, self.scale = None, sm_scale

    def run(self, q, paged_kv_cache):
        assert (tuple(q.shape[1:]), q.dtype) == (self.shape, self.dtype)
        return paged_attention(q, *paged_kv_cache, self.tables, self.lens, self.cu_seqlens_q, self.scale)


class BatchPrefillWithPagedKVCacheWrapper(BatchDecodeWithPagedKVCacheWrapper):
    def plan(
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads,
        head_dim_qk, page_size, causal=False, sm_scale=None, q_data_type="float16",
    ):  # fmt: skip
        assert causal
        pages = paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len
        super().plan(*pages, num_qo_heads, num_kv_heads, head_dim_qk, page_size, q_data_type, sm_scale)
        self.cu_seqlens_q = qo_indptr


class BatchPrefillWithRaggedKVCacheWrapper(BatchDecodeWithPagedKVCacheWrapper):
    def plan(
        self, qo_indptr, kv_indptr, num_qo_heads, num_kv_heads, head_dim_qk, causal=False, sm_scale=None,
        q_data_type="float16",
    ):  # fmt: skip
        assert (causal, q_data_type) == (True, torch.float32)
        self.bounds, self.scale = (qo_indptr, kv_indptr), sm_scale

    def run(self, q, k, v):
        return varlen_attention(q, k, v, *self.bounds, self.scale)


def own_reference(query, k_cache, v_cache, block_tables, context_lens, cu_seqlens_q, scale):
    """As the definition that tools.flashinfer_trace writes of reference.paged_attention for prefill."""
    return paged_attention(query, k_cache, v_cache, block_tables, context_lens, cu_seqlens_q, scale)


DECODE = (flash_attn_with_kvcache, unified_attention, paged_decode, BatchDecodeWithPagedKVCacheWrapper)
PREFILL_PAGED = (
    flash_attn_varlen_func,
    unified_attention,
    paged_prefill,
    BatchPrefillWithPagedKVCacheWrapper,
    own_reference,
)
PREFILL_PACKED = (flash_attn_varlen_func, ragged_prefill, BatchPrefillWithRaggedKVCacheWrapper)


@pytest.fixture(autouse=True)
def _ours_again() -> Iterator[None]:
    yield
    own_kernels.install([])


def judged(kernel: str, function: Any, check: Any) -> str:
    """What the case says of the function, "" if it passes."""
    own_kernels.install([f"{kernel}={function.__module__}:{function.__qualname__}"])
    return failure_of(check, "cpu")


@pytest.mark.parametrize("name", ["ragged", "no context", "no sequences", "7 query heads a kv head", "strides"])
@pytest.mark.parametrize("function", DECODE)
def test_decode_passes_our_cases(function: Any, name: str) -> None:
    assert not judged("paged_attention", function, paged_attention_cases.CASES[name])


@pytest.mark.parametrize("name", ["cached keys", "sequences of nothing", "strides, paged"])
@pytest.mark.parametrize("function", PREFILL_PAGED)
def test_prefill_over_a_paged_cache_passes_our_cases(function: Any, name: str) -> None:
    assert not judged("varlen_attention", function, varlen_attention_cases.CASES[name])


@pytest.mark.parametrize("name", ["packed keys", "packed keys, more than queries", "strides, packed"])
@pytest.mark.parametrize("function", PREFILL_PACKED)
def test_prefill_of_packed_keys_passes_our_cases(function: Any, name: str) -> None:
    assert not judged("varlen_attention", function, varlen_attention_cases.CASES[name])


@pytest.mark.parametrize(
    ("function", "name", "reason"),
    [
        (unified_attention, "packed keys", "packed keys"),
        (paged_prefill, "packed keys", "packed keys"),
        (BatchPrefillWithPagedKVCacheWrapper, "packed keys", "packed keys"),
        (ragged_prefill, "cached keys", "keys in a paged cache"),
        (BatchPrefillWithRaggedKVCacheWrapper, "cached keys", "keys in a paged cache"),
    ],
)
def test_a_layout_that_it_does_not_have_judges_nothing(function: Any, name: str, reason: str) -> None:
    with pytest.raises(own_kernels.NotJudged, match=f"does not support the inputs: {reason}"):
        judged("varlen_attention", function, varlen_attention_cases.CASES[name])


def one_key_less(q, k_cache, v_cache, cache_seqlens, block_table, softmax_scale, causal):
    lens = (cache_seqlens - 1).clamp(min=0)
    return flash_attn_with_kvcache(q, k_cache, v_cache, None, None, lens, block_table, softmax_scale, causal)


def one_page_less(q, k_cache, v_cache, kv_indptr, kv_indices, kv_last_page_len, sm_scale):
    return paged_decode(
        q, k_cache, v_cache, kv_indptr.clamp(max=int(kv_indptr[-1]) - 1), kv_indices, kv_last_page_len, sm_scale
    )


@pytest.mark.parametrize("function", [one_key_less, one_page_less])
def test_a_wrong_function_behind_an_adapter_fails(function: Any) -> None:
    text = judged("paged_attention", function, paged_attention_cases.CASES["ragged"])
    assert "paged_attention differs from its reference in" in text
    assert "the worst is at sequence " in text


def test_every_signature_of_the_table_is_tried_here() -> None:
    functions = [*DECODE, *PREFILL_PAGED, *PREFILL_PACKED]
    names = [set(inspect.signature(function).parameters) for function in functions]
    assert all(any(marks <= one for one in names) for marks in adapters.SIGNATURES_OF)


# --- the libraries themselves ---

LIBRARIES = [
    ("paged_attention", "flash_attn", "flash_attn_with_kvcache"),
    ("varlen_attention", "flash_attn", "flash_attn_varlen_func"),
    ("paged_attention", "flashinfer", "BatchDecodeWithPagedKVCacheWrapper"),
    ("varlen_attention", "flashinfer", "BatchPrefillWithPagedKVCacheWrapper"),
    ("paged_attention", "vllm.v1.attention.ops.triton_unified_attention", "unified_attention"),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("kernel", "module", "function"), LIBRARIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_library_passes_our_cases_on_a_gpu(kernel: str, module: str, function: str, dtype: torch.dtype) -> None:
    pytest.importorskip(module)
    library = getattr(importlib.import_module(module), function)
    cases = paged_attention_cases if kernel == "paged_attention" else varlen_attention_cases
    lengths = paged_attention_cases.decode(5, 700, 256) if kernel == "paged_attention" else ((5, 300), (40, 40))
    case = cases.Case(lengths, 256, 16, 8, 128, dtype)
    own_kernels.install([f"{kernel}={module}:{library.__qualname__}"])
    assert not failure_of(case, "cuda")
