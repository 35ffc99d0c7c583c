"""validation: integers, numbers and option names. test_config.py and test_sampling_params.py hold the messages."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from nanovllm.validation import check_option_names, is_int, require_number


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, -3, 2**70, np.int8(5), np.uint64(2**64 - 1)], True),
        ([True, np.bool_(True), 1.0, np.float32(1), "1", None, Fraction(1), [1]], False),
        ([np.array(1), np.array([1])], False),  # an array has __index__ too; as a token id, numpy failed with it
    ],
)
def test_which_values_are_integers(values: list[Any], expected: bool) -> None:
    """D12."""
    assert [is_int(value) for value in values] == [expected] * len(values)


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
