"""What tests count, and how counts of several processes add up."""

from collections import Counter
from pathlib import Path

import pytest

from tests import evidence
from tests.evidence import Counts


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    """In the place of this process's own."""
    fresh = Counts()
    monkeypatch.setattr(evidence, "counts", fresh)
    return fresh


def test_of_errors_the_one_nearest_to_its_bound_is_kept(counts: Counts) -> None:
    for error, allowed in ((1.0, 10.0), (2.0, 4.0), (3.0, 100.0)):
        evidence.tolerated("x", error, allowed)
    assert counts.tolerances == {"x": (2.0, 4.0)}


@pytest.mark.parametrize(("error", "allowed"), [(0.0, 0.0), (float("nan"), 1.0), (float("inf"), 1.0), (0.0, -1.0)])
def test_errors_that_say_nothing_are_refused(counts: Counts, error: float, allowed: float) -> None:
    with pytest.raises(ValueError, match="for 'x'"):
        evidence.tolerated("x", error, allowed)


def test_a_way_of_judging_a_kernel_that_the_report_does_not_know_is_refused(counts: Counts) -> None:
    with pytest.raises(ValueError, match="way must be one of"):
        evidence.compared_kernel("rms_norm", "float16", "guessed")


def test_written_counts_start_again_and_all_files_are_read(counts: Counts, tmp_path: Path) -> None:
    for number in (1, 2):
        evidence.compared("a", number)
        evidence.happened("never", 0)
        evidence.tolerated("x", number, 4.0)
        evidence.write(str(tmp_path))
        assert counts == Counts()
    evidence.write(str(tmp_path))  # nothing to say
    assert len(list(tmp_path.iterdir())) == 2
    total = evidence.read(tmp_path)
    assert total.comparisons == Counter(a=3)
    assert dict(total.events) == {"never": 0}
    assert total.tolerances == {"x": (2, 4.0)}
