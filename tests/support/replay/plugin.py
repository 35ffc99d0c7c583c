"""pytest plugin: a failing test leaves the traces of its schedulers and engines in .traces/; --replay plays one again.

    python -m pytest --replay .traces/NAME.jsonl [--replay-device cpu|cuda|none] [--replay-mode eager|graph]
                                                 [--replay-backend torch|triton|flash_attn]

A trace outside the checkout is given as --replay=FILE. Device "none" replays the decisions alone, without torch.
Loaded by conftest.py in the root.
"""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.replay import recorder
from tests.replay.observing import described
from tests.replay.trace import Trace, TraceError

FOLDER = ".traces"
REPLAY_FILE = Path(__file__).with_name("replay_file.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("replay", "replaying what a failing test did")
    group.addoption("--replay", action="append", metavar="FILE", help="play a trace again, and no other test")
    group.addoption("--replay-device", choices=["cpu", "cuda", "none"], help="as recorded by default; none: no model")
    group.addoption("--replay-mode", choices=["eager", "graph"], help="as recorded by default")
    group.addoption("--replay-backend", help="attention backend; as recorded by default")


def pytest_configure(config: pytest.Config) -> None:
    recorder.install()
    if not config.getoption("--replay"):
        return
    for path in replayed_files(config):
        try:
            Trace.load(path)
        except TraceError as error:
            raise pytest.UsageError(f"--replay: {error}") from None
    if config.getoption("--replay-mode") == "graph" and config.getoption("--replay-device") != "cuda":
        raise pytest.UsageError("--replay-mode graph needs --replay-device cuda: graphs are recorded on a GPU")
    config.args = [f"{REPLAY_FILE}::test_replay"]


def replayed_files(config: pytest.Config) -> list[Path]:
    return [config.invocation_params.dir / name for name in config.getoption("--replay") or []]


def replay_options(config: pytest.Config) -> dict[str, Any]:
    """The keywords of player.machine_for."""
    options: dict[str, Any] = {"device": config.getoption("--replay-device")}
    if mode := config.getoption("--replay-mode"):
        options["enforce_eager"] = mode == "eager"
    if backend := config.getoption("--replay-backend"):
        options["attention_backend"] = backend
    return options


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "replayed_file" in metafunc.fixturenames:
        metafunc.parametrize("replayed_file", replayed_files(metafunc.config), ids=lambda path: path.name)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    recorder.begin_test(item.nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if report.failed and call.excinfo is not None:
        paths = leave_traces(item.config.rootpath / FOLDER, item.nodeid, described(call.excinfo.value))
        if paths:
            lines = [f"python -m pytest --replay {path.relative_to(item.config.rootpath)}" for path in paths]
            report.sections.append(("replay with", "\n".join(lines)))
    return report


def leave_traces(folder: Path, test: str, error: str) -> list[Path]:
    """Write what the failing test's schedulers did, the one that did something last first."""
    paths = []
    for number, recording in enumerate(reversed(recorder.recordings_of_test())):
        trace = recording.trace()
        trace.failure = {"failed": test, "error": error[:2000]}
        name = re.sub(r"[^A-Za-z0-9_.]+", "-", test)[-120:].strip("-")
        paths.append(folder / f"{name}{f'-{number + 1}' if number else ''}.jsonl")
        trace.save(paths[-1])
    return paths
