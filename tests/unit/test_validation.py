"""validation: integers, numbers and option names. test_config.py and test_sampling_params.py hold the messages."""

import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from nanovllm import Config, SamplingParams
from nanovllm.validation import is_int, require_number


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


@pytest.mark.parametrize("options", [Config("model"), SamplingParams(stop=["a"], stop_token_ids=[1])], ids=repr)
def test_options_cannot_be_changed_and_equal_ones_are_equal(options: Any) -> None:
    with pytest.raises(FrozenInstanceError):
        options.seed = 3
    twin = pickle.loads(pickle.dumps(options))
    assert (twin, hash(twin)) == (options, hash(options))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Config("model", max_seqs=1), r"Config has no option 'max_seqs'; did you mean 'max_num_seqs'\?"),
        (lambda: SamplingParams(temprature=1), r"SamplingParams has no option .*did you mean 'temperature'\?"),
        (lambda: SamplingParams.greedy(temprature=1), r"SamplingParams has no option .*did you mean 'temperature'\?"),
        (lambda: SamplingParams(zzz=1), "SamplingParams has no option 'zzz'; known options: temperature, max_tokens, "),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_or_all(make: Callable[[], Any], message: str) -> None:
    """D69"""
    with pytest.raises(TypeError, match=message):
        make()
