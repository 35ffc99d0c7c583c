"""The bytes that a kernel must move and the operations it must do, and how long the GPU needs for them at best.

Counted is what no implementation can do without: each input read once, each output written once, weights included,
tables of integers left out (they are small). A multiplication and an addition are two operations. Letters: T tokens,
B sequences, H query heads, K kv heads, D head_dim, E hidden size, F intermediate size, V vocabulary, N experts.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Work(NamedTuple):
    """bytes_read, bytes_written, and operations on the matrix units (others are too few to matter)."""

    bytes_read: int
    bytes_written: int = 0
    operations: int = 0

    @property
    def num_bytes(self) -> int:
        return self.bytes_read + self.bytes_written


class Ceilings(NamedTuple):
    """What the GPU reached in this very run: bytes a second of copying (read plus written) and of reading alone, and
    bfloat16 operations a second of a matrix product.
    """

    copy: float
    read: float
    matmul: float


class Floor(NamedTuple):
    """The least time in seconds, and the name of the ceiling that sets it."""

    seconds: float
    ceiling: str


def floor(work: Work, ceilings: Ceilings) -> Floor:
    """The larger of the times that bytes and operations take at their ceilings.

    Bytes are held against the copy ceiling in the proportion in which they are written (a copy writes half), against
    the read ceiling for the rest. The name is that of the larger part.
    """
    copied = min(2 * work.bytes_written, work.num_bytes)
    moving = copied / ceilings.copy + (work.num_bytes - copied) / ceilings.read
    computing = work.operations / ceilings.matmul
    if computing > moving:
        return Floor(computing, "matmul")
    return Floor(moving, "copy" if 2 * copied > work.num_bytes else "read")


def store_kvcache(num_tokens: int, num_kv_heads: int, head_dim: int, itemsize: int = 2) -> Work:
    """4 T K D elements: keys and values, read and written."""
    size = 2 * num_tokens * num_kv_heads * head_dim * itemsize
    return Work(size, size)


def paged_attention(
    context_lens: Sequence[int], num_heads: int, num_kv_heads: int, head_dim: int, itemsize: int = 2
) -> Work:
    """Keys and values of every context read, B H D queries read, as many outputs written."""
    query = len(context_lens) * num_heads * head_dim * itemsize
    kv = sum(context_lens) * 2 * num_kv_heads * head_dim * itemsize
    return Work(kv + query, query, 4 * num_heads * head_dim * sum(context_lens))


def varlen_attention(
    query_lens: Sequence[int],
    key_lens: Sequence[int],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    itemsize: int = 2,
) -> Work:
    """4 H D operations a causal pair of query and key."""
    query = sum(query_lens) * num_heads * head_dim * itemsize
    kv = sum(key_lens) * 2 * num_kv_heads * head_dim * itemsize
    return Work(query + kv, query, 4 * num_heads * head_dim * num_causal_pairs(query_lens, key_lens))


def num_causal_pairs(query_lens: Sequence[int], key_lens: Sequence[int]) -> int:
    """Pairs of a query and a key that it sees: query i of q sees k - q + i + 1 of k keys."""
    pairs = zip(query_lens, key_lens, strict=True)
    return sum(q * (k - q) + q * (q + 1) // 2 for q, k in pairs)


def rms_norm(num_rows: int, size: int, itemsize: int = 2) -> Work:
    """Rows in, rows out."""
    return Work(num_rows * size * itemsize, num_rows * size * itemsize)


def add_rms_norm(num_rows: int, size: int, itemsize: int = 2) -> Work:
    """x and residual in, both results out."""
    return Work(2 * num_rows * size * itemsize, 2 * num_rows * size * itemsize)


def rotary_embedding(num_tokens: int, num_heads: int, num_kv_heads: int, head_dim: int, itemsize: int = 2) -> Work:
    """Queries and keys in and out, and a float32 angle's cosine and sine for each pair of a token."""
    size = num_tokens * (num_heads + num_kv_heads) * head_dim * itemsize
    return Work(size + num_tokens * head_dim * 4, size)


def qk_norm_rope_store(num_tokens: int, num_heads: int, num_kv_heads: int, head_dim: int, itemsize: int = 2) -> Work:
    """Queries, keys and values in; queries out, keys and values out to the cache; cosines and sines in."""
    size = num_tokens * (num_heads + 2 * num_kv_heads) * head_dim * itemsize
    return Work(size + num_tokens * head_dim * 4, size)


def silu_and_mul(num_tokens: int, size: int, itemsize: int = 2) -> Work:
    """2 F in, F out."""
    return Work(2 * num_tokens * size * itemsize, num_tokens * size * itemsize)


def sampling(num_rows: int, vocab_size: int, itemsize: int = 2) -> Work:
    """The logits, once; a token id of 8 bytes a row."""
    return Work(num_rows * vocab_size * itemsize, 8 * num_rows)


def moe_routing(num_tokens: int, num_experts: int, top_k: int, itemsize: int = 2) -> Work:
    """Logits in; out come a float32 weight and two int32, expert and place, for each choice."""
    return Work(num_tokens * num_experts * itemsize, 12 * num_tokens * top_k)


def moe_experts(
    num_tokens: int, num_experts_hit: int, top_k: int, hidden_size: int, intermediate_size: int, itemsize: int = 2
) -> Work:
    """6 T top_k E F operations; the three matrices of every expert that a token chose, tokens in, tokens out."""
    weights = num_experts_hit * 3 * hidden_size * intermediate_size * itemsize
    tokens = num_tokens * hidden_size * itemsize
    return Work(weights + tokens, tokens, 6 * num_tokens * top_k * hidden_size * intermediate_size)


def linear(num_rows: int, size_in: int, size_out: int, itemsize: int = 2) -> Work:
    """A matrix product with a weight [size_out, size_in], as of lm_head: V E + T V elements, and T E."""
    weight, rows_in, rows_out = size_in * size_out, num_rows * size_in, num_rows * size_out
    return Work((weight + rows_in) * itemsize, rows_out * itemsize, 2 * num_rows * size_in * size_out)
