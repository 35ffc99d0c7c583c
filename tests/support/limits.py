"""HANG_SECONDS: the one limit of waits that end only when a test hangs; and wait_until, which keeps it.

The suite's other limits in seconds are promises (tests/support/rank_engines.py: MAX_SECONDS from a rank's failure
to the error), or short waits in which something must not happen. pyproject.toml's `timeout` ends a test that hangs.
"""

import os
import time
from collections.abc import Callable

HANG_SECONDS = int(os.environ.get("NANOVLLM_TEST_HANG_SECONDS", "1800"))
"""Seconds. Beside other work a test may take a hundred times as long. Runs of mutants, many of which hang, set less."""


def wait_until(is_true: Callable[[], object], what: str = "it is true") -> None:
    """Look again and again; fail when it takes HANG_SECONDS."""
    end = time.monotonic() + HANG_SECONDS
    while not is_true():
        assert time.monotonic() < end, f"it never came about that {what}"
        time.sleep(0.001)
