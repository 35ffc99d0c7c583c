"""`pytest --benchmark-only` runs the benchmarks, and nothing else does. README.md beside this says what they measure.

With a GPU: kernels/ and host/. Without one: host/ alone, and the header says so.
"""

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import regression, report
from benchmarks.hosting import HostMeasurement
from nanovllm.bench.machine import machine_info

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results"
CEILINGS: pytest.StashKey[Any] = pytest.StashKey()
DECISIONS: pytest.StashKey[list[regression.Decision]] = pytest.StashKey()


def gpu_name() -> str | None:
    """The name of the GPU that is measured; None if there is none."""
    import torch  # late: plain test runs load this file too, and need no torch for it

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


# --- what is collected ---


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Where no path is given, --benchmark-only means this folder, and other runs leave it out."""
    config.option.benchmark_save_data = True  # what is stored can be compared: regression.py needs the samples
    if config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        return
    own = [argument for argument in config.args if (config.rootpath / argument).resolve() == FOLDER]
    if config.option.benchmark_only:
        config.args = own
    else:
        config.args = [argument for argument in config.args if argument not in own]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if collection_path == FOLDER / "kernels" and gpu_name() is None else None


def pytest_report_header(config: pytest.Config) -> str | None:
    return f"benchmarks: {_what_is_measured()}" if config.option.benchmark_only else None


def _what_is_measured() -> str:
    name = gpu_name()
    return f"kernels on {name}, and the host side" if name else "the host side only: no NVIDIA GPU here, so no kernel"


# --- what is measured ---


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark: Any) -> Any:
    """benchmarks.measuring.Measurement; its samples are times on the GPU."""
    if gpu_name() is None:
        pytest.skip("needs an NVIDIA GPU")
    from benchmarks.ceilings import measure_ceilings
    from benchmarks.measuring import Measurement
    from benchmarks.timing import device_clock

    stash = request.config.stash
    if CEILINGS not in stash:
        stash[CEILINGS] = measure_ceilings()
    benchmark._timer = device_clock  # what its `timer` marker sets; here, so that no test can forget it
    return Measurement(benchmark, stash[CEILINGS])


@pytest.fixture
def host(request: pytest.FixtureRequest, benchmark: Any) -> HostMeasurement:
    """For one benchmark of the host side."""
    state = getattr(request.config, "_benchmarksession", None)
    for stored in state.compared_mapping.values() if state is not None else ():
        ratios = stored.get(benchmark.fullname, {}).get("extra_info", {}).get("ratios")
        if ratios:
            return HostMeasurement(benchmark, ratios[0])
    return HostMeasurement(benchmark, None)


@pytest.fixture(autouse=True)
def _free_gpu_memory() -> Any:
    """Free what one benchmark allocated for the next one."""
    yield
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- what is stored and compared ---


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    """Names and versions on which figures depend, and nothing that differs between two machines of one kind."""
    return machine_info(gpu_name())


def pytest_benchmark_compare_machine_info(machine_info: dict[str, Any], compared_benchmark: dict[str, Any]) -> None:
    try:
        regression.check_same_device(machine_info, compared_benchmark.get("machine_info", {}))
    except ValueError as error:
        raise pytest.UsageError(f"--benchmark-compare: {error}") from error


def pytest_sessionstart(session: pytest.Session) -> None:
    benchmarks = getattr(session.config, "_benchmarksession", None)
    if benchmarks is not None and benchmarks.compare and not benchmarks.compared_mapping:
        raise pytest.UsageError(
            f"--benchmark-compare: there is no stored run in {benchmarks.storage}; store one with --benchmark-autosave"
        )


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the session if a kernel or the host became slower than in the run that --benchmark-compare names."""
    benchmarks = getattr(session.config, "_benchmarksession", None)
    if benchmarks is None or not benchmarks.compared_mapping:
        return
    done = [bench for bench in benchmarks.benchmarks if bench]
    kernels = {bench.fullname: list(bench.stats.data) for bench in done if "kernel" in bench.extra_info}
    hosts = {bench.fullname: bench.extra_info["ratios"] for bench in done if "host" in bench.extra_info}
    decisions = []
    for stored in benchmarks.compared_mapping.values():
        decisions += regression.decide_all(
            {name: bench["stats"].get("data", []) for name, bench in stored.items()}, kernels
        )
        for name, ratios in hosts.items():
            before = stored.get(name, {}).get("extra_info", {}).get("ratios")
            if before:
                decisions.append(regression.decide_host(name, before[0], ratios))
    session.config.stash[DECISIONS] = decisions
    if any(decision.is_slower for decision in decisions):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    benchmarks = getattr(config, "_benchmarksession", None)
    if benchmarks is None or not config.option.benchmark_only:
        return
    terminalreporter.write_line(f"measured: {_what_is_measured()}")
    done = [bench.extra_info for bench in benchmarks.benchmarks if bench]
    machine = machine_info(gpu_name())
    results = []
    rows = [row for row in done if "kernel" in row]
    if rows:
        terminalreporter.section("kernels against the ceiling, worst first")
        results.append(report.Result(machine, config.stash[CEILINGS]._asdict(), rows))
    rows = [row for row in done if "host" in row]
    if rows:
        results.append(report.HostResult(machine, rows))
    for result in results:
        terminalreporter.write_line(report.table(result))
        for path in report.write(
            result, RESULTS / "own_kernels" if getattr(config.option, "kernel", None) else RESULTS
        ):
            terminalreporter.write_line(f"written: {path}")
    if DECISIONS in config.stash:
        terminalreporter.section("against the stored run")
        terminalreporter.write_line(regression.summary(config.stash[DECISIONS]))
