"""Engines with several ranks, on the CPU over gloo, and the check of one whose rank fails."""

import weakref
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams, bundled_model_path
from nanovllm.executor.base import RankError
from tests.support.counts import count_event, record_error
from tests.support.rank_faults import ERRORS, WORDS, Fault, plant
from tests.support.resource_snapshot import Watch

OPTIONS: dict[str, Any] = {
    "device": "cpu", "attention_backend": "torch", "kv_cache_block_size": 16, "num_kv_cache_blocks": 32,
    "max_model_len": 64, "max_num_seqs": 8, "max_num_batched_tokens": 64,
}  # fmt: skip
PROMPTS = [[5, 6, 7], [8, 9]]
GREEDY = SamplingParams.greedy(max_tokens=4, ignore_eos=True)
MAX_SECONDS = 10  # from a rank's failure to the error


def engine(size: int = 2, model: Path | None = None, **options: Any) -> LLM:
    """model: the bundled one by default, whose 4 heads 2 or 4 ranks can share."""
    return LLM(str(model or bundled_model_path()), tensor_parallel_size=size, **{**OPTIONS, **options})


def generate(llm: LLM) -> list[list[int]]:
    return [output["token_ids"] for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


def message_of(fault: Fault, size: int) -> str:
    if fault.what == "kill":
        return f"rank {fault.rank} of {size} was killed by SIGKILL"
    if fault.what == "exit":
        return f"rank {fault.rank} of {size} ended with exit code 3"
    return f"rank {fault.rank} of {size} failed: {ERRORS[fault.what].__name__}: {WORDS}"


def check_failure(monkeypatch: pytest.MonkeyPatch, watch: Watch, fault: Fault, size: int = 2, **options: Any) -> None:
    """Engines have the fault from now on. One with `size` ranks must raise the cause in time and leave no resources,
    although its error, and so its traceback, is still referenced. Without the error, nothing refers to the engine.
    """
    plant(monkeypatch, fault)
    before = watch.snapshot()
    engines = weakref.WeakSet[Any]()

    def run() -> None:
        with engine(size, **options) as llm:
            engines.add(llm)
            generate(llm)

    with pytest.raises(RankError if fault.rank else ERRORS[fault.what]) as caught:
        run()
    seconds = fault.seconds_since()
    assert watch.snapshot() == before
    record_error("seconds from a rank's failure to the error", seconds, MAX_SECONDS)
    assert seconds < MAX_SECONDS
    if fault.rank:
        assert str(caught.value).startswith(message_of(fault, size))
        assert isinstance(caught.value, ValueError) == (fault.what == "value")
        if fault.what in ERRORS:
            assert "in trigger\n" in str(caught.value), "the traceback of the rank that failed"
    else:
        assert str(caught.value) == WORDS
    del caught
    assert not engines
    count_event(f"a rank that failed: {fault.what} at {fault.place}")
