"""The sampler where filters just keep or just drop a token: ties, boundaries, -inf, NaN, +inf, odd vocabularies."""

import math

import numpy as np
import pytest
import torch
from hypothesis import event, example, given
from hypothesis import strategies as st

from nanovllm.layers.sampler import Sampler, allowed_mask
from reference.sampling import allowed_mask as reference_allowed_mask
from reference.sampling import exponential_noise
from tests.support.counts import count_comparisons
from tests.support.sampler_draws import make_rows, rows_on_device

# float32 rounds a probability and a sum of them by less than this, relatively: where the filters' choice hangs on less,
# either is right.
ROUNDING = 1e-5
INF, NAN, MAX = math.inf, math.nan, torch.finfo(torch.float32).max


def reachable(logits: list[float], **filters: float) -> set[int]:
    """The tokens that 2000 draws give; each that may be drawn has a probability of 1/9 or more."""
    rows = make_rows(2000, position=np.arange(2000), **filters)
    return set(Sampler()(torch.tensor([logits]).expand(2000, -1), rows_on_device(rows, "cpu")).tolist())


# --- any logits, any filters ---

SPECIAL = [0.0, -0.0, 1.0, 1.0, 2.5, -3.0, -INF, NAN, INF, MAX, -MAX]
# Equal, or apart by what a probability in float64 still shows: the reference ranks by it, the sampler by the logit.
numbers = st.integers(-5120, 5120).map(lambda number: number / 256)
logit = st.one_of(st.sampled_from(SPECIAL), st.sampled_from([0.0, 1.0, 2.0, -INF]), numbers)


@given(
    logits=st.lists(logit, min_size=1, max_size=70),
    temperature=st.sampled_from([1e-3, 0.3, 1.0, 2.0, 1e4]),
    top_k=st.sampled_from([0, 1, 2, 3, 5, 40, 1000]),
    top_p=st.sampled_from([1e-6, 0.25, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 1e-6, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 2**32 - 1),
)
@example(logits=[-INF, -MAX], temperature=1e-3, top_k=0, top_p=1.0, min_p=0.0, seed=0, position=0)
@example(logits=[-INF, -MAX], temperature=1e-3, top_k=1, top_p=1.0, min_p=0.0, seed=0, position=0)
def test_any_row_keeps_and_draws_what_float64_says(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, seed: int, position: int
) -> None:
    """D56: NaN is -inf, +inf the largest number, after division by the temperature too.

    A filter that hangs on rounding may go either way, nothing else.
    """
    row, rows = torch.tensor(logits), make_rows(
        1, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, position=position
    )  # fmt: skip
    tensors = rows_on_device(rows, "cpu")
    token = Sampler()(row[None], tensors).item()
    z = (row / tensors.temperature).nan_to_num(nan=-INF, neginf=-INF, posinf=MAX)
    count_comparisons("sampler: drawn tokens against float64")
    if top_k == 1:
        clean = row.nan_to_num(nan=-INF, neginf=-INF, posinf=MAX)
        assert token == int((clean == clean.max()).nonzero()[0])
        return
    if not (z > -INF).any():
        assert token == 0
        return
    top_p, min_p = float(rows.top_p[0]), float(rows.min_p[0])  # as float32 has them
    least, most = (
        reference_allowed_mask(z.double(), top_k or None, top_p * (1 - by) if top_p < 1 else 1.0, min_p * (1 + by))
        for by in (ROUNDING, -ROUNDING)
    )
    least[(z == z.max()).nonzero()[0]] = True  # which a min_p of a little more than 1 would drop
    ours = allowed_mask(z[None], tensors.top_k, tensors.top_p, tensors.min_p)[0]
    assert bool((least <= ours).all())
    assert bool((ours <= most).all())
    event("the filters' choice hangs on rounding" if not torch.equal(least, most) else "the filters' choice is clear")
    race = z.double() - exponential_noise(seed, position, len(logits)).log()
    assert token == int(race.where(ours, -INF).argmax())


# --- exactly at a boundary ---


@pytest.mark.parametrize("vocab_size", [1, 2, 4, 8])
def test_top_p_that_is_reached_exactly_needs_no_further_token(vocab_size: int) -> None:
    """Equal tokens of a power of two: their sums are exact, in float32 too."""
    for num_kept in range(1, vocab_size):
        top_p = np.float32(num_kept / vocab_size)
        assert reachable([0.0] * vocab_size, top_p=top_p) == set(range(num_kept))
        assert reachable([0.0] * vocab_size, top_p=np.nextafter(top_p, np.float32(1))) == set(range(num_kept + 1))
    assert reachable([0.0] * vocab_size, top_p=1.0) == set(range(vocab_size))


def test_a_min_p_that_is_met_exactly_keeps_the_token() -> None:
    """min_p of 1 asks for the largest probability itself, which ties have, and the next float below has not."""
    just_below = float(np.nextafter(np.float32(8), np.float32(0)))
    assert reachable([0.0, 8.0, just_below, 8.0], min_p=1.0) == {1, 3}
    assert reachable([0.0, 8.0, just_below, 8.0], min_p=0.999) == {1, 2, 3}


def test_all_that_tie_with_the_kth_can_be_drawn_and_nothing_else() -> None:
    assert reachable([2.0, 1.0, 2.0, 3.0, 2.0, 1.0], top_k=2) == {0, 2, 3, 4}
    assert reachable([2.0, 2.0, 2.0], top_k=2) == {0, 1, 2}
    assert reachable([-INF, 2.0, -INF], top_k=3) == {1}, "-inf ties with the third, and is still never drawn"


def test_top_p_among_many_equal_tokens_keeps_the_lowest_ids() -> None:
    """1024 tokens: torch's sort keeps the order of few equal values by itself, but not of many."""
    allowed = allowed_mask(torch.zeros(1, 1024), torch.tensor([0]), torch.tensor([0.5]), torch.tensor([0.0]))
    assert allowed.tolist() == [[True] * 512 + [False] * 512]


def test_top_p_is_compared_in_float32() -> None:
    """Ten tokens of 1/10 each: the float64 sum of three, 0.30000000447, is less than 0.3 as float32 has it."""
    allowed = allowed_mask(torch.zeros(1, 10), torch.tensor([0]), torch.tensor([0.3]), torch.tensor([0.0]))
    assert allowed.tolist() == [[True] * 3 + [False] * 7]


def test_top_k_goes_first_then_top_p_of_what_is_left() -> None:
    """Halves of what top_k left: with all four, 0.5 would need two of them."""
    assert reachable([0.0, 0.0, 0.0, 0.0, -1.0], top_p=0.5) == {0, 1, 2}
    assert reachable([1.0, 1.0, 0.0, 0.0, -1.0], top_k=2, top_p=0.5) == {0}


# --- rows without a choice ---


@pytest.mark.parametrize("vocab_size", [1, 2, 3, 5, 33, 127, 4097])
@pytest.mark.parametrize(
    "filters",
    [{}, {"top_k": 1}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}, {"top_k": 2, "top_p": 0.9, "min_p": 0.1}],
)
def test_the_one_finite_logit_is_drawn_wherever_it_stands(vocab_size: int, filters: dict[str, float]) -> None:
    """All others -inf or NaN; the last word of the last Philox call, which a vocabulary may use in part, among them."""
    for token in {0, vocab_size // 2, vocab_size - 1}:
        for other in (-INF, NAN):
            logits = torch.full((50, vocab_size), other)
            logits[:, token] = -1e30
            rows = make_rows(50, position=np.arange(50), **filters)
            assert Sampler()(logits, rows_on_device(rows, "cpu")).tolist() == [token] * 50
