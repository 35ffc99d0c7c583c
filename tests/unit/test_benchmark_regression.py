"""What --benchmark-compare decides, on planted samples: a real slowdown is caught, and noise is not."""

from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import conftest, hosting, regression


def samples(rng: np.random.Generator, seconds: float, noise: float) -> list[float]:
    """Times of one benchmark: `noise` of scatter, and now and then a hiccup of half as much again."""
    hiccups = 1 + 0.5 * (rng.random(15) < 0.05)
    return (seconds * hiccups * (1 + noise * np.abs(rng.standard_normal(15)))).tolist()


@pytest.mark.parametrize("noise", [0.002, 0.02])
def test_a_slowdown_of_ten_percent_is_caught_among_fifty(noise):
    rng = np.random.default_rng(1)
    before = {f"b{i}": samples(rng, 1e-5 * (i + 1), noise) for i in range(50)}
    now = {f"b{i}": samples(rng, 1e-5 * (i + 1) * (1.1 if i == 37 else 1.0), noise) for i in range(50)}
    decisions = regression.decide_all(before, now)
    assert [decision.name for decision in decisions if decision.is_slower] == ["b37"]


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("seed", range(3))
def test_noise_is_not_a_slowdown(noise, seed):
    rng = np.random.default_rng(seed)
    runs = [{f"b{i}": samples(rng, 1e-5, noise) for i in range(50)} for _ in range(2)]
    assert not any(decision.is_slower or decision.is_faster for decision in regression.decide_all(*runs))


def test_runs_without_samples_are_refused():
    with pytest.raises(ValueError, match="at least 8 samples, got 0 stored ones; store runs with --benchmark-autosave"):
        regression.decide("b", [], [1.0] * 15)


# --- the hooks ---


@pytest.mark.parametrize(("now", "before"), [("NVIDIA H200", "NVIDIA H100"), (None, "NVIDIA H200")])
def test_another_gpu_is_refused(now, before):
    message = f"--benchmark-compare: both runs must be of the same GPU, got {now or 'no GPU'} now and {before}"
    with pytest.raises(pytest.UsageError, match=message):
        conftest.pytest_benchmark_compare_machine_info({"gpu": now}, {"machine_info": {"gpu": before}})
    conftest.pytest_benchmark_compare_machine_info({"gpu": now, "torch": "1"}, {"machine_info": {"gpu": now}})


def session(kernel_samples: list[float], host_ratios: list[float], stored: dict[str, dict]) -> SimpleNamespace:
    """What the hook reads of pytest's session, after benchmarks "kernel" and "host" have run."""
    stats, name = SimpleNamespace(data=kernel_samples), {"kernel": "rms_norm"}
    benchmarks = [
        SimpleNamespace(fullname="kernel", stats=stats, extra_info=name),
        SimpleNamespace(fullname="host", stats=None, extra_info={"host": "schedule", "ratios": host_ratios}),
    ]
    state = SimpleNamespace(compared_mapping={"0001.json": stored}, benchmarks=benchmarks)
    return SimpleNamespace(config=SimpleNamespace(_benchmarksession=state, stash=pytest.Stash()), exitstatus=0)


FAILED = pytest.ExitCode.TESTS_FAILED


@pytest.mark.parametrize(
    ("kernel_factor", "host_ratios", "exit_status"),
    [
        (1.0, [4.0], 0),
        (1.1, [4.0], FAILED),
        (1.04, [4.0], 0),  # within the practical threshold
        (0.8, [4.0], 0),
        (1.0, [8.0, 8.1, 7.9], FAILED),
        (1.0, [8.0, 8.1, 4.1], 0),  # the host was busy
        (1.0, [5.9], 0),  # below the limit
    ],
)
def test_the_session_fails_when_a_kernel_or_the_host_became_slower(kernel_factor, host_ratios, exit_status):
    rng = np.random.default_rng(3)
    stored = {"kernel": {"stats": {"data": samples(rng, 1e-5, 0.002)}}}
    stored["host"] = {"stats": {"data": []}, "extra_info": {"ratios": [4.0]}}
    fake: object = session(samples(rng, kernel_factor * 1e-5, 0.002), host_ratios, stored)
    conftest.pytest_sessionfinish(fake)
    assert fake.exitstatus == exit_status


def test_a_stored_run_without_ratios_decides_nothing_about_the_host():
    fake: object = session([1e-5] * 15, [8.0, 8.0, 8.0], {"host": {"stats": {"data": []}}})
    conftest.pytest_sessionfinish(fake)
    assert fake.exitstatus == 0


class Clock:
    """Stands for pytest-benchmark's fixture: runs all rounds, and says what a round took."""

    disabled = False
    name = "test_something"

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, run, *, setup, teardown, rounds, warmup_rounds):
        data = []
        for _ in range(warmup_rounds + rounds):
            arguments, _ = setup()
            data.append(hosting.seconds_of(lambda: run(*arguments)))  # noqa: B023 (called at once)
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=data[warmup_rounds:], median=np.median(data)))


def work(times: int) -> None:
    for _ in range(times):
        hosting.yardstick()


def ratios_of(times: int, stored_ratio: float | None) -> list[float]:
    clock = Clock()
    hosting.HostMeasurement(clock, stored_ratio)(lambda: work(times))
    return clock.extra_info["ratios"]


def test_a_host_benchmark_that_is_twice_as_slow_is_measured_again_and_fails():
    """A planted slowdown: as much work twice. The ratio to plain Python does not depend on the machine."""
    (before,) = ratios_of(2, None)
    assert before == pytest.approx(2, rel=0.4)
    now = ratios_of(4, before)
    assert len(now) == 1 + hosting.RETRIES
    assert regression.decide_host("host", before, now).is_slower
    assert not regression.decide_host("host", before, ratios_of(2, before)).is_slower
