"""One engine used by several threads: each call gets its own whole output.

It is one file of over 300 lines because all tests share the gate that holds a step.
"""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams, bundled_model_path
from nanovllm.demo_prompts import DEMO_PROMPTS
from nanovllm.engine import input_processor
from nanovllm.engine.request_state import RequestState
from nanovllm.worker.async_output import AsyncModelOutput
from tests.e2e.conftest import BUNDLED_OPTIONS
from tests.support.counts import count_comparisons
from tests.support.limits import HANG_SECONDS

GREEDY = SamplingParams.greedy(max_tokens=12)
PROMPTS = ["In the beginning", "The LORD is my shepherd", "And God said"]


@pytest.fixture(scope="module")
def ahead() -> Iterator[LLM]:
    with LLM(str(bundled_model_path()), **BUNDLED_OPTIONS, async_scheduling=True) as llm:
        yield llm


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def engine(request: pytest.FixtureRequest, llm: LLM, ahead: LLM) -> Iterator[LLM]:
    engine = ahead if request.param else llm
    yield engine
    assert engine.is_finished()
    assert engine.scheduler.is_finished
    assert engine._requests.is_empty


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


def tokens(llm: LLM, prompts: Any, params: Any = GREEDY) -> list[list[int]]:
    return [output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)]


def streamed(llm: LLM, prompts: list[str], params: Any) -> list[list[int]]:
    result: list[list[int]] = [[] for _ in prompts]
    for item in llm.generate_stream(prompts, params):
        result[item["index"]] += item["token_ids"]
    return result


