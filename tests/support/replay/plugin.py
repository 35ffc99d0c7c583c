"""Plugin: `pytest --record` leaves a trace in .traces/ of the last scheduler that a failing test used. Only with this
option, Scheduler and LLMEngine are patched for the run, so that each scheduler is recorded from its construction on.
"""

import re
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLMEngine
from nanovllm.engine.scheduler import Scheduler
from tests.support.replay.trace import Trace, describe, record

LAST = pytest.StashKey[Trace | None]()  # of the running test: the trace with the last event


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("nanovllm")
    group.addoption("--record", action="store_true", help="a failed test leaves its scheduler's trace in .traces/")


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--record"):
        return
    make_scheduler, make_engine = Scheduler.__init__, LLMEngine.__init__

    def scheduler_init(scheduler: Any, *args: Any, **limits: Any) -> None:
        make_scheduler(scheduler, *args, **limits)
        scheduler._trace = record(scheduler, lambda trace: config.stash.__setitem__(LAST, trace))

    def engine_init(engine: Any, *args: Any, **options: Any) -> None:
        make_engine(engine, *args, **options)
        engine.scheduler._trace.header["engine"] = describe(engine)

    patch = pytest.MonkeyPatch()
    patch.setattr(Scheduler, "__init__", scheduler_init)
    patch.setattr(LLMEngine, "__init__", engine_init)
    config.add_cleanup(patch.undo)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.config.stash[LAST] = None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    report = yield
    trace = item.config.stash.get(LAST, None)
    if report.failed and trace is not None:
        path = Path(".traces", re.sub(r"[^\w.]+", "-", item.nodeid)[-120:].strip("-") + ".jsonl")
        trace.save(item.config.rootpath / path)
        report.sections.append(("replay with", f"python -m tests.support.replay.player {path}"))
    elif report.failed and not item.config.getoption("--record"):
        report.sections.append(("record", "with --record, the command leaves a trace of the test's scheduler"))
    return report
