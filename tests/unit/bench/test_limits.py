"""limits: work and seconds against numbers computed by hand, and against checkpoints."""

import pytest

from nanovllm.bench import limits
from nanovllm.bench.limits import Ceilings, Limit, StepWork
from nanovllm.model_config import ModelConfig
from nanovllm.sampling_params import SamplingParams
from tests.support.checkpoints import counted_by_hand


@pytest.fixture
def model() -> ModelConfig:
    return counted_by_hand()


def test_a_shared_prefix_is_computed_once_and_read_once_a_step(model) -> None:
    """2 shared tokens and 1 and 2 others: 5 tokens; 3 + (6 - 3) + (10 - 3) pairs, since each query has all its keys.

    In the last layer, 3 of the tokens have key and value only: 8 x 4 x 2 x 1 of its 576 parameters, and no pairs.
    """
    prefill = limits.prefill_work(model, "float16", [(3, 2), (4, 2)], num_shared=2)
    assert prefill == StepWork(
        2 * (1728 + 80 + 24 * 5), 2 * (5 * 1728 - 3 * (576 - 64) + 2 * 80) + 32 * (2 * 13 + 3 + 4)
    )
    (decode,) = limits.decode_works(model, "float16", [(3, 2), (4, 2)], num_shared=2)
    assert decode == StepWork(2 * (1728 + 80 + 24 * (2 + 2 + 3)), 2 * 2 * (1728 + 80) + 96 * (4 + 5))


def test_the_limit_is_the_sum_over_steps_of_the_larger_time(model) -> None:
    """At 1 byte and 3 operations a second the prefill (3856 bytes, 15,264 operations) is bound by the matrix product,
    and the decode steps (3952 and 7904, 3856 and 4096) are bound by memory. The prefill gives the first token, so there
    are two of them, of 2 sequences and of 1. A prompt of n tokens has n (n + 1) / 2 pairs of a query and a key; a key
    and its value are 2 x 3 layers x 4 numbers of 2 bytes, a pair is 4 x 8 operations in each layer.
    """
    requests = [[1, 2, 3], [1, 2]], [SamplingParams(max_tokens=3), SamplingParams(max_tokens=2)]
    found = limits.limit(model, "float16", requests, 0, Ceilings(memory=1.0, matmul=3.0))
    assert found == Limit(15264 / 3, 3952 + 3856, "matmul", "memory")
    assert found.seconds == 5088 + 7808
    halved = limits.limit(model, "float16", requests, 0, Ceilings(memory=2.0, matmul=6.0))
    assert halved.seconds == found.seconds / 2
    without_decode = limits.limit(model, "float16", ([[1]], [SamplingParams(max_tokens=1)]), 0, Ceilings(1.0, 1e9))
    assert (without_decode.decode_seconds, without_decode.prefill_seconds > 0) == (0.0, True)