class Gate:
    """Stands before an engine's method: the first call of it waits here until `open`, or raises `error`."""

    def __init__(self, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_reached, self.is_open = threading.Event(), threading.Event()
        self.error: BaseException | None = None
        execute = llm._core.executor.execute

        def gated(*args: Any) -> Any:
            if not self.is_reached.is_set():
                self.is_reached.set()
                assert self.is_open.wait(HANG_SECONDS)
                if self.error is not None:
                    raise self.error
            return execute(*args)

        monkeypatch.setattr(llm._core.executor, "execute", gated)

    def wait(self) -> None:
        assert self.is_reached.wait(HANG_SECONDS)

    def open(self, error: BaseException | None = None) -> None:
        self.error = error
        self.is_open.set()


def test_calls_of_many_threads_give_what_they_give_alone(engine: LLM, threads: ThreadPoolExecutor) -> None:
    """D81: generate, streams, and requests that one of the threads steps by hand."""
    slices = [DEMO_PROMPTS[k % 12 : k % 12 + 1 + k % 2] for k in range(60)]
    jobs = [(prompts, SamplingParams.greedy(max_tokens=1 + k * 5 % 14)) for k, prompts in enumerate(slices)]
    expected = [tokens(engine, list(prompts), params) for prompts, params in jobs]

    def by_hand() -> list[list[int]]:
        seq_ids = [engine.add_request(prompts[0], params) for prompts, params in jobs[:8]]
        outputs: dict[int, list[int]] = {}
        while outputs.keys() != set(seq_ids):
            outputs.update({output["seq_id"]: output["token_ids"] for output in engine.step().finished})
        return [outputs[seq_id] for seq_id in seq_ids]

    stepped = threads.submit(by_hand)
    futures = [
        threads.submit(streamed if k % 3 == 0 else tokens, engine, list(prompts), params)
        for k, (prompts, params) in enumerate(jobs)
    ]
    assert [future.result(HANG_SECONDS) for future in futures] == expected
    assert stepped.result(HANG_SECONDS) == [token_ids[0] for token_ids in expected[:8]]
    count_comparisons("calls of several threads against the same calls alone", len(jobs))


def test_asyncio_to_thread(engine: LLM) -> None:
    """D81."""
    expected = [tokens(engine, prompt) for prompt in PROMPTS]

    async def serve() -> list[list[list[int]]]:
        return await asyncio.gather(*(asyncio.to_thread(tokens, engine, prompt) for prompt in PROMPTS))

    assert asyncio.run(serve()) == expected


def test_requests_of_several_threads_are_computed_in_one_batch(
    engine: LLM, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D81: those that come while a step is computed take part in the next one."""
    gate = Gate(engine, monkeypatch)
    first = threads.submit(tokens, engine, PROMPTS[0])
    gate.wait()
    others = [threads.submit(tokens, engine, prompt) for prompt in PROMPTS[1:]]
    while len(engine._lock._queue) < 3:  # they wait for the step
        threading.Event().wait(0.001)
    sizes: list[int] = []
    take_in = engine._core._process_tokens
    monkeypatch.setattr(
        engine._core, "_process_tokens", lambda batch, ids: sizes.append(len(ids)) or take_in(batch, ids)
    )
    gate.open()
    for future in [first, *others]:
        future.result(HANG_SECONDS)
    assert max(sizes) == 3


def test_tokens_that_another_threads_steps_brought_cost_no_step(
    engine: LLM, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D81: a stream that stands still does not hold up another thread, whose steps compute it to its end."""
    expected = streamed(engine, PROMPTS[:1], GREEDY)[0]
    stream = engine.generate_stream(PROMPTS[0], GREEDY)
    items = [next(stream)]
    threads.submit(tokens, engine, PROMPTS[1], SamplingParams.greedy(max_tokens=30)).result(HANG_SECONDS)
    monkeypatch.setattr(engine._core, "advance", lambda caller: pytest.fail("there was nothing left to compute"))
    items += stream
    assert [token for item in items for token in item["token_ids"]] == expected
    assert [item["finish_reason"] for item in items] == [None, "length"]


@pytest.mark.parametrize("error", [MemoryError("planted"), KeyboardInterrupt()])
def test_a_step_that_fails_costs_no_other_call_its_output(
    engine: LLM, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """D81: the thread that computed it gets the exception; the others' requests are computed again."""
    expected = [tokens(engine, prompt)[0] for prompt in PROMPTS]
    streams = [engine.generate_stream(prompt, GREEDY) for prompt in PROMPTS[:2]]
    items = [next(stream) for stream in streams][:1]
    with monkeypatch.context() as planted:
        gate = Gate(engine, planted)
        failing = threads.submit(list, streams[1])
        gate.wait()
        other = threads.submit(tokens, engine, PROMPTS[2])
        gate.open(error)
        with pytest.raises(type(error)):
            failing.result(HANG_SECONDS)
        assert other.result(HANG_SECONDS) == [expected[2]]
    items += streams[0]
    assert [token for item in items for token in item["token_ids"]] == expected[0]
    assert items[-1]["finish_reason"] == "length"


def test_tokens_that_never_came_are_computed_again(
    ahead: LLM, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D81: and not the step after them, which had been begun."""
    expected = tokens(ahead, PROMPTS[0])[0]
    streams = [ahead.generate_stream(prompt, GREEDY) for prompt in PROMPTS[:2]]
    items = [next(stream) for stream in streams][:1]

    def fail(step: AsyncModelOutput) -> list[int]:
        raise KeyboardInterrupt

    with monkeypatch.context() as planted:
        planted.setattr(AsyncModelOutput, "token_ids", fail)
        with pytest.raises(KeyboardInterrupt):
            threads.submit(list, streams[1]).result(HANG_SECONDS)
    items += streams[0]
    assert [token for item in items for token in item["token_ids"]] == expected


def test_a_token_that_is_not_taken_in_is_an_error_of_its_call(
    engine: LLM, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D81: with the cause, since the text would lack something. Also of step(), which hands out the aborted output
    afterwards.
    """
    expected = tokens(engine, PROMPTS[2])
    params = SamplingParams.greedy(max_tokens=200, ignore_eos=True, stop="no such text")
    streams = [engine.generate_stream(prompt, params) for prompt in PROMPTS[:2]]
    for stream in streams:
        next(stream)
    stepped = engine.add_request(PROMPTS[2], SamplingParams.greedy(max_tokens=20, ignore_eos=True))
    engine.step()

    def fail(request: RequestState) -> bool:
        raise MemoryError("planted")

    with monkeypatch.context() as planted:
        planted.setattr(RequestState, "process_new_token", fail)
        with pytest.raises(MemoryError):
            threads.submit(list, streams[1]).result(HANG_SECONDS)
    message = r"^a step of another call failed: MemoryError: planted; call generate again$"
    with pytest.raises(RuntimeError, match=message):
        list(streams[0])
    with pytest.raises(RuntimeError, match=message.replace("call generate", "add the requests")):
        engine.step()
    (output,) = engine.step().finished
    assert (output["seq_id"], output["finish_reason"]) == (stepped, "abort")
    assert tokens(engine, PROMPTS[2]) == expected


def test_abort_while_another_thread_computes(
    engine: LLM, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D81: it ends that request alone."""
    expected = tokens(engine, PROMPTS)
    first = engine._input_processor.num_requests
    gate = Gate(engine, monkeypatch)
    generating = threads.submit(engine.generate, PROMPTS, GREEDY, use_tqdm=False)
    gate.wait()
    aborting = threads.submit(engine.abort, first + 1)
    gate.open()
    assert aborting.result(HANG_SECONDS)
    outputs = generating.result(HANG_SECONDS)
    assert [output["finish_reason"] for output in outputs] == ["length", "abort", "length"]
    assert [outputs[0]["token_ids"], outputs[2]["token_ids"]] == [expected[0], expected[2]]


@pytest.mark.parametrize("is_async", [False, True])
def test_close_while_others_compute(
    threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, is_async: bool
) -> None:
    """D81: calls that compute, that wait for their turn, and streams that stand still raise an error that says so."""
    with LLM(str(bundled_model_path()), **BUNDLED_OPTIONS, async_scheduling=is_async) as llm:
        stream = llm.generate_stream(PROMPTS[0], GREEDY)
        next(stream)
        gate = Gate(llm, monkeypatch)
        calls: list[Future[Any]] = [threads.submit(tokens, llm, PROMPTS[1])]
        gate.wait()
        closing = threads.submit(llm.close)
        while len(llm._lock._queue) < 2:
            threading.Event().wait(0.001)
        calls.append(threads.submit(tokens, llm, PROMPTS[2]))
        gate.open()
        closing.result(HANG_SECONDS)
        calls.append(threads.submit(list, stream))
        for call in calls:
            with pytest.raises(RuntimeError, match=r"^this engine is closed: make a new one$"):
                call.result(HANG_SECONDS)


def test_a_stream_that_is_closed_inside_a_step_ends_after_it(engine: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """D81: as the garbage collector may close it, in the thread that computes or in another."""
    expected = tokens(engine, PROMPTS[1])
    stream = engine.generate_stream(PROMPTS[0], SamplingParams.greedy(max_tokens=200, ignore_eos=True))
    next(stream)
    schedule = engine.scheduler.schedule

    def close_and_schedule() -> Any:
        stream.close()  # type: ignore[attr-defined]
        return schedule()

    monkeypatch.setattr(engine.scheduler, "schedule", close_and_schedule)
    assert tokens(engine, PROMPTS[1]) == expected


def test_closing_a_stream_never_waits_for_a_step(
    engine: LLM, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D81: the garbage collector may close it in a thread that holds what the step waits for."""
    stream = engine.generate_stream(PROMPTS[0], GREEDY)
    next(stream)
    gate = Gate(engine, monkeypatch)
    computing = threads.submit(tokens, engine, PROMPTS[1])
    gate.wait()
    try:
        threads.submit(stream.close).result(HANG_SECONDS)  # type: ignore[attr-defined]
    finally:
        gate.open()
    assert len(computing.result(HANG_SECONDS)[0]) == 12


def test_one_thread_tokenizes_at_a_time_and_steps_go_on(
    llm: LLM, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D81: transformers' tokenizers raise "Already borrowed" when two threads call them."""
    as_token_ids = input_processor.as_token_ids
    is_reached, may_go = threading.Event(), threading.Event()
    num_inside: list[int] = []

    def slow(prompt: Any, *args: Any) -> list[int]:
        if isinstance(prompt, str):
            num_inside.append(1)
            assert len(num_inside) == 1
            is_reached.set()
            assert may_go.wait(HANG_SECONDS)
            num_inside.pop()
        return as_token_ids(prompt, *args)

    expected = tokens(llm, [[5, 6, 7]])
    monkeypatch.setattr(input_processor, "as_token_ids", slow)
    calls = [threads.submit(tokens, llm, prompt) for prompt in PROMPTS]
    assert is_reached.wait(HANG_SECONDS)
    assert tokens(llm, [[5, 6, 7]]) == expected
    may_go.set()
    for call in calls:
        call.result(HANG_SECONDS)
