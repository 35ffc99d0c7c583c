"""The old name of tests/support/comparing.py, for tests/kernels."""

from tests.support.comparing import assert_close, assert_equal, assert_within

__all__ = ["assert_close", "assert_equal", "assert_within"]
