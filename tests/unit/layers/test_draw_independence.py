"""Draws are independent over positions, seeds and the rows of a batch, and dependent ones are caught.

Of tokens that are all alike, the differences modulo their number are independent and uniform again, along a chain of
lags too. So each difference is counted like a token: tests.support.statistics says with which threshold.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from nanovllm.layers.sampler import Sampler
from nanovllm.sampling_metadata import SamplingMetadata
from tests.support.sampler_draws import Draw, make_rows, rows_on_device
from tests.support.statistics import check_differences, fresh_seed, random_integers

VOCAB_SIZE = 4  # all tokens alike
LAGS = (1, 2, 3, 4, 5, 8, 64, 1024)
NUM_PAIRS = 4096  # of draws, for each bit


def draws(sampler: Draw, seeds: np.ndarray | int, positions: np.ndarray | int, num_draws: int) -> np.ndarray:
    rows = rows_on_device(make_rows(num_draws, seed=seeds, position=positions), "cpu")
    return sampler(torch.zeros(1, VOCAB_SIZE).expand(num_draws, -1), rows).numpy()


def check_lags(sampler: Draw) -> None:
    """Over the positions of a request, over the seeds of a batch, and over both at once."""
    num_draws, seed = 150_000, fresh_seed("lags")
    number = np.arange(num_draws)
    seeds = number.astype(np.uint64) + np.uint64(seed)
    axes = {"positions": (seed, number), "seeds": (seeds, 7), "rows": (seeds[::-1].copy(), number)}
    for axis, (seed_of_row, position_of_row) in axes.items():
        tokens = draws(sampler, seed_of_row, position_of_row, num_draws)
        for lag in LAGS:
            check_differences(tokens[lag:], tokens[:-lag], VOCAB_SIZE, f"{axis}, lag {lag}")


def check_grid(sampler: Draw) -> None:
    """Seed and position are no substitute for each other: (s, p) against (p, s), and against (s - 1, p + 1)."""
    size = 400
    seeds, positions = np.divmod(np.arange(size * size), size)
    tokens = draws(sampler, seeds.astype(np.uint64), positions, size * size).reshape(size, size)
    upper, lower = tokens[np.triu_indices(size, 1)], tokens.T[np.triu_indices(size, 1)]
    check_differences(upper, lower, VOCAB_SIZE, "seed and position exchanged")
    check_differences(tokens[1:, :-1].ravel(), tokens[:-1, 1:].ravel(), VOCAB_SIZE, "the sum of seed and position")


def check_bits(sampler: Draw) -> None:
    """Seeds that differ in one bit, each of the 64, and positions that do, each of the 32, draw independently."""
    seeds, positions = random_integers("seeds", 64, NUM_PAIRS), random_integers("positions", 32, NUM_PAIRS)
    tokens = draws(sampler, seeds, positions.astype(np.int64), NUM_PAIRS)
    for bit in range(96):
        flipped = np.uint64(1 << (bit % 64))
        changed = (seeds ^ flipped, positions) if bit < 64 else (seeds, positions ^ flipped)
        other = draws(sampler, changed[0], changed[1].astype(np.int64), NUM_PAIRS)
        what = f"seed, bit {bit}" if bit < 64 else f"position, bit {bit - 64}"
        check_differences(tokens, other, VOCAB_SIZE, what)


@pytest.mark.parametrize("check", [check_lags, check_grid, check_bits])
def test_draws_are_independent(check: Callable[[Draw], None]) -> None:
    """D57, D58."""
    check(Sampler())


PLANTED: list[tuple[Callable[[Draw], None], str, Callable[[SamplingMetadata], dict[str, torch.Tensor]]]] = [
    (check_lags, "positions, lag", lambda rows: {"position": rows.position // 2}),
    (check_lags, "positions, lag", lambda rows: {"position": rows.position % 64}),
    (check_lags, "seeds, lag", lambda rows: {"seed_low": rows.seed_low // 2}),
    (check_lags, "seeds, lag", lambda rows: {"seed_low": rows.seed_low % 1024}),
    (check_lags, "rows, lag", lambda rows: {"seed_low": rows.seed_low + rows.position, "position": 0 * rows.position}),
    (check_grid, "exchanged", lambda rows: {"seed_low": rows.seed_low * rows.position, "position": 0 * rows.position}),
    (check_grid, "exchanged", lambda rows: {"seed_low": rows.seed_low + rows.position, "position": 0 * rows.position}),
    (check_bits, "seed, bit 32", lambda rows: {"seed_high": 0 * rows.seed_high}),
    (check_bits, "seed, bit 63", lambda rows: {"seed_high": rows.seed_high & 0x7FFFFFFF}),
    (check_bits, "position, bit 16", lambda rows: {"position": rows.position & 0xFFFF}),
]


@pytest.mark.parametrize(("check", "message", "change"), PLANTED)
def test_draws_that_depend_on_each_other_are_caught(check: Any, message: str, change: Any) -> None:
    """D57, D58: counters that lose a part of (seed, position), or mix the two."""
    with pytest.raises(AssertionError, match=message):
        check(lambda logits, rows: Sampler()(logits, replace(rows, **change(rows))))
