"""The sampler where filters just keep or just drop a token: ties, boundaries, -inf, NaN, +inf, odd vocabularies."""

import math

import numpy as np
import pytest
import torch
from hypothesis import event, example, given
from hypothesis import strategies as st

from nanovllm.layers import sampler as sampler_module
from nanovllm.layers.sampler import allowed_mask
from reference.sampling import allowed_mask as reference_allowed_mask
from reference.sampling import exponential_noise
from tests.support.counts import count_comparisons
from tests.support.sampler_draws import make_rows, rows_on_device, sample

# float32 rounds a probability and a sum of them by less than this, relatively: where the filters' choice hangs on less,
# either is right.
ROUNDING = 1e-5
INF, NAN, MAX = math.inf, math.nan, torch.finfo(torch.float32).max


def reachable(logits: list[float], **filters: float) -> set[int]:
    """The tokens that 2000 draws give; each that may be drawn has a probability of 1/9 or more."""
    return set(sample(torch.tensor([logits]).expand(2000, -1), make_rows(2000, position=np.arange(2000), **filters)))


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
@example(logits=[-INF, -INF], temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, position=0)
@example(logits=[NAN, NAN], temperature=1.0, top_k=2, top_p=0.9, min_p=0.1, seed=0, position=0)
@example(logits=[0.0, INF, 1.0], temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, position=0)
@example(logits=[NAN, -INF, 0.0], temperature=1.0, top_k=1, top_p=1.0, min_p=0.0, seed=0, position=0)
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
    (token,) = sample(row[None], rows)
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


@pytest.mark.parametrize(
    ("logits", "filters", "expected"),
    [
        ([2.0, 1.0, 2.0, 3.0, 2.0, 1.0], {"top_k": 2}, {0, 2, 3, 4}),  # all that tie with the k-th, and nothing else
        ([-INF, 2.0, -INF], {"top_k": 3}, {1}),  # -inf ties with the third, and is still never drawn
        ([0.0] * 4, {"top_p": 0.5}, {0, 1}),  # sums of equal tokens of a power of two are exact: reached by two
        ([0.0] * 4, {"top_p": np.nextafter(np.float32(0.5), np.float32(1))}, {0, 1, 2}),
        ([0.0] * 4, {"top_p": 1.0}, {0, 1, 2, 3}),
        ([0.0, 1.0, 0.5], {"top_p": 1e-50}, {1}),  # 0 in float32: the first token stays
        ([0.0] * 4 + [-1.0], {"top_p": 0.5}, {0, 1, 2}),
        ([1.0, 1.0, 0.0, 0.0, -1.0], {"top_k": 2, "top_p": 0.5}, {0}),  # halves of what top_k left
        ([0.0, 8.0, np.nextafter(np.float32(8), np.float32(0)), 8.0], {"min_p": 1.0}, {1, 3}),
        ([0.0, 8.0, np.nextafter(np.float32(8), np.float32(0)), 8.0], {"min_p": 0.999}, {1, 2, 3}),
        ([0.0, 0.0, -2.0], {"min_p": 0.5}, {0, 1}),
        ([20.0, -INF, 21.0, -3.0], {"temperature": 1e-10}, {2}),
        ([20.0, -INF, 21.0, -3.0], {"temperature": np.float32(INF)}, {0, 2, 3}),  # as of 1e300: even draws
        *(([-INF, 0, 0, -INF, 0, -INF], filters, {1, 2, 4}) for filters in ({}, {"top_p": 0.99}, {"top_k": 5})),
    ],
)
def test_tokens_that_can_be_drawn(logits: list[float], filters: dict[str, float], expected: set[int]) -> None:
    assert reachable([float(number) for number in logits], **filters) == expected


@pytest.mark.parametrize(
    ("vocab_size", "top_p", "num_allowed"),
    [
        (1024, 0.5, 512),  # torch's sort keeps the order of few equal values by itself, but not of many
        (10, 0.3, 3),  # three tokens have 0.30000000447, less than 0.3 as float32 has it
    ],
)
def test_top_p_among_equal_tokens_keeps_the_lowest_ids(vocab_size: int, top_p: float, num_allowed: int) -> None:
    allowed = allowed_mask(torch.zeros(1, vocab_size), torch.tensor([0]), torch.tensor([top_p]), torch.tensor([0.0]))
    assert allowed.tolist() == [[True] * num_allowed + [False] * (vocab_size - num_allowed)]


@pytest.mark.parametrize(("margin", "winner"), [(26.0, 0), (25.0, 1)])
def test_probability_one_wins_against_the_worst_noise_there_is(
    monkeypatch: pytest.MonkeyPatch, margin: float, winner: int
) -> None:
    """D56: words 2**32 - 1 and 0 give exponentials 24 log 2 and 2**-33, so the noise
    spans log(24 log 2 * 2**33) = 25.7."""
    words = torch.tensor([[2**32 - 1, 0, 0]])
    monkeypatch.setattr(sampler_module, "token_words", lambda *args: words)
    assert sample(torch.tensor([[margin, 0.0, 0.0]]), make_rows(1)) == [winner]
