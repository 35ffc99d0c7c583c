"""Engines with several ranks, and the check that they leave nothing behind."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.resource_snapshot import Watch


@pytest.fixture
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For Fault, outside the directory that nothing_left watches."""
    return tmp_path_factory.mktemp("log") / "time"


@pytest.fixture
def nothing_left(tmp_path: Path) -> Iterator[Watch]:
    """Fails unless, after the test, this process holds what it held before."""
    watch = Watch(tmp_path)
    with watch.watching():
        before = watch.snapshot()
        yield watch
        assert watch.snapshot() == before
