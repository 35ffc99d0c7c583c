"""The engine with 2 and 4 ranks against reference/: the same tokens, and logits within float32's rounding.

Real processes over gloo, so the other ranks see nothing but pickled sequences. test_engine_against_reference.py has the
scenario, in which requests are preempted, chunked, cached and aborted, and its checks. A sum over ranks is another
order of the same additions, so the bound on the logits is the same.
"""

from dataclasses import replace
from typing import Any

import pytest

from nanovllm import bundled_model_path
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.executor.multiproc import MultiprocExecutor
from tests.e2e.test_engine_against_reference import CROWDED, EVENTS, MAX_MODEL_LEN, run
from tests.support.counts import count_event
from tests.support.engine_events import assert_occurred
from tests.support.model_probe import make_runner
from tests.support.oracle import Oracle
from tests.support.tiny_models import tiny_model


@pytest.mark.parametrize(
    ("architecture", "size", "block_size"),
    [
        ("llama", 2, 4),
        ("qwen2", 4, 1),  # four query heads and two key/value heads, which four ranks replicate
        ("qwen3_moe", 2, 2),
    ],
)
def test_ranks_give_what_the_reference_gives(architecture: str, size: int, block_size: int) -> None:
    """D30 D37 D39: tokens of several ranks are the reference's, and so, up to rounding, are rank 0's logits.

    unit/models/test_models.py has every architecture, number of ranks and of key/value heads; the next test has qwen3.
    """
    oracle = Oracle(tiny_model(architecture), MAX_MODEL_LEN)
    scenario = replace(CROWDED, block_size=block_size)
    events = run(str(oracle.model_dir), scenario, oracle, tensor_parallel_size=size)
    assert_occurred(events, ["preemption", "prefill chunk", "block hit", "abort"])
    for event in EVENTS:
        count_event(f"{event} with several ranks", events[event])
    assert oracle.num_excused == 0  # so that tokens are compared one by one


def test_async_scheduling_with_several_ranks_gives_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is sent before the tokens of the one before are known, which each rank has, or rank 0 broadcasts. Some of
    the sequences that decode are not in the step before, which is a prefill: their tokens are known.
    """
    kinds, execute = set(), MultiprocExecutor.execute

    def recording_execute(executor: Any, batch: Any, *previous: Any) -> Any:
        kinds.update(set(batch.sequences) <= set(pending.batch.sampled_sequences) for pending in previous if pending)
        return execute(executor, batch, *previous)

    monkeypatch.setattr(MultiprocExecutor, "execute", recording_execute)
    oracle = Oracle(tiny_model("qwen3"), MAX_MODEL_LEN)
    run(str(oracle.model_dir), replace(CROWDED, is_async=True), oracle, tensor_parallel_size=2)
    assert kinds == {True, False}
    assert oracle.num_excused == 0


def test_the_number_of_blocks_is_the_minimum_over_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """D30: another rank has room for 7. unit/distributed/test_tensor_parallel.py has the minimum of real ranks."""
    monkeypatch.setattr(TensorParallel, "all_reduce_min", lambda tp, value: min(value, 7))
    runner = make_runner(bundled_model_path(), device="cpu", max_num_seqs=512)
    assert runner.num_kv_cache_blocks == runner.kv_cache.shape[2] == 7
