"""SamplingParams: each rule at its edges, each message, greedy, and the forms that stop and stop_token_ids take."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from nanovllm import SamplingParams

NAN, INF = float("nan"), float("inf")
# option -> (values that are refused, the rule and remedy as the message states them, values that are accepted)
RULES: dict[str, tuple[list[Any], str, str, list[Any]]] = {
    "temperature": (
        [0, 0.0, 1e-10, -1.0, NAN, INF, "1", None, True],
        "a finite number above 1e-10",
        "use SamplingParams.greedy() for the most likely token at every step",
        [1.1e-10, 0.7, 1, 100.0, np.float32(0.5), np.float16(0.5)],
    ),
    "max_tokens": ([0, -1, 1.0, "5", None, True], "an integer of at least 1", "", [1, 10**9, np.int8(127)]),
    "ignore_eos": ([0, 1, None, "yes"], "True or False", "", [True, False]),
    "top_k": (
        [0, -1, 2.0, "2", True, 2**31],
        f"an integer from 1 to {2**31 - 1}",
        "use None for no limit",
        [1, 2**31 - 1, None, np.int64(50)],
    ),
    "top_p": ([0, 0.0, -0.1, 1.1, NAN, None, True], "a number in (0, 1]", "use 1.0 for no limit", [1e-9, 1, 1.0]),
    "min_p": ([-0.1, 1.1, NAN, INF, None, True], "a number in [0, 1]", "use 0.0 for no limit", [0, 0.0, 1, 1.0]),
    "seed": (
        [-1, 2**64, 1.0, "1", True],
        f"an integer from 0 to {2**64 - 1}",
        "use None to derive it from the engine's seed",
        [0, None, np.uint64(2**64 - 1)],
    ),
    "stop": ([5, "", b"x", ["a", ""], [1], [None]], "a non-empty string or a list of them", "", []),
    "stop_token_ids": (
        [5, "12", [-1], [1.0], [True], ["1"], [None]],
        "a list of token ids (integers of at least 0)",
        "",
        [],
    ),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, rule in RULES.items() for value in rule[0]])
def test_a_violation_says_name_rule_value_and_remedy(name: str, value: Any) -> None:
    """D12 for max_tokens."""
    _, rule, remedy, _ = RULES[name]
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the whole message is compared below
        SamplingParams(**{name: value})
    assert str(caught.value) == f"{name} must be {rule}, got {value!r}{'; ' + remedy if remedy else ''}"


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, rule in RULES.items() for value in rule[3]])
def test_values_at_the_edge_are_accepted(name: str, value: Any) -> None:
    """numpy integers become ints: num_prompt_tokens + np.int8(127) overflows."""
    taken = getattr(SamplingParams(**{name: value}), name)
    assert taken == value
    assert not isinstance(taken, np.integer)


def test_every_option_has_its_rules_tested() -> None:
    assert set(RULES) == {field.name for field in dataclasses.fields(SamplingParams)}


@pytest.mark.parametrize("value", [1e39, 3.5e38, 10**300, np.float64(1e39)])
def test_a_temperature_beyond_float32_is_refused(value: Any) -> None:
    """D94: the sampler computes in float32, where it would be infinite."""
    with pytest.raises(ValueError, match=r"^temperature must be a number of at most 3\.4e\+38, .* got .*; lower it$"):
        SamplingParams(temperature=value)
    assert np.isfinite(np.float32(SamplingParams(temperature=3.4e38).temperature))


def test_stop_and_stop_token_ids_become_tuples() -> None:
    for stop, expected in (("ab", ("ab",)), (["a", "b"], ("a", "b")), (("a",), ("a",)), ([], ()), (None, ())):
        assert SamplingParams(stop=stop).stop == expected
    for stop_token_ids in ([3, 5], np.array([3, 5]), range(3, 6, 2)):
        taken = SamplingParams(stop_token_ids=stop_token_ids).stop_token_ids
        assert (taken, {type(item) for item in taken}) == ((3, 5), {int})


def test_greedy_is_top_k_1_with_every_other_option_free() -> None:
    params = SamplingParams.greedy(max_tokens=3, stop="x")
    assert params == SamplingParams(top_k=1, max_tokens=3, stop="x")
    assert (params.is_greedy, SamplingParams(top_k=2).is_greedy, SamplingParams().is_greedy) == (True, False, False)
    with pytest.raises(TypeError, match="top_k"):
        SamplingParams.greedy(top_k=5)
