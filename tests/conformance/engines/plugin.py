"""Plugin: `pytest tests/conformance/engines --engine MODULE:CLASS` holds any engine to the contracts; without it, ours.

    --engine-path FOLDER        holds the package, for an engine that is not installed, or is called nanovllm too
    --engine-adapter NAME       the style of its calls, of adapters.py; recognised by its SamplingParams if not given
    --engine-option NAME=VALUE  a further keyword argument of its constructor, as often as needed

SamplingParams is looked for in the module, then in its package. What cannot be used ends the run in one message.
"""

import ast
import difflib
import importlib
import inspect
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.engines.adapters import ADAPTERS, NANOVLLM, Target, recognise

TARGET = pytest.StashKey[Target]()
OURS = Target(("nanovllm", "LLM"), ("nanovllm", "SamplingParams"), NANOVLLM)
TESTS = "tests/conformance/engines/test_engine.py::test_contract"
NOT_APPLICABLE = "not applicable: "


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("nanovllm")
    group.addoption("--engine", metavar="MODULE:CLASS", help="the engine that tests/conformance/engines runs (ours)")
    group.addoption("--engine-path", metavar="FOLDER", help="folder that holds the package of --engine")
    group.addoption("--engine-adapter", choices=[*ADAPTERS], help="how --engine is called (recognised)")
    group.addoption("--engine-option", action="append", default=[], metavar="NAME=VALUE", help="for its constructor")


def pytest_configure(config: pytest.Config) -> None:
    option = config.option
    if option.engine is None:
        if option.engine_path or option.engine_adapter or option.engine_option:
            raise pytest.UsageError("--engine-path, --engine-adapter and --engine-option need --engine MODULE:CLASS")
        target = OURS
    else:
        try:
            options = dict(map(parse_option, option.engine_option))
            target = find_target(option.engine, option.engine_path, option.engine_adapter, options)
        except ValueError as error:
            raise pytest.UsageError(f"--engine {option.engine}: {error}") from error
        config.addinivalue_line("filterwarnings", "default")  # what it warns of is no contract's business
    config.stash[TARGET] = target


def parse_option(text: str) -> tuple[str, Any]:
    """NAME=VALUE; a value that is no Python literal is a string. Raises ValueError."""
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise ValueError(f"--engine-option {text}: write NAME=VALUE, for example enforce_eager=True")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def find_target(spec: str, path: str | None, adapter_name: str | None, options: dict[str, Any]) -> Target:
    """Import the engine. Raises ValueError, which says what is wrong with `spec` and what to do."""
    module_name, colon, class_name = spec.partition(":")
    if not (colon and class_name.isidentifier() and all(part.isidentifier() for part in module_name.split("."))):
        raise ValueError("write MODULE:CLASS, for example nanovllm:LLM")
    if path is not None:
        _put_first(path, module_name)
    module = _import(module_name, path)
    engine = getattr(module, class_name, None)
    if not inspect.isclass(engine):
        classes = [name for name in dir(module) if inspect.isclass(getattr(module, name, None))]
        near = difflib.get_close_matches(class_name, classes, 3, cutoff=0) or ["no class at all"]
        raise ValueError(f"module {module_name} has no class {class_name}; it has {', '.join(near)}")
    if not callable(getattr(engine, "generate", None)):
        raise ValueError("this class is no engine: it has no method generate(prompts, sampling_params)")
    params_module, fields = _find_sampling_params(module_name)
    adapter = recognise(fields) if adapter_name is None else ADAPTERS[adapter_name]
    if adapter is None:
        raise ValueError(
            f"SamplingParams has the fields {', '.join(fields)}, which no adapter recognises; choose one with "
            f"--engine-adapter ({', '.join(ADAPTERS)}), or add one to tests/conformance/engines/adapters.py"
        )
    return Target((module_name, class_name), (params_module, "SamplingParams"), adapter.fitted(fields), options, path)


def _put_first(path: str, module_name: str) -> None:
    """Import the package from `path`, though a package of that name, ours for example, was imported from elsewhere."""
    folder = Path(path).resolve()
    if not folder.is_dir():
        raise ValueError(f"--engine-path {path} is no folder")
    sys.path.insert(0, str(folder))
    package = module_name.partition(".")[0]
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]


def _import(module_name: str, path: str | None) -> Any:
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        remedy = "install it, or name the folder that holds it with --engine-path"
        raise ValueError(f"module {module_name} cannot be imported ({error!r}): {remedy}") from error
    file = Path(getattr(module, "__file__", None) or ".").resolve()
    if path is not None and Path(path).resolve() not in file.parents:
        raise ValueError(f"--engine-path {path} holds no module {module_name}; Python found {file}")
    return module


def _find_sampling_params(module_name: str) -> tuple[str, list[str]]:
    """The module that has SamplingParams, and the names of its fields."""
    for name in dict.fromkeys((module_name, module_name.partition(".")[0])):
        params = getattr(importlib.import_module(name), "SamplingParams", None)
        if inspect.isclass(params):
            return name, list(getattr(params, "__struct_fields__", None) or inspect.signature(params).parameters)
    raise ValueError(f"there is no class SamplingParams in module {module_name} or its package: import it there")


@pytest.hookimpl(trylast=True)  # after the tests were shuffled
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Contracts run in their order: after the last ones, some engines leave the process unusable."""
    places = [place for place, item in enumerate(items) if item.nodeid.startswith(TESTS)]
    for place, item in zip(
        places, sorted((items[place] for place in places), key=lambda item: item.nodeid), strict=True
    ):
        items[place] = item


@pytest.hookimpl(wrapper=True, tryfirst=True)  # around tests/conftest.py's, which writes how to repeat the test
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    report = yield
    option = item.config.option
    if option.engine is not None:
        pairs = [("--engine", option.engine), ("--engine-path", option.engine_path)]
        pairs += [("--engine-adapter", option.engine_adapter)]
        pairs += [("--engine-option", one) for one in option.engine_option]
        command = shlex.join(["pytest", *(f"{name}={value}" for name, value in pairs if value is not None)])
        report.sections = [
            (title, text.replace("pytest", command, 1) if title == "repeat with" else text)
            for title, text in report.sections
        ]
    return report


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Which contracts the given engine keeps."""
    if config.option.engine is None:
        return
    target = config.stash[TARGET]
    terminalreporter.section(f"contracts of engines: {target.name}, called as {target.adapter.name}")
    for word, outcome in (("kept", "passed"), ("broken", "failed"), ("not applicable", "skipped")):
        reports = [one for one in terminalreporter.stats.get(outcome, []) if one.nodeid.startswith(TESTS)]
        for report in sorted(reports, key=lambda report: report.nodeid):
            reason = str(report.longrepr[2]).partition(NOT_APPLICABLE)[2] if outcome == "skipped" else ""
            terminalreporter.write_line(f"{report.nodeid[len(TESTS) + 1 : -1]} {word}{reason and ': '}{reason}")
