"""Philox 4x32-10: random numbers by counting, a function from (key, counter) to four 32-bit words.

    one round, with 0xD2511F53 * c0 = hi0 * 2**32 + lo0  and  0xCD9E8D57 * c2 = hi1 * 2**32 + lo1:
        (c0, c1, c2, c3)  ->  (hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0)
    ten rounds; between two rounds the key moves on:
        (k0, k1)          ->  (k0 + 0x9E3779B9, k1 + 0xBB67AE85)  modulo 2**32

Why: an ordinary generator has a state, so its n-th number depends on the n - 1 draws before: on the batch, on
preemption, on the rank. A counter-based generator has no state. The request's seed, the position and the token id give
the same noise, in any order and on any device, since integer arithmetic is exact everywhere.

Why it is random: multiplying by a large odd constant spreads each bit of a counter upwards over the product; the high
half, xored with a word of the other pair and the key, becomes a new word. Each round is invertible, so different
counters give different results. Seven rounds pass all of TestU01's BigCrush; ten leave a margin.

Paper: Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3", whose library Random123 gives
the known answer in the doctest.
"""

from typing import Any

WORD = 2**32 - 1
MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
KEY_STEP_0, KEY_STEP_1 = 0x9E3779B9, 0xBB67AE85  # golden ratio and sqrt(3) - 1, as fractions of 2**32


def philox(key: tuple[int, int], counter: tuple[Any, Any, Any, Any]) -> tuple[Any, Any, Any, Any]:
    """Four words from a key of two and a counter of four. Counters may be int64 tensors: one result an element.

    >>> [hex(word) for word in philox(key=(0, 0), counter=(0, 0, 0, 0))]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        # An int64 product that overflows keeps its low 64 bits, so the masks give the true words.
        hi0, lo0 = (MULTIPLIER_0 * c0) >> 32 & WORD, MULTIPLIER_0 * c0 & WORD
        hi1, lo1 = (MULTIPLIER_1 * c2) >> 32 & WORD, MULTIPLIER_1 * c2 & WORD
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + KEY_STEP_0) & WORD, (k1 + KEY_STEP_1) & WORD
    return c0, c1, c2, c3


if __name__ == "__main__":
    __import__("reference").show_examples(__file__)
