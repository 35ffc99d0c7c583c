"""Plugin: attaches its counts to each test, checks the skips of every run, and writes the report with --report.

pytest --report[=FOLDER] writes FOLDER/report.md (.report): what was compared with which oracle and how often, which
events occurred, how much of each tolerance was used, what was skipped and why.
"""

import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import skips
from tests.support.counts import Counts, counting
from tests.support.skips import Skip

FOLDER, FILE = ".report", "report.md"
COUNTS = pytest.StashKey[Counts]()


def pytest_addoption(parser: pytest.Parser) -> None:
    text = f"write what the run compared into FOLDER/{FILE} ({FOLDER})"
    parser.getgroup("nanovllm").addoption("--report", nargs="?", const=FOLDER, metavar="FOLDER", help=text)


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
    """In the main process: adds up the reports of the tests, checks the skips, writes the report."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.outcomes: Counter[str] = Counter()  # passed, failed, error: of tests
        self.skips: list[Skip] = []
        self.counts = Counts()
        self.problems: list[str] = []
        self.running: dict[str, None] = {}  # node ids

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.outcomes["error"] += 1
        elif report.skipped:
            self.skips.append(_skip(report))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.running[nodeid] = None

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.running.pop(nodeid, None)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            self.skips.append(_skip(report))
        elif report.when == "call" or report.failed:
            self.outcomes[report.outcome if report.when == "call" else "error"] += 1
        if report.when == "teardown":
            self.counts.add_properties(report.user_properties)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not getattr(self.config.option, "benchmark_only", False):  # benchmarks skip what cannot be measured here
            self.problems = skips.check(self.skips)
        if self.config.option.report:
            path = Path(self.config.option.report, FILE)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self.text(), encoding="utf-8")
        if self.problems and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(trylast=True)  # so that these are the last lines
    def pytest_terminal_summary(self, terminalreporter: Any, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.INTERRUPTED and self.running:
            terminalreporter.section("tests that were running when the run was interrupted", yellow=True)
            terminalreporter.write_line("\n".join(self.running))
        if self.problems:
            terminalreporter.section("the run fails", red=True)
            terminalreporter.write_line("\n".join(self.problems))
        if self.config.option.report:
            terminalreporter.write_line(f"written: {Path(self.config.option.report, FILE)}")

    def text(self) -> str:
        """The report in Markdown."""
        torch = sys.modules.get("torch")
        gpu = torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else "no GPU"
        failed = self.outcomes["failed"] + self.outcomes["error"]
        used = sorted(((error / most, name, error, most) for name, (error, most) in self.counts.errors.items()))[::-1]
        sections: dict[str, Iterable[str]] = {
            "What this run checked": [
                f"{self.outcomes['passed']:,} tests passed, {failed:,} failed, {len(self.skips):,} skipped",
                f"`python -m pytest {shlex.join(map(str, self.config.invocation_params.args))}`, {gpu}",
                *(f"**The run fails:** {problem}" for problem in self.problems),
            ],
            "Values compared": (f"{name}: {number:,}" for name, number in sorted(self.counts.comparisons.items())),
            "Events": (f"{name}: {number:,}" for name, number in sorted(self.counts.events.items())),
            "Tolerance used (near 0 %, a small mistake could pass)": (
                f"{share:.0%} of {name}: {error:.2g} of {most:.2g}" for share, name, error, most in used
            ),
            "Skipped": (f"{skip.test}: {skip.reason}: {skips.why(skip) or 'NOTHING'}" for skip in sorted(self.skips)),
        }
        return "\n".join(
            f"# {title}\n\n" + "".join(f"- {line}\n" for line in lines) for title, lines in sections.items()
        )


def _skip(report: pytest.CollectReport | pytest.TestReport) -> Skip:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return Skip(report.nodeid, reason.removeprefix("Skipped: "))
