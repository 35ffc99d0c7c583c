"""Engines, prompts and helpers of the end-to-end tests. Tests share engines, since a start takes longer than a test."""

import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams, bundled_model_path
from tests.support.block_invariants import check_invariants
from tests.support.poison import poisoned_llm

BUNDLED_OPTIONS: dict[str, Any] = {
    "device": "cpu",
    "attention_backend": "torch",
    "kv_cache_block_size": 16,
    "num_kv_cache_blocks": 64,
    "max_model_len": 512,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 256,
}
GREEDY = SamplingParams.greedy(max_tokens=12)
PROMPTS = ["In the beginning", "The LORD is my shepherd", "And God said"]
# Parameters of eight requests that end at different steps: by a stop token, a stop string or their length.
PARAMS = [
    GREEDY,
    SamplingParams(seed=3, max_tokens=20),
    SamplingParams.greedy(max_tokens=40, stop="the"),
    SamplingParams.greedy(max_tokens=1),
    SamplingParams(temperature=0.7, top_k=20, top_p=0.9, seed=4, max_tokens=30),
    SamplingParams.greedy(max_tokens=25, stop_token_ids=list(range(0, 400, 7))),
    SamplingParams(min_p=0.05, seed=5, max_tokens=9),
    SamplingParams.greedy(max_tokens=33, ignore_eos=True),
]


def bundled_llm(model: Path | None = None, **options: Any) -> LLM:
    """An engine of `model`, or of the bundled model. `options` override BUNDLED_OPTIONS."""
    return LLM(str(model or bundled_model_path()), **{**BUNDLED_OPTIONS, **options})


@pytest.fixture(scope="session")
def bundled() -> Iterator[LLM]:
    with poisoned_llm(bundled_model_path(), **BUNDLED_OPTIONS) as llm:
        yield llm


@pytest.fixture(scope="session")
def bundled_async() -> Iterator[LLM]:
    with bundled_llm(async_scheduling=True) as llm:
        yield llm


@pytest.fixture
def llm(bundled: LLM) -> Iterator[LLM]:
    """The bundled model on the CPU with poison (tests/support/poison.py). Fails if a test leaves requests."""
    yield bundled
    check_empty(bundled)


@pytest.fixture
def async_llm(bundled_async: LLM) -> Iterator[LLM]:
    """The bundled model on the CPU with async_scheduling. Fails if a test leaves requests."""
    yield bundled_async
    check_empty(bundled_async)


@pytest.fixture(params=["llm", "async_llm"])
def engine(request: pytest.FixtureRequest) -> LLM:
    """Runs the test with `llm` and with `async_llm`."""
    return request.getfixturevalue(request.param)


def check_empty(llm: LLM) -> None:
    """Fail unless the engine holds no request, no output and no block."""
    manager = llm.scheduler.block_manager
    assert llm.is_finished()
    assert llm.scheduler.is_finished
    assert llm._requests.is_empty
    assert manager.num_free_blocks == len(manager.blocks)
    check_invariants(manager, [])


@pytest.fixture(scope="session")
def alone(bundled: LLM) -> list[list[int]]:
    """The tokens of each of PROMPTS, generated with GREEDY in a call of its own."""
    return [tokens(bundled, prompt)[0] for prompt in PROMPTS]


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """A function that returns the messages of all warnings that nanovllm has logged so far."""
    caplog.set_level(logging.WARNING, "nanovllm")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "nanovllm"]


def tokens(llm: LLM, prompts: Any = PROMPTS, params: Any = GREEDY) -> list[list[int]]:
    return [output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)]


def contents(outputs: Iterable[Any]) -> list[dict[str, Any]]:
    """Those fields of each output that the items of a stream have too."""
    return [{name: output[name] for name in ("text", "token_ids", "finish_reason")} for output in outputs]


def joined(stream: Iterable[Any]) -> list[dict[str, Any]]:
    """Concatenate the items of each request of a stream. Returns what `contents` does, in the order of the prompts."""
    outputs: dict[int, dict[str, Any]] = {}
    for item in stream:
        output = outputs.setdefault(item["index"], {"text": "", "token_ids": [], "finish_reason": None})
        assert output["finish_reason"] is None, "an item after the last one of its request"
        output["text"] += item["text"]
        output["token_ids"] += item["token_ids"]
        output["finish_reason"] = item["finish_reason"]
    return [outputs[index] for index in sorted(outputs)]


def run_to_end(llm: LLM) -> dict[int, Any]:
    """Call step() until the engine has no requests. Returns seq_id -> output."""
    outputs: dict[int, Any] = {}
    while not llm.is_finished():
        outputs.update({output["seq_id"]: output for output in llm.step().finished})
    return outputs
