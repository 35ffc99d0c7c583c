"""Fixtures for tests of engines with several ranks."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.resource_snapshot import Watch


@pytest.fixture
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path of Fault's log, which is outside the directory that nothing_left watches."""
    return tmp_path_factory.mktemp("log") / "time"


@pytest.fixture
def nothing_left(tmp_path: Path) -> Iterator[Watch]:
    """Fails if this process has other resources (see ResourceSnapshot) after the test than before it."""
    watch = Watch(tmp_path)
    with watch.watching():
        before = watch.snapshot()
        yield watch
        assert watch.snapshot() == before
