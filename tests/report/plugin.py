"""Plugin: judges the skips of every run; with --report, adds up the evidence, judges it too, and writes the page.

    pytest --report              .report/report.txt and .report/report.html
    pytest --report=FOLDER       there instead

Every process leaves its evidence in a folder that NANOVLLM_EVIDENCE names: pytest's own, xdist's workers, and those
that tests start.
"""

import os
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests import evidence
from tests.report import floors, skips
from tests.report.facts import PART, Facts, Skip, describe_machine, read_defects, read_mutants
from tests.report.html import to_html
from tests.report.page import make_page
from tests.report.scope import never_collected, scope_of
from tests.report.text import to_text

DEFAULT = ".report"
MOST_UNFINISHED = 40  # that are named
NEVER_COLLECTED = "never_collected"  # key of xdist's workeroutput


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("nanovllm").addoption(
        "--report",
        nargs="?",
        const=DEFAULT,
        metavar="FOLDER",
        help=f"write what was compared, as text and HTML, into FOLDER ({DEFAULT}); fail if it was too little",
    )


@pytest.hookimpl(tryfirst=True)  # before xdist starts workers, which take over the environment
def pytest_configure(config: pytest.Config) -> None:
    folder = Path(config.option.report or DEFAULT)
    if folder.is_file() or any(folder.glob("*.py")) or "::" in str(folder):
        raise pytest.UsageError(f"--report {folder}: those are tests; write --report=FOLDER, or put --report last")
    is_worker = hasattr(config, "workerinput")
    config.pluginmanager.register(Worker(config) if is_worker else Reporter(config), "nanovllm_report")


class Worker:
    """In a worker of xdist: hands over what only it knows."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    @pytest.hookimpl(tryfirst=True)  # before tests are deselected
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.config.workeroutput[NEVER_COLLECTED] = never_collected(items)  # type: ignore[attr-defined]

    def pytest_sessionfinish(self) -> None:
        evidence.write()


class Reporter:
    """In the process that was started: gathers the facts of the run, judges them, reports."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        command = shlex.join(["python", "-m", "pytest", *map(str, config.invocation_params.args)])
        seed = os.environ.get("NANOVLLM_TEST_SEED", "")
        self.facts = Facts(scope=scope_of(config), repeat=f"NANOVLLM_TEST_SEED={seed} {command}")
        self.problems: list[str] = []
        self.written: list[Path] = []
        self.unfinished: dict[str, None] = {}  # tests that have not ended, in their order
        self.folder: str | None = None  # of the evidence
        if config.option.report:
            self.folder = tempfile.mkdtemp(prefix="nanovllm-evidence-")
            self.outer_folder = os.environ.get(evidence.FOLDER)
            os.environ[evidence.FOLDER] = self.folder

    # --- while it runs ---

    @pytest.hookimpl(tryfirst=True)  # before tests are deselected
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.facts.never_collected = never_collected(items)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.unfinished.update(dict.fromkeys(item.nodeid for item in session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self.unfinished.update(dict.fromkeys(ids))  # the same of every worker, before any of them runs

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        output = getattr(node, "workeroutput", {})  # a worker that died has none
        self.facts.never_collected = output.get(NEVER_COLLECTED, self.facts.never_collected)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.facts.outcomes["error"] += 1
        elif report.skipped:
            self.facts.skips.append(_skip(report))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.facts.seconds[report.nodeid] += report.duration
        if report.when == "teardown":
            self.unfinished.pop(report.nodeid, None)
        if report.skipped and not hasattr(report, "wasxfail"):
            self.facts.skips.append(_skip(report))
        elif report.when == "call":
            self.facts.outcomes[report.outcome] += 1
        elif report.failed:
            self.facts.outcomes["error"] += 1

    # --- afterwards ---

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if session.exitstatus in (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR):
            self.facts.scope = PART
        if not getattr(self.config.option, "benchmark_only", False):  # benchmarks skip what cannot be measured here
            self.problems += skips.judge(self.facts.skips)
        if self.facts.scope != PART:
            skipped = {skip.test for skip in self.facts.skips}
            missing = [file for file in self.facts.never_collected if file not in skipped]
            self.problems += [f"never collected: {file}" for file in missing]
        if self.folder:
            self._report(self.folder)
        if self.problems and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def _report(self, folder: str) -> None:
        evidence.write(folder)
        facts = self.facts
        facts.counts = evidence.read(Path(folder))
        facts.defects, facts.mutants, facts.machine = read_defects(), read_mutants(), describe_machine()
        self.problems += floors.judge(facts)
        page = make_page(facts, self.problems)
        target = Path(self.config.option.report)
        target.mkdir(parents=True, exist_ok=True)
        for name, text in (("report.txt", to_text(page)), ("report.html", to_html(page))):
            (target / name).write_text(text, encoding="utf-8")
            self.written.append(target / name)

    @pytest.hookimpl(trylast=True)  # where people look
    def pytest_terminal_summary(self, terminalreporter: Any, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.INTERRUPTED and self.unfinished:
            terminalreporter.section(f"interrupted: {len(self.unfinished)} tests have not ended", yellow=True)
            for test in [*self.unfinished][:MOST_UNFINISHED]:
                terminalreporter.write_line(test)
            if len(self.unfinished) > MOST_UNFINISHED:
                terminalreporter.write_line("...")
        if self.problems:
            terminalreporter.section("the run fails", red=True)
            for problem in self.problems:
                terminalreporter.write_line(problem)
        for path in self.written:
            terminalreporter.write_line(f"written: {path}")

    def pytest_unconfigure(self) -> None:
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)
            os.environ.pop(evidence.FOLDER, None)
            if self.outer_folder:
                os.environ[evidence.FOLDER] = self.outer_folder


def _skip(report: pytest.CollectReport | pytest.TestReport) -> Skip:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return Skip(report.nodeid, reason.removeprefix("Skipped: "))
