"""Noise words are independent over seeds, positions and token ids, and no two are the same; dependent ones are caught.

Every check but one counts events of a known probability: tests.support.statistics says with which threshold.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from nanovllm.layers.philox import token_words
from tests.support.counts import count_comparisons
from tests.support.statistics import check_counts, check_differences, random_integers

LAGS = (1, 2, 3, 4, 5, 8, 64, 1024)
NUM_PAIRS = 4096  # for each bit: a flip with another probability than 1/2 is noticed from 0.06 = sqrt(32 / 2 / n) on

Words = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]  # the signature of token_words


def words_of(words: Words, seeds: np.ndarray, positions: np.ndarray, vocab_size: int) -> np.ndarray:
    low, high = (seeds & np.uint64(2**32 - 1)).astype(np.int64), (seeds >> np.uint64(32)).astype(np.int64)
    tensors = [torch.from_numpy(array) for array in (low, high, positions.astype(np.int64))]
    return words(*tensors, vocab_size).numpy()


def check_token_ids(words: Words) -> None:
    """Tokens of one row, at every lag: the first 4 bits of their words."""
    table = words_of(words, random_integers("rows", 64, 16), np.arange(16), 20_001) >> 28
    for lag in LAGS:
        check_differences(table[:, lag:].ravel(), table[:, :-lag].ravel(), 16, f"token ids, lag {lag}")


def check_distinct(words: Words) -> None:
    """No two of (seed, position, four tokens) have the same four words.

    For one seed Philox is a bijection, so that none may. For different seeds, 2**18 sets of four words that are
    independent have two alike with probability 2**36 / 2 / 2**128.
    """
    seeds = np.array([0, 1, 2, 3, 2**32, 2**33, 2**32 + 1, 2**63] * 64, dtype=np.uint64)
    positions = np.repeat(np.array([*range(62), 2**31, 2**32 - 1]), 8)
    quadruples = words_of(words, seeds, positions, 2048).reshape(-1, 4)
    count_comparisons("sampler statistics against exact probabilities", len(quadruples))
    num_equal = len(quadruples) - len(np.unique(quadruples, axis=0))
    assert num_equal == 0, f"words of {num_equal} of {len(quadruples)} (seed, position, four tokens) are not their own"


def check_avalanche(words: Words) -> None:
    """Each bit of seed, position and call flips each bit of a word half the time; and each bit is half the time 1."""
    seeds, positions = random_integers("seeds", 64, NUM_PAIRS), random_integers("positions", 32, NUM_PAIRS)

    def bits(seeds: np.ndarray, positions: np.ndarray, token: int) -> np.ndarray:
        column = words_of(words, seeds, positions, token + 1)[:, token]
        return column[:, None] >> np.arange(32) & 1

    base = bits(seeds, positions, 0)
    check_halves(base, "ones")
    for bit in range(64):
        check_halves(base ^ bits(seeds ^ np.uint64(1 << bit), positions, 0), f"seed, bit {bit}")
    for bit in range(32):
        check_halves(base ^ bits(seeds, positions ^ np.uint64(1 << bit), 0), f"position, bit {bit}")
    for token in (1, 2, 3, 4, 8, 16, 64):
        check_halves(base ^ bits(seeds, positions, token), f"token {token}")


def check_halves(flips: np.ndarray, what: str) -> None:
    check_counts(flips.sum(axis=0).tolist(), len(flips), [0.5] * flips.shape[1], what)


@pytest.mark.parametrize("check", [check_token_ids, check_distinct, check_avalanche])
def test_noise_words_are_independent(check: Callable[[Words], None]) -> None:
    """D58."""
    check(token_words)


def one_call(low: torch.Tensor, high: torch.Tensor, position: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Every four tokens get the words of the first four."""
    return token_words(low, high, position, 4).repeat(1, -(-vocab_size // 4))[:, :vocab_size]


def one_word_for_two(low: torch.Tensor, high: torch.Tensor, position: torch.Tensor, vocab_size: int) -> torch.Tensor:
    return token_words(low, high, position, vocab_size).repeat_interleave(2, dim=1)[:, :vocab_size]


PLANTED: list[tuple[Callable[[Words], None], str, Words]] = [
    (check_token_ids, "token ids, lag", one_call),
    (check_token_ids, "token ids, lag 1", one_word_for_two),
    (check_distinct, "not their own", one_call),
    (check_distinct, "not their own", lambda low, high, *others: token_words(low ^ high, 0 * low, *others)),
    (check_distinct, "not their own", lambda low, high, position, size: token_words(low, high, position % 2**31, size)),
    (check_avalanche, "seed, bit 32", lambda low, high, position, size: token_words(low, 0 * high, position, size)),
    (check_avalanche, "token 4", one_call),
    (check_avalanche, "ones", lambda low, high, position, size: token_words(low, high, position, size) & 0x7FFFFFFF),
]


@pytest.mark.parametrize(("check", "message", "wrong"), PLANTED)
def test_words_that_depend_on_each_other_are_caught(check: Any, message: str, wrong: Words) -> None:
    """D58."""
    with pytest.raises(AssertionError, match=message):
        check(wrong)
