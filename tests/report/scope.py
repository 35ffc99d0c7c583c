"""How much of the suite a run covers: floors and the check that no file was forgotten are for whole runs."""

from collections.abc import Iterable

import pytest

from tests.report.facts import GPU, PART, WHOLE

CUTS = (
    "keyword",
    "lf",
    "stepwise",
    "deselect",
    "ignore",
    "ignore_glob",
    "maxfail",
    "collectonly",
    "benchmark_only",
    "replay",
)


def scope_of(config: pytest.Config) -> str:
    """What the command line asks for: WHOLE, GPU or PART."""
    if any(getattr(config.option, name, None) for name in CUTS):
        return PART
    if config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        return PART
    addopts = config.getini("addopts")
    default = addopts[addopts.index("-m") + 1] if "-m" in addopts else ""
    return {default: WHOLE, "gpu": GPU}.get(config.option.markexpr, PART)


def never_collected(items: Iterable[pytest.Item]) -> list[str]:
    """Test files below tests/ of which no test is among `items`, those that a run is to choose from."""
    items = list(items)
    if not items:
        return []
    root = items[0].config.rootpath
    seen = {item.path for item in items}
    return [path.relative_to(root).as_posix() for path in sorted(root.glob("tests/**/test_*.py")) if path not in seen]
