"""Threads of one process: calls of one engine get whole outputs of their own, and engines do not meet."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.demo_prompts import DEMO_PROMPTS
from nanovllm.engine import input_processor
from nanovllm.engine.request_state import RequestState
from nanovllm.worker.async_output import AsyncModelOutput
from tests.e2e.conftest import GREEDY, PROMPTS, bundled_llm, joined, tokens
from tests.support.counts import count_comparisons
from tests.support.limits import HANG_SECONDS, wait_until

LONG = SamplingParams.greedy(max_tokens=200, ignore_eos=True, stop="no such text")


def streamed(llm: LLM, prompts: Any, params: Any = GREEDY) -> list[list[int]]:
    return [output["token_ids"] for output in joined(llm.generate_stream(prompts, params))]


class HeldStep:
    """The executor's next step waits until `resume`, which may make it raise `error` instead."""

    def __init__(self, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self._llm = llm
        self._has_begun, self._may_go = threading.Event(), threading.Event()
        self._error: BaseException | None = None
        execute = llm._core.executor.execute

        def held(*args: Any) -> Any:
            if not self._has_begun.is_set():
                self._has_begun.set()
                assert self._may_go.wait(HANG_SECONDS)
                if self._error is not None:
                    raise self._error
            return execute(*args)

        monkeypatch.setattr(llm._core.executor, "execute", held)

    def wait(self, num_waiting: int = 0) -> None:
        """Until the step has begun, and num_waiting threads in all compute or wait for their turn."""
        assert self._has_begun.wait(HANG_SECONDS)
        wait_until(lambda: len(self._llm._lock._queue) >= num_waiting)

    def resume(self, error: BaseException | None = None) -> None:
        self._error = error
        self._may_go.set()


def test_calls_of_many_threads_give_what_they_give_alone(engine: LLM, threads: ThreadPoolExecutor) -> None:
    """D81: generate, streams, and requests that one of the threads steps by hand."""
    slices = [list(DEMO_PROMPTS[k % 12 : k % 12 + 1 + k % 2]) for k in range(30)]
    jobs = [(prompts, SamplingParams.greedy(max_tokens=1 + k * 5 % 14)) for k, prompts in enumerate(slices)]
    expected = [tokens(engine, *job) for job in jobs]

    def step_by_hand() -> list[list[int]]:
        seq_ids = [engine.add_request(prompts[0], params) for prompts, params in jobs[:8]]
        outputs: dict[int, list[int]] = {}
        while outputs.keys() != set(seq_ids):
            outputs.update({output["seq_id"]: output["token_ids"] for output in engine.step().finished})
        return [outputs[seq_id] for seq_id in seq_ids]

    stepped = threads.submit(step_by_hand)
    futures = [threads.submit(streamed if k % 3 == 0 else tokens, engine, *job) for k, job in enumerate(jobs)]
    assert [future.result(HANG_SECONDS) for future in futures] == expected
    assert stepped.result(HANG_SECONDS) == [token_ids[0] for token_ids in expected[:8]]
    count_comparisons("calls of several threads against the same calls alone", len(jobs))


def test_engines_in_several_threads_do_not_meet(threads: ThreadPoolExecutor, alone: list[list[int]]) -> None:
    """D21, D81: they start and compute at the same time, with other dtypes, block sizes and pools; the bundled model's
    margins are wide enough for each dtype to give the same tokens.
    """
    barrier = threading.Barrier(4)

    def use(dtype: str, block_size: int) -> list[list[int]]:
        barrier.wait(HANG_SECONDS)
        with bundled_llm(dtype=dtype, kv_cache_block_size=block_size, num_kv_cache_blocks=1024 // block_size) as own:
            runner = own._core.executor._runner
            dtypes = {parameter.dtype for parameter in runner.model.parameters()} | {runner.kv_cache.dtype}
            assert set(map(str, dtypes)) == {f"torch.{dtype}"}
            return tokens(own)

    results = threads.map(use, ("float32", "float16", "float32", "bfloat16"), (16, 1, 4, 16), timeout=HANG_SECONDS)
    assert list(results) == [alone] * 4


def test_requests_that_come_during_a_step_join_the_next_one(
    engine: LLM, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D81: requests of several threads are computed in one batch."""
    step = HeldStep(engine, monkeypatch)
    calls = [threads.submit(tokens, engine, PROMPTS[0])]
    step.wait()
    calls += [threads.submit(tokens, engine, prompt) for prompt in PROMPTS[1:]]
    step.wait(num_waiting=3)
    sizes: list[int] = []
    take_in = engine.scheduler.postprocess
    monkeypatch.setattr(
        engine.scheduler, "postprocess", lambda batch, ids, check: sizes.append(len(ids)) or take_in(batch, ids, check)
    )
    step.resume()
    for call in calls:
        call.result(HANG_SECONDS)
    assert max(sizes) == 3


def test_tokens_that_another_threads_steps_brought_cost_no_step(
    engine: LLM, threads: ThreadPoolExecutor, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """D81: a stream that is not read does not hold up another thread, whose steps compute it to its end."""
    stream = engine.generate_stream(PROMPTS[0], GREEDY)
    items = [next(stream)]
    threads.submit(tokens, engine, PROMPTS[1], SamplingParams.greedy(max_tokens=30)).result(HANG_SECONDS)
    monkeypatch.setattr(engine._core, "advance", lambda caller: pytest.fail("there was nothing left to compute"))
    items += stream
    assert joined(items)[0]["token_ids"] == alone[0]
    assert [item["finish_reason"] for item in items] == [None, "length"]


@pytest.mark.parametrize("error", [MemoryError("planted"), KeyboardInterrupt()])
def test_a_step_that_fails_costs_no_other_call_its_output(
    engine: LLM,
    threads: ThreadPoolExecutor,
    alone: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
) -> None:
    """D81: the thread that computed it gets the exception; the others' requests are computed again."""
    streams = [engine.generate_stream(prompt, GREEDY) for prompt in PROMPTS[:2]]
    items = [next(stream) for stream in streams][:1]
    step = HeldStep(engine, monkeypatch)
    failing = threads.submit(list, streams[1])
    step.wait()
    other = threads.submit(tokens, engine, PROMPTS[2])
    step.resume(error)
    with pytest.raises(type(error)):
        failing.result(HANG_SECONDS)
    assert other.result(HANG_SECONDS) == [alone[2]]
    assert joined([*items, *streams[0]])[0]["token_ids"] == alone[0]


def test_tokens_that_never_came_are_computed_again(
    async_llm: LLM, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """D81: and the step after them, which had begun, is dropped."""
    streams = [async_llm.generate_stream(prompt, GREEDY) for prompt in PROMPTS[:2]]
    items = [next(stream) for stream in streams][:1]

    def fail(step: AsyncModelOutput) -> list[int]:
        raise KeyboardInterrupt

    with monkeypatch.context() as planted:
        planted.setattr(AsyncModelOutput, "token_ids", fail)
        with pytest.raises(KeyboardInterrupt):
            next(streams[1])
    assert joined([*items, *streams[0]])[0]["token_ids"] == alone[0]


def test_a_token_that_cannot_be_processed_is_an_error_of_its_call(
    engine: LLM, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """D81: with the cause, since the text would lack something. step() raises it too, and then returns the aborted
    output.
    """
    streams = [engine.generate_stream(prompt, LONG) for prompt in PROMPTS[:2]]
    for stream in streams:
        next(stream)
    stepped = engine.add_request(PROMPTS[2], SamplingParams.greedy(max_tokens=20, ignore_eos=True))
    engine.step()

    def fail(request: RequestState) -> bool:
        raise MemoryError("planted")

    with monkeypatch.context() as planted:
        planted.setattr(RequestState, "process_new_token", fail)
        with pytest.raises(MemoryError):
            list(streams[1])
    message = r"^a step of another call failed: MemoryError: planted; call generate again$"
    with pytest.raises(RuntimeError, match=message):
        list(streams[0])
    with pytest.raises(RuntimeError, match=message.replace("call generate", "add the requests")):
        engine.step()
    (output,) = engine.step().finished
    assert (output["seq_id"], output["finish_reason"]) == (stepped, "abort")
    assert tokens(engine, PROMPTS[2]) == [alone[2]]


def test_abort_while_another_thread_computes(
    engine: LLM, threads: ThreadPoolExecutor, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """D81: it ends that request alone."""
    first = engine._input_processor.num_requests
    step = HeldStep(engine, monkeypatch)
    generating = threads.submit(engine.generate, PROMPTS, GREEDY, use_tqdm=False)
    step.wait()
    aborting = threads.submit(engine.abort, first + 1)
    step.resume()
    assert aborting.result(HANG_SECONDS)
    outputs = generating.result(HANG_SECONDS)
    assert [output["finish_reason"] for output in outputs] == ["length", "abort", "length"]
    assert [outputs[0]["token_ids"], outputs[2]["token_ids"]] == [alone[0], alone[2]]


@pytest.mark.parametrize("is_async", [False, True])
def test_close_while_other_threads_compute(
    threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, is_async: bool
) -> None:
    """D81: calls that compute, that wait for their turn, and streams that are read later say that it is closed."""
    with bundled_llm(async_scheduling=is_async) as llm:
        stream = llm.generate_stream(PROMPTS[0], GREEDY)
        next(stream)
        step = HeldStep(llm, monkeypatch)
        calls: list[Future[Any]] = [threads.submit(tokens, llm, PROMPTS[1])]
        step.wait()
        closing = threads.submit(llm.close)
        step.wait(num_waiting=2)
        calls.append(threads.submit(tokens, llm, PROMPTS[2]))
        step.resume()
        closing.result(HANG_SECONDS)
        calls.append(threads.submit(list, stream))
        for call in calls:
            with pytest.raises(RuntimeError, match=r"^this engine is closed: make a new one$"):
                call.result(HANG_SECONDS)


def test_a_stream_closed_inside_a_step_ends_after_the_step(
    engine: LLM, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """D81: as the garbage collector may close it, in the thread that computes."""
    stream = engine.generate_stream(PROMPTS[0], LONG)
    next(stream)
    schedule = engine.scheduler.schedule

    def close_and_schedule() -> Any:
        stream.close()  # type: ignore[attr-defined]
        return schedule()

    monkeypatch.setattr(engine.scheduler, "schedule", close_and_schedule)
    assert tokens(engine, PROMPTS[1]) == [alone[1]]


def test_closing_a_stream_never_waits_for_a_step(
    engine: LLM, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D81: the garbage collector may close it in a thread that holds what the step waits for."""
    stream = engine.generate_stream(PROMPTS[0], GREEDY)
    next(stream)
    step = HeldStep(engine, monkeypatch)
    computing = threads.submit(tokens, engine, PROMPTS[1])
    step.wait()
    try:
        threads.submit(stream.close).result(HANG_SECONDS)  # type: ignore[attr-defined]
    finally:
        step.resume()
    assert len(computing.result(HANG_SECONDS)[0]) == 12


def test_one_thread_tokenizes_at_a_time_while_steps_go_on(
    llm: LLM, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D81: transformers' tokenizers raise "Already borrowed" when two threads call them."""
    as_token_ids = input_processor.as_token_ids
    has_begun, may_go, lock = threading.Event(), threading.Event(), threading.Lock()

    def slow(prompt: Any, *args: Any) -> list[int]:
        if isinstance(prompt, str):
            assert lock.acquire(blocking=False)
            has_begun.set()
            assert may_go.wait(HANG_SECONDS)
            lock.release()
        return as_token_ids(prompt, *args)

    monkeypatch.setattr(input_processor, "as_token_ids", slow)
    calls = [threads.submit(tokens, llm, prompt) for prompt in PROMPTS]
    assert has_begun.wait(HANG_SECONDS)
    assert len(tokens(llm, [[5, 6, 7]])[0]) == 12
    may_go.set()
    for call in calls:
        call.result(HANG_SECONDS)
