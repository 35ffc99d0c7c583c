"""drive: times of requests that a scripted engine serves by a scripted clock, computed by hand."""

from nanovllm.bench.drive import RequestTimes, drive
from nanovllm.sampling_params import SamplingParams
from tests.support.scripted_engine import ScriptedEngine


def served(
    engine: ScriptedEngine, num_tokens: list[int], arrivals: list[float] | None
) -> tuple[list[RequestTimes], list[int]]:
    """The times, and the numbers of finished requests that drive reported."""
    requests = [[index] for index in range(len(num_tokens))], [SamplingParams(max_tokens=n) for n in num_tokens]
    reported: list[int] = []
    times = drive(engine, requests, arrivals, reported.append, engine.clock, engine.sleep)
    assert [prompt for prompt, _, _ in engine.added] == requests[0]
    return times, reported


def test_times_count_from_the_arrival_to_the_end_of_the_step_that_returns_the_token() -> None:
    """The second request arrives inside the first step; the third when the engine has nothing to do."""
    engine = ScriptedEngine()
    times, reported = served(engine, [3, 1, 2], arrivals=[0.0, 0.5, 10.0])
    assert times == [RequestTimes(0.0, 1.0, 3.0, 3), RequestTimes(0.5, 2.0, 2.0, 1), RequestTimes(10.0, 11.0, 12.0, 2)]
    assert [time for _, _, time in engine.added] == [0.0, 1.0, 10.0]
    assert engine.slept == [7.0]
    assert reported == [1, 1, 1]
    assert [request.time_to_first_token for request in times] == [1.0, 1.5, 1.0]
    assert [request.time_per_output_token for request in times] == [1.0, None, 1.0]


def test_arrivals_do_not_wait_for_a_late_engine() -> None:
    """One request at a time, 2 s each, arrivals every second: each waits a second longer than the one before it."""
    times, _ = served(ScriptedEngine(max_num_seqs=1), [2] * 4, arrivals=[0.0, 1.0, 2.0, 3.0])
    assert [request.time_to_first_token for request in times] == [1.0, 2.0, 3.0, 4.0]
    assert [request.time_per_output_token for request in times] == [1.0] * 4


def test_without_arrivals_all_requests_are_added_before_the_first_step() -> None:
    engine = ScriptedEngine(max_num_seqs=2)
    times, reported = served(engine, [2, 2, 1], arrivals=None)
    assert [time for _, _, time in engine.added] == [0.0] * 3
    assert times == [RequestTimes(0.0, 1.0, 2.0, 2), RequestTimes(0.0, 1.0, 2.0, 2), RequestTimes(0.0, 3.0, 3.0, 1)]
    assert reported == [2, 1]
