"""Plugin: `--kernel NAME=SOURCE` runs our cases, or with --benchmark-only our benchmarks, on the tester's own callable.

Only tests that judge the callable run: on a GPU if there is one, else in Triton's interpreter, where a callable in
plain PyTorch runs too. The run ends with what was judged, and fails if nothing was. own_kernels.py has the mechanism.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

MARKER = "own_kernel"


def pytest_addoption(parser: pytest.Parser) -> None:
    text = (
        "judge this callable in the place of our kernel NAME. SOURCE: package.module:function, "
        "path/to/file.py:function or path/to/solution.json (FlashInfer-Trace); may be given several times. "
        "See docs/own_kernels.md"
    )
    parser.getgroup("nanovllm").addoption("--kernel", action="append", metavar="NAME=SOURCE", help=text)


@pytest.hookimpl(tryfirst=True)  # before gpu_sharing's, which reads -m
def pytest_cmdline_main(config: pytest.Config) -> None:
    """With --kernel and without -m: the tests for a GPU if there is one."""
    option = config.option
    is_default = option.markexpr in config.getini("addopts")
    if option.kernel and not option.benchmark_only and is_default and _has_gpu():
        option.markexpr = "gpu"


@pytest.hookimpl(trylast=True)  # after benchmarks/conftest.py's, which chooses between tests and benchmarks
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"{MARKER}: judges the callable that --kernel gives")
    if not config.option.kernel:
        return
    from tests.support.kernels import own_kernels

    try:
        own_kernels.install(config.option.kernel)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    except ImportError as error:
        raise pytest.UsageError(f"--kernel: the cases cannot be loaded: {error}") from error
    is_benchmark = bool(config.option.benchmark_only)
    if is_benchmark and not _has_gpu():
        raise pytest.UsageError("--kernel with --benchmark-only: it takes an NVIDIA GPU, and torch finds none here")
    names_none = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    if is_benchmark and (names_none or not any("benchmarks" in argument for argument in config.args)):
        config.args = [str(config.rootpath / "benchmarks" / "kernels")]  # also in the place of tests/kernels
    elif names_none:
        config.args = [str(config.rootpath / "tests" / "kernels")]
    if not hasattr(config, "workerinput"):  # xdist's workers send their reports to this process
        config.pluginmanager.register(Judgements(config), "nanovllm_own_kernels")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what does not judge the callables, and say in each item's properties which it judges."""
    if not config.option.kernel:
        return
    from tests.support.kernels import own_kernels

    kept, left_out = [], []
    for item in items:
        names = []
        if item.get_closest_marker(MARKER) is not None and isinstance(item, pytest.Function):
            kernel, case = item.callspec.params["kernel"], item.callspec.params.get("name")
            if case not in kernel.beyond_contract:
                names = [own.name for own in own_kernels.installed() if own.path.startswith(f"{kernel.name}.")]
        (kept if names else left_out).append(item)
        if names:
            item.user_properties.append((MARKER, names))
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


class Judgements:
    """In the main process: what was judged of each callable, printed at the end."""

    def __init__(self, config: pytest.Config) -> None:
        self.specs = dict(spec.split("=", 1) for spec in config.option.kernel)
        self.outcomes: dict[str, Counter[str]] = {name: Counter() for name in self.specs}
        self.reasons: dict[str, Counter[str]] = {name: Counter() for name in self.specs}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name in dict(report.user_properties).get(MARKER, ()):
            if report.skipped and isinstance(report.longrepr, tuple):
                self.reasons[name][re.sub(r"^(Skipped: )?(not judged: )?", "", report.longrepr[2])] += 1
            elif report.when == "call" or report.failed:
                self.outcomes[name][report.outcome] += 1

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if session.config.option.collectonly:
            return
        ended_well = session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
        if ended_well and not all(self.outcomes.values()):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if terminalreporter.config.option.collectonly:
            return
        terminalreporter.section("kernels given by --kernel")
        for name, source in self.specs.items():
            passed, failed = self.outcomes[name]["passed"], self.outcomes[name]["failed"]
            verdict = (
                f"{passed} tests passed, {failed} failed" if passed + failed else "nothing was judged: the run fails"
            )
            num_skipped = self.reasons[name].total()
            terminalreporter.write_line(f"{name} by {source}: {verdict}, {num_skipped} judged nothing")
            for reason, number in self.reasons[name].most_common():
                short = reason.replace(f"{Path.cwd()}/", "")[:200]
                terminalreporter.write_line(f"    {number} x {short}")
