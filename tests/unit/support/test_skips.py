"""Which skips fail a run in which every test passed."""

import pytest

from tests.support.skips import AllowedSkip, Skip, check

SKIP = Skip("tests/test_a.py::test_b[1]", "could not import 'x'")
ALLOWED = AllowedSkip(r"tests/test_a\.py::test_b.*", r"could not import 'x'", 2, "x is an extra", lambda: True)


def test_an_allowed_skip_passes_up_to_its_number() -> None:
    assert check([], [ALLOWED]) == []
    assert check([SKIP] * 2, [ALLOWED]) == []
    assert check([SKIP] * 3, [ALLOWED]) == [f"3 skips where at most 2 are allowed: {ALLOWED.test}"]


@pytest.mark.parametrize(
    "skip",
    [
        Skip("tests/test_a.py::test_c", "could not import 'x'"),
        Skip("tests/test_a.py::test_b", "CUDA out of memory"),
        Skip("other/tests/test_a.py::test_b", "could not import 'x'"),
    ],
)
def test_another_test_or_reason_fails(skip: Skip) -> None:
    (problem,) = check([skip], [ALLOWED])
    assert f"not on the list of tests/support/skips.py: {skip.test} ({skip.reason})" in problem


def test_an_allowed_skip_fails_where_nothing_is_missing() -> None:
    (problem,) = check([SKIP], [ALLOWED._replace(is_needed_here=lambda: False)])
    assert "nothing that it needs is missing here" in problem
