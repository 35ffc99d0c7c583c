"""benchmarks/arithmetic.py against sums that can be checked by hand, and against PERFORMANCE's formulas."""

import pytest

from benchmarks import arithmetic
from benchmarks.arithmetic import Ceilings, Work


@pytest.mark.parametrize(
    ("work", "bytes_read", "bytes_written", "operations"),
    [
        # one token of 2 kv heads of 4: 8 keys and 8 values of 2 bytes
        (arithmetic.store_kvcache(1, 2, 4), 32, 32, 0),
        # contexts of 3 and 5 tokens, 1 kv head of 4: 8 keys and 8 values of 4; 2 queries of 2 heads of 4
        (arithmetic.paged_attention([3, 5], 2, 1, 4), 8 * 2 * 4 * 2 + 2 * 2 * 4 * 2, 2 * 2 * 4 * 2, 4 * 2 * 4 * 8),
        # 2 queries behind 1 cached token: they see 2 and 3 keys
        (arithmetic.varlen_attention([2], [3], 1, 1, 4), 2 * 4 * 2 + 3 * 2 * 4 * 2, 2 * 4 * 2, 4 * 4 * 5),
        (arithmetic.rms_norm(3, 5), 30, 30, 0),
        (arithmetic.add_rms_norm(3, 5), 60, 60, 0),
        # 1 token, 2 + 1 heads of 4, and 2 cosines and 2 sines of 4 bytes
        (arithmetic.rotary_embedding(1, 2, 1, 4), 24 + 16, 24, 0),
        (arithmetic.qk_norm_rope_store(1, 2, 1, 4), 32 + 16, 32, 0),
        (arithmetic.silu_and_mul(3, 5), 60, 30, 0),
        (arithmetic.sampling(2, 10), 40, 16, 0),
        (arithmetic.moe_routing(3, 8, 2), 48, 72, 0),
        # 3 tokens of 2 experts each, of which 4 were hit; matrices of 5 x 7
        (arithmetic.moe_experts(3, 4, 2, 5, 7), 4 * 3 * 35 * 2 + 30, 30, 6 * 3 * 2 * 35),
        (arithmetic.linear(3, 5, 7), (35 + 15) * 2, 42, 2 * 3 * 35),
    ],
)
def test_bytes_and_operations_of_small_cases(work, bytes_read, bytes_written, operations):
    assert work == Work(bytes_read, bytes_written, operations)


def test_bytes_of_real_shapes_are_those_of_the_published_formulas():
    """store 4 N K D 2; decode sum(context) 2 K D 2 + 2 N H D 2; norm 2 N H 2, with residual 4 N H 2."""
    n, h, k, d, contexts = 256, 16, 8, 128, [100, 1800, 1024]
    assert arithmetic.store_kvcache(n, k, d).num_bytes == 4 * n * k * d * 2
    assert arithmetic.paged_attention(contexts, h, k, d).num_bytes == sum(contexts) * 2 * k * d * 2 + 2 * 3 * h * d * 2
    assert arithmetic.rms_norm(n, 1024).num_bytes == 2 * n * 1024 * 2
    assert arithmetic.add_rms_norm(n, 1024).num_bytes == 4 * n * 1024 * 2
    assert arithmetic.linear(n, 1024, 151936).num_bytes == (151936 * 1024 + n * 151936 + n * 1024) * 2


@pytest.mark.parametrize(("query_len", "key_len"), [(1, 1), (1, 9), (4, 4), (3, 10)])
def test_causal_pairs_are_the_ones_of_a_mask(query_len, key_len):
    pairs = sum(key <= key_len - query_len + query for query in range(query_len) for key in range(key_len))
    assert arithmetic.num_causal_pairs([query_len, 2], [key_len, 2]) == pairs + 3


@pytest.mark.parametrize(
    ("work", "seconds", "ceiling"),
    [
        (Work(100, 100), 2.0, "copy"),  # 200 bytes copied at 100 a second
        (Work(100, 0), 0.5, "read"),  # 100 bytes read at 200 a second
        (Work(300, 100), 2.0 + 1.0, "read"),  # 200 copied, the other 200 only read
        (Work(100, 0, operations=3000), 3.0, "matmul"),  # 3000 operations at 1000 a second: longer than the reading
        (Work(100, 0, operations=100), 0.5, "read"),
    ],
)
def test_the_floor_is_the_slower_of_moving_and_computing(work, seconds, ceiling):
    floor = arithmetic.floor(work, Ceilings(copy=100.0, read=200.0, matmul=1000.0))
    assert floor.seconds == pytest.approx(seconds)
    assert floor.ceiling == ceiling
