"""What --benchmark-compare decides, and what a benchmark of the host measures."""

from types import SimpleNamespace

import pytest

from benchmarks import conftest, hosting


@pytest.mark.parametrize(("now", "before"), [("NVIDIA H200", "NVIDIA H100"), (None, "NVIDIA H200")])
def test_another_gpu_is_refused(now, before):
    message = f"--benchmark-compare: both runs must be of the same GPU, got {now or 'no GPU'} now and {before}"
    with pytest.raises(pytest.UsageError, match=message):
        conftest.pytest_benchmark_compare_machine_info({"gpu": now}, {"machine_info": {"gpu": before}})
    conftest.pytest_benchmark_compare_machine_info({"gpu": now, "torch": "1"}, {"machine_info": {"gpu": now}})


FAILED = pytest.ExitCode.TESTS_FAILED
STORED = {"kernel": {"extra_info": {"microseconds": 10.0}}}
STORED["host"] = {"extra_info": {"microseconds": 90.0, "yardsticks": 4.0}}


@pytest.mark.parametrize(
    ("kernel", "host", "exit_status"),
    [
        ({"microseconds": 10.9}, {"microseconds": 900.0, "yardsticks": 5.0}, 0),  # a slower machine
        ({"microseconds": 11.1}, {"microseconds": 90.0, "yardsticks": 4.0}, FAILED),
        ({"microseconds": 5.0}, {"microseconds": 90.0, "yardsticks": 8.0}, FAILED),
        ({"microseconds": 5.0}, {}, 0),
    ],
)
def test_the_session_fails_when_a_kernel_or_the_host_became_slower(kernel, host, exit_status):
    benchmarks = [
        SimpleNamespace(fullname="kernel", extra_info=kernel),
        SimpleNamespace(fullname="host", extra_info=host),
        SimpleNamespace(fullname="new", extra_info=kernel),
        None,  # that was skipped
    ]
    state = SimpleNamespace(compared_mapping={"0001.json": STORED}, benchmarks=benchmarks)
    session: object = SimpleNamespace(
        config=SimpleNamespace(_benchmarksession=state, stash=pytest.Stash()), exitstatus=0
    )
    conftest.pytest_sessionfinish(session)
    assert session.exitstatus == exit_status


def test_the_host_is_measured_in_yardsticks():
    """As much work as two yardsticks takes about as long as two, whatever the machine."""
    data = []

    def pedantic(run, *, setup, rounds, warmup_rounds):
        for _ in range(warmup_rounds + rounds):
            setup()
            data.append(hosting.seconds_per_yardstick(1) + hosting.seconds_per_yardstick(1))
        clock.stats = SimpleNamespace(stats=SimpleNamespace(data=data[warmup_rounds:]))

    clock = SimpleNamespace(disabled=False, name="test_something", extra_info={}, pedantic=pedantic)
    hosting.measure(clock, lambda: None)
    assert clock.extra_info["host"] == "something"
    assert clock.extra_info["yardsticks"] == pytest.approx(2, rel=0.4)
