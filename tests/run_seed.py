"""One seed for whatever is random in a run: the order of the tests, the global generators, Hypothesis' draws.

NANOVLLM_TEST_SEED names it; without, it is a fresh one. It stands in the environment from here on, so that xdist's
workers and the processes that tests start have the same.
"""

import os
import random

SEED = int(os.environ.setdefault("NANOVLLM_TEST_SEED", str(random.SystemRandom().randrange(2**31))))
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "dev")


def how_to_repeat() -> str:
    return f"HYPOTHESIS_PROFILE={PROFILE} NANOVLLM_TEST_SEED={SEED}"
