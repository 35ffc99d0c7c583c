"""HANG_SECONDS: the one limit of waits that end only when a test hangs.

The suite's other limits in seconds are promises (tests/support/rank_engines.py: MAX_SECONDS from a rank's failure
to the error), or short waits in which something must not happen. pyproject.toml's `timeout` ends a test that hangs.
"""

import os

HANG_SECONDS = int(os.environ.get("NANOVLLM_TEST_HANG_SECONDS", "1800"))
"""Seconds. Beside other work a test may take a hundred times as long. Runs of mutants, many of which hang, set less."""
