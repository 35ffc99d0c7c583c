"""A custom attention kernel in Triton, compared with the reference and tested by the suite.

    python -m examples.custom_attention        # on a GPU, or slowly in Triton's interpreter
    python -m pytest tests/kernels --kernel paged_attention=examples/custom_attention.py:paged_attention

The first command compares it with reference.paged_attention on one batch. The second runs the suite's cases of
paged_attention on it: ragged lengths, padded rows, group sizes, strides, caches full of NaN and beyond 2**31 elements,
three dtypes.

The kernel is correct and simple: one program for each sequence and query head walks the block table and keeps a
running maximum and sum (Milakov and Gimelshein 2018, arXiv 1805.02867). It reads a key once for every query head that
shares it, which nanovllm/kernels/paged_attention.py avoids, and it does not split long sequences.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it at import

import triton
import triton.language as tl


def paged_attention(
    query: torch.Tensor,  # [num_seqs, num_heads, head_dim]
    k_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim], as v_cache
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,  # [num_seqs, max_blocks] int32
    context_lens: torch.Tensor,  # [num_seqs] int32
    scale: float | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one query a sequence to its first context_lens cached keys; zeros if there are none."""
    num_seqs, num_heads, head_dim = query.shape
    _, block_size, num_kv_heads, _ = k_cache.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device) if out is None else out
    if num_seqs:
        paged_attention_kernel[(num_seqs, num_heads)](
            *(query, k_cache, v_cache, block_tables, context_lens, out),
            head_dim**-0.5 if scale is None else scale,
            *(
                *query.stride()[:2],
                *k_cache.stride()[:3],
                *v_cache.stride()[:3],
                block_tables.stride(0),
                *out.stride()[:2],
            ),
            BLOCK_SIZE=block_size,
            HEAD_DIM=head_dim,
            GROUP_SIZE=num_heads // num_kv_heads,
            WIDE=tl.float64 if query.dtype == torch.float32 else tl.float32,
        )
    return out


@triton.jit
def paged_attention_kernel(
    query_ptr,
    k_cache_ptr,
    v_cache_ptr,
    block_tables_ptr,
    context_lens_ptr,
    out_ptr,
    scale,
    query_seq_stride,
    query_head_stride,
    k_block_stride,
    k_slot_stride,
    k_head_stride,
    v_block_stride,
    v_slot_stride,
    v_head_stride,
    table_stride,
    out_seq_stride,
    out_head_stride,
    BLOCK_SIZE: tl.constexpr,  # a power of two, as is HEAD_DIM
    HEAD_DIM: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    WIDE: tl.constexpr,
):
    seq = tl.program_id(0).to(tl.int64)  # int64: products with strides may exceed 2**31
    head = tl.program_id(1).to(tl.int64)
    kv_head = head // GROUP_SIZE
    dim = tl.arange(0, HEAD_DIM)
    slot = tl.arange(0, BLOCK_SIZE)
    query = tl.load(query_ptr + seq * query_seq_stride + head * query_head_stride + dim).to(WIDE)
    context_len = tl.load(context_lens_ptr + seq)
    largest = tl.full([1], float("-inf"), WIDE)
    total = tl.zeros([1], WIDE)
    weighted = tl.zeros([HEAD_DIM], WIDE)
    for start in range(0, context_len, BLOCK_SIZE):
        block = tl.load(block_tables_ptr + seq * table_stride + start // BLOCK_SIZE).to(tl.int64)
        is_key = start + slot < context_len  # slots beyond may hold NaN and are not read
        k_offsets = block * k_block_stride + slot * k_slot_stride + kv_head * k_head_stride
        v_offsets = block * v_block_stride + slot * v_slot_stride + kv_head * v_head_stride
        key = tl.load(k_cache_ptr + k_offsets[:, None] + dim, mask=is_key[:, None], other=0.0).to(WIDE)
        value = tl.load(v_cache_ptr + v_offsets[:, None] + dim, mask=is_key[:, None], other=0.0).to(WIDE)
        scores = tl.where(is_key, tl.sum(key * query, axis=1) * scale, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=0))
        shrink = tl.exp(largest - new_largest)  # rescales the sums so far to the new maximum
        weights = tl.exp(scores - new_largest)
        total = total * shrink + tl.sum(weights, axis=0)
        weighted = weighted * shrink + tl.sum(weights[:, None] * value, axis=0)
        largest = new_largest
    output = tl.where(context_len > 0, weighted / tl.maximum(total, 1e-30), 0.0)
    tl.store(out_ptr + seq * out_seq_stride + head * out_head_stride + dim, output.to(out_ptr.dtype.element_ty))


def main() -> None:
    from reference.paged_attention import paged_attention as reference_paged_attention

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 4, 32, generator=generator).to(device)
    k_cache, v_cache = (torch.randn(8, 16, 2, 32, generator=generator).to(device) for _ in range(2))
    block_tables = torch.tensor([[6, 1, 3], [0, -1, -1], [-1, -1, -1]], dtype=torch.int32, device=device)
    context_lens = torch.tensor([41, 5, 0], dtype=torch.int32, device=device)
    output = paged_attention(query, k_cache, v_cache, block_tables, context_lens)
    expected = reference_paged_attention(
        *(tensor.double() for tensor in (query, k_cache, v_cache)), block_tables, context_lens
    )
    error = (output.double() - expected).abs().max().item()
    print(f"sequences of {context_lens.tolist()} keys on {device}: largest difference from the reference {error:.1e}")
    assert error < 1e-5


if __name__ == "__main__":
    main()
