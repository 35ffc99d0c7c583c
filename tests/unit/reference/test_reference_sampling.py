"""philox against Random123's known answers, the filters against a walk along sorted tokens, the race by statistics."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference.sampling
from reference.philox import WORD, philox
from reference.sampling import allowed_mask, exponential_noise, sampling
from tests.support.counts import count_comparisons

# Random123's file kat_vectors, lines "philox4x32 10": counter, key, result
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),  # the digits of pi
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter: tuple, key: tuple, answer: tuple) -> None:
    assert philox(key, counter) == answer


words = st.integers(0, WORD)


@given(key=st.tuples(words, words), counters=st.lists(st.tuples(words, words, words, words), min_size=1, max_size=8))
def test_philox_of_tensors_is_philox_of_each_element(key: tuple, counters: list[tuple]) -> None:
    """Integers in Python do not overflow, int64 does: the masks must make up for it."""
    columns = tuple(torch.tensor(column) for column in zip(*counters, strict=True))
    rows = torch.stack(philox(key, columns)).T.tolist()
    assert rows == [list(philox(key, counter)) for counter in counters]


@given(seed=st.integers(-(2**63), 2**64 - 1), position=st.integers(0, 2**20), token_id=st.integers(0, 300))
def test_the_noise_of_a_token_is_its_word_of_its_counter(seed: int, position: int, token_id: int) -> None:
    key = (seed % 2**32, seed // 2**32 % 2**32)
    word = philox(key, (token_id // 4, position, 0, 0))[token_id % 4]
    u = min((word + 0.5) / 2**32, 1 - 2**-24)
    assert exponential_noise(seed, position, 301)[token_id] == pytest.approx(-math.log1p(-u), rel=1e-15)


@pytest.mark.parametrize(("word", "expected"), [(0, 2**-33), (WORD, 24 * math.log(2))])
def test_the_outermost_words_give_finite_positive_noise(word: int, expected: float, monkeypatch) -> None:
    """D56, in float32 too. -log(1 - u) of the smallest u is about u, of the largest, 1 - 2**-24, it is 24 log 2."""
    monkeypatch.setattr(reference.sampling, "philox", lambda key, counter: (torch.full_like(counter[0], word),) * 4)
    noise = exponential_noise(0, 0, 4).float()
    assert noise.tolist() == pytest.approx([expected] * 4, rel=1e-6)
    assert (noise > 0).all()
    assert noise.isfinite().all()
    assert noise.log().isfinite().all()


def kept_one_by_one(z: list[float], top_k: int | None, top_p: float | None, min_p: float | None) -> list[bool]:
    """The filters as a walk along the sorted tokens."""
    ranked = sorted(range(len(z)), key=lambda v: (-z[v], v))
    if top_k is not None:
        last = z[ranked[min(top_k, len(z)) - 1]]
        ranked = [v for v in ranked if z[v] >= last]
    if top_p is not None:
        total = math.fsum(math.exp(z[v]) for v in ranked)
        walked: list[int] = []
        while len(walked) < len(ranked) and (top_p >= 1 or math.fsum(math.exp(z[v]) for v in walked) / total < top_p):
            walked.append(ranked[len(walked)])
        ranked = walked
    if min_p is not None:
        ranked = [v for v in ranked if math.exp(z[v] - z[ranked[0]]) >= min_p]
    return [v in ranked for v in range(len(z))]


@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    top_k=st.none() | st.integers(1, 14),
    top_p=st.none() | st.sampled_from([0.0001, 0.0101, 0.2503, 0.5007, 0.9001, 0.9999, 1.0]),
    min_p=st.none() | st.sampled_from([0.0001, 0.1003, 0.5003, 0.9999]),
)
@settings(max_examples=300)
def test_filters_equal_a_walk_along_the_sorted_tokens(counts, top_k, top_p, min_p) -> None:
    """Probabilities are ratios of small integers, so ties are common, and none lies on a threshold: they are c / n with
    n <= 480, and every threshold is further than 1e-9 from all of those, which rounding in float64 cannot bridge."""
    z = torch.tensor(counts, dtype=torch.float64).log()
    assert allowed_mask(z, top_k, top_p, min_p).tolist() == kept_one_by_one(z.tolist(), top_k, top_p, min_p)
    count_comparisons("reference: sampling filters against a walk along the tokens", len(z))


def test_a_top_p_of_one_keeps_even_what_rounding_leaves_no_mass_for() -> None:
    assert allowed_mask(torch.tensor([0.0, -90.0, -95.0]), top_p=1.0).all()


def test_greedy_is_the_largest_logit_and_ignores_the_noise() -> None:
    logits = torch.tensor([0.0, 1.0, 1.0 + 1e-6, 1.0 + 1e-6])
    assert {sampling(logits, temperature=9.0, top_k=1, seed=seed) for seed in range(50)} == {2}
