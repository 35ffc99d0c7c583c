"""HANG_SECONDS: the one limit of everything that only guards against waiting for ever.

The suite's other limits in seconds are promises (parallel/test_failures.py: MAX_SECONDS from a rank's failure to the
error), or short waits in which something must not happen. pyproject.toml's `timeout` ends a whole test that hangs.
"""

import os

HANG_SECONDS = int(os.environ.get("NANOVLLM_TEST_HANG_SECONDS", "1800"))
"""Seconds. What takes seconds on a machine of its own may take a hundred times as long beside other work, and a long
limit costs nothing: only what hangs waits for its end. Of mutants many hang, so their runs set a shorter one."""
