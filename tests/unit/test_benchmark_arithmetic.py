"""What benchmarks count as bytes and operations, against sums that can be checked by hand."""

import pytest

from benchmarks import arithmetic
from benchmarks.arithmetic import Ceilings, Work
from benchmarks.kernels.grouped_gemm import work_of_experts
from benchmarks.shapes import Shape
from tests.support.kernels.registry import kernels

# 2 query heads and 1 kv head of 4, hidden size 5, intermediate size 5, no experts
SMALL = Shape(2, 1, 4, 5, 5, 10)


@pytest.mark.parametrize(
    ("name", "point", "work"),
    [
        # one token of 1 kv head of 4: 4 keys and 4 values of 2 bytes
        ("store_kvcache", (SMALL, 1), Work(16, 16)),
        # contexts of 3 and 5 tokens, 1 kv head of 4: 8 keys and 8 values of 4; 2 queries of 2 heads of 4
        ("paged_attention", ([3, 5], 2, 1, 4, 16), Work(8 * 2 * 4 * 2 + 2 * 2 * 4 * 2, 2 * 2 * 4 * 2, 4 * 2 * 4 * 8)),
        # 2 queries behind 1 cached token: they see 2 and 3 keys
        ("varlen_attention", ([2], 1, 1, 1, 4), Work(2 * 4 * 2 + 3 * 2 * 4 * 2, 2 * 4 * 2, 4 * 4 * 5)),
        ("rms_norm", (SMALL, 3), Work(30, 30)),
        ("add_rms_norm", (SMALL, 3), Work(60, 60)),
        # 1 token, 2 + 1 heads of 4, and 2 cosines and 2 sines of 4 bytes
        ("rotary_embedding", (SMALL, 1), Work(24 + 16, 24)),
        ("qk_norm_rope_store", (SMALL, 1), Work(32 + 16, 32)),
        ("silu_and_mul", (SMALL, 3), Work(60, 30)),
        ("sampling", (2, 10, True), Work(40, 16)),
        ("moe_routing", (SMALL._replace(num_experts=8, top_k=2), 3), Work(96, 72)),
    ],
)
def test_bytes_and_operations_of_small_cases(name, point, work):
    measured = next(kernel.measured[name] for kernel in kernels().values() if name in kernel.measured)
    assert measured(*point).work == work


def test_bytes_and_operations_of_experts():
    """3 tokens of 2 experts each, of which 4 were hit; matrices of 5 x 7."""
    assert work_of_experts(3, 4, 2, 5, 7) == Work(4 * 3 * 35 * 2 + 30, 30, 6 * 3 * 2 * 35)


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
