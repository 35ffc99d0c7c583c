"""validation: what counts as an integer or a number, and the form of every message: name, rule, value, remedy."""

import dataclasses
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from nanovllm.validation import (
    check_option_names,
    is_int,
    reject_unknown_options,
    require_bool,
    require_choice,
    require_int,
    require_number,
)


def is_positive(value: float) -> bool:
    return value > 0


@pytest.mark.parametrize("value", [0, -3, 2**70, np.int8(5), np.int64(-1), np.uint64(2**64 - 1)])
def test_integers_are_ints_and_numpy_integers(value: Any) -> None:
    assert is_int(value)


@pytest.mark.parametrize("value", [True, np.bool_(True), 1.0, np.float32(1), "1", None, Fraction(1), [1]])
def test_bools_and_what_only_looks_like_an_integer_are_not(value: Any) -> None:
    assert not is_int(value)


@pytest.mark.parametrize("value", [np.array(1), np.array([1]), np.array([1, 2])])
def test_an_array_is_no_integer(value: Any) -> None:
    """D12: an array has __index__ too; taken for a token id it failed with numpy's words, not ours."""
    assert not is_int(value)


@pytest.mark.parametrize(
    ("value", "maximum", "message"),
    [
        (0, None, "size must be an integer of at least 1, got 0; make it larger"),
        (9, 8, "size must be an integer from 1 to 8, got 9; make it larger"),
        (True, None, "size must be an integer of at least 1, got True; make it larger"),
        (2.0, None, "size must be an integer of at least 1, got 2.0; make it larger"),
        ("7", 8, "size must be an integer from 1 to 8, got '7'; make it larger"),
    ],
)
def test_require_int_says_name_rule_value_and_remedy(value: Any, maximum: int | None, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the whole message is compared below
        require_int("size", value, 1, maximum, remedy="make it larger")
    assert str(caught.value) == message


@pytest.mark.parametrize("value", [1, 8, np.int32(8)])
def test_require_int_takes_both_ends(value: Any) -> None:
    require_int("size", value, 1, 8)


@pytest.mark.parametrize("value", [0.5, 3, np.float32(0.5), np.float64(0.5), np.int64(2)])
def test_require_number_takes_python_and_numpy_numbers(value: Any) -> None:
    require_number("share", value, "a number above 0", is_positive)


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), np.float32("inf"), 2**1024, True, np.bool_(True), "0.5", None, 1j, [1.0], 0.0]
)
def test_require_number_refuses_the_rest(value: Any) -> None:
    with pytest.raises(ValueError, match="share must be a number above 0, got ") as caught:
        require_number("share", value, "a number above 0", is_positive, remedy="give 0.5")
    assert str(caught.value).endswith(f"got {value!r}; give 0.5")


@pytest.mark.parametrize("value", [1, 0, None, "True", np.bool_(True)])
def test_require_bool_takes_true_and_false_only(value: Any) -> None:
    require_bool("flag", False)
    with pytest.raises(ValueError, match="flag must be True or False, got "):
        require_bool("flag", value)


@pytest.mark.parametrize("value", ["c", "A", "", None, ["a"]])
def test_require_choice_lists_the_choices(value: Any) -> None:
    require_choice("letter", "a", ("a", "b"))
    with pytest.raises(ValueError, match="letter must be one of 'a', 'b', got ") as caught:
        require_choice("letter", value, ("a", "b"), remedy="take one")
    assert str(caught.value).endswith(f"got {value!r}; take one")


def test_an_unknown_name_offers_the_nearest() -> None:
    """D69."""
    with pytest.raises(TypeError, match=r"Thing has no option 'max_seq'; did you mean 'max_seqs'\?"):
        check_option_names("Thing", ["min_seqs", "max_seq"], ["min_seqs", "max_seqs"])


def test_a_name_near_to_none_gets_the_whole_list() -> None:
    """D69."""
    with pytest.raises(TypeError, match="Thing has no option 'zzz'; known options: min_seqs, max_seqs"):
        check_option_names("Thing", ["zzz"], ["min_seqs", "max_seqs"])


def test_decorated_dataclasses_stay_dataclasses() -> None:
    @reject_unknown_options
    @dataclasses.dataclass(frozen=True)
    class Point:
        first: int
        second: int = 2

    assert dataclasses.replace(Point(1), second=5) == Point(1, 5)
    with pytest.raises(TypeError, match=r"Point has no option 'secnd'; did you mean 'second'\?"):
        Point(1, secnd=3)  # type: ignore[call-arg]
