"""The old names of tests/support/counts.py, for tests/kernels."""

from tests.support.counts import COMPILED, INTERPRETED, ON_A_GPU
from tests.support.counts import count_comparisons as compared
from tests.support.counts import count_event as happened
from tests.support.counts import count_kernel_comparisons as compared_kernel
from tests.support.counts import record_error as tolerated

__all__ = ["COMPILED", "INTERPRETED", "ON_A_GPU", "compared", "compared_kernel", "happened", "tolerated"]
