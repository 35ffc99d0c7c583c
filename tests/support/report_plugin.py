"""Plugin: attaches its counts to each test, checks the skips of every run, and writes the report with --report.

pytest --report              .report/report.txt and .report/report.html
pytest --report=FOLDER       there instead
"""

import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import report, skips
from tests.support.counts import Counts, counting
from tests.support.report import RunData
from tests.support.skips import Skip

FOLDER = ".report"
COUNTS = pytest.StashKey[Counts]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("nanovllm").addoption(
        "--report",
        nargs="?",
        const=FOLDER,
        metavar="FOLDER",
        help=f"write what was compared, as text and HTML, into FOLDER ({FOLDER})",
    )


def pytest_configure(config: pytest.Config) -> None:
    folder = Path(config.option.report or FOLDER)
    if folder.is_file() or any(folder.glob("*.py")) or "::" in str(folder):
        raise pytest.UsageError(f"--report {folder}: those are tests; write --report=FOLDER, or put --report last")
    if not hasattr(config, "workerinput"):  # xdist's workers send their reports to this process
        config.pluginmanager.register(Reporter(config), "nanovllm_report")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    with counting() as counts:
        item.stash[COUNTS] = counts
        return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    if call.when == "teardown":
        item.user_properties += item.stash[COUNTS].to_properties()


class Reporter:
    """In the process that was started: adds up the reports of the tests, checks the skips, writes the report."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        names = [name for name in ("HYPOTHESIS_PROFILE", "NANOVLLM_TEST_SEED") if name in os.environ]
        arguments = shlex.join(map(str, config.invocation_params.args))
        self.data = RunData(
            command=" ".join([*(f"{name}={os.environ[name]}" for name in names), "python -m pytest", arguments])
        )
        self.running: dict[str, None] = {}  # node ids

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.data.outcomes["error"] += 1
        elif report.skipped:
            self.data.skips.append(_skip(report))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.running[nodeid] = None

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.running.pop(nodeid, None)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            self.data.skips.append(_skip(report))
        elif report.when == "call":
            self.data.outcomes[report.outcome] += 1
        elif report.failed:
            self.data.outcomes["error"] += 1
        if report.when == "teardown":
            self.data.counts.add_properties(report.user_properties)
            self.data.num_tests.update(dict(report.user_properties).get("comparisons", {}).keys())

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not getattr(self.config.option, "benchmark_only", False):  # benchmarks skip what cannot be measured here
            self.data.problems = skips.check(self.data.skips)
        if self.config.option.report:
            folder = Path(self.config.option.report)
            folder.mkdir(parents=True, exist_ok=True)
            for name, write in (("report.txt", report.to_text), ("report.html", report.to_html)):
                (folder / name).write_text(write(self.data), encoding="utf-8")
        if self.data.problems and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(trylast=True)  # the last lines are those that are read
    def pytest_terminal_summary(self, terminalreporter: Any, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.INTERRUPTED and self.running:
            terminalreporter.section("tests that were running when the run was interrupted", yellow=True)
            terminalreporter.write_line("\n".join(self.running))
        if self.data.problems:
            terminalreporter.section("the run fails", red=True)
            terminalreporter.write_line("\n".join(self.data.problems))
        if self.config.option.report:
            terminalreporter.write_line(f"written: {Path(self.config.option.report) / 'report.txt'}, report.html")


def _skip(report: pytest.CollectReport | pytest.TestReport) -> Skip:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return Skip(report.nodeid, reason.removeprefix("Skipped: "))
