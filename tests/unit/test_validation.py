"""validation: integers, numbers and option names. test_config.py and test_sampling_params.py hold the messages."""

import dataclasses
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from nanovllm.validation import check_option_names, is_int, reject_unknown_options, require_number


@pytest.mark.parametrize("value", [0, -3, 2**70, np.int8(5), np.uint64(2**64 - 1)])
def test_integers_are_ints_and_numpy_integers(value: Any) -> None:
    assert is_int(value)


@pytest.mark.parametrize("value", [True, np.bool_(True), 1.0, np.float32(1), "1", None, Fraction(1), [1]])
def test_bools_and_what_only_looks_like_an_integer_are_not(value: Any) -> None:
    assert not is_int(value)


@pytest.mark.parametrize("value", [np.array(1), np.array([1])])
def test_an_array_is_no_integer(value: Any) -> None:
    """D12: an array has __index__ too; accepted as a token id it failed with an error of numpy."""
    assert not is_int(value)


@pytest.mark.parametrize("value", [np.float32("inf"), 2**1024, np.bool_(True), 1j, [1.0]])
def test_a_number_is_finite_and_real(value: Any) -> None:
    require_number("share", np.float64(0.5), "a number", lambda _: True)
    with pytest.raises(ValueError, match=r"share must be a number, got .*; give 0.5"):
        require_number("share", value, "a number", lambda _: True, remedy="give 0.5")


def test_an_unknown_name_is_refused_with_the_nearest_or_all() -> None:
    """D69"""
    known = ["min_seqs", "max_seqs"]
    check_option_names("Thing", known, known)
    with pytest.raises(TypeError, match=r"Thing has no option 'max_seq'; did you mean 'max_seqs'\?"):
        check_option_names("Thing", ["min_seqs", "max_seq"], known)
    with pytest.raises(TypeError, match="Thing has no option 'zzz'; known options: min_seqs, max_seqs"):
        check_option_names("Thing", ["zzz"], known)


def test_decorated_dataclasses_stay_dataclasses() -> None:
    @reject_unknown_options
    @dataclasses.dataclass(frozen=True)
    class Point:
        first: int
        second: int = 2

    assert dataclasses.replace(Point(1), second=5) == Point(1, 5)
    with pytest.raises(TypeError, match=r"Point has no option 'secnd'; did you mean 'second'\?"):
        Point(1, secnd=3)  # type: ignore[call-arg]
