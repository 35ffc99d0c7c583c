"""Philox 4x32-10 as torch integer arithmetic: the sampler's noise, a function of (seed, position, token id) alone.

Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3". Words are int64 tensors in [0, 2**32).
"""

import torch
from torch import Tensor

NUM_ROUNDS = 10
WORDS_PER_CALL = 4
_WORD_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MAX_UNIFORM = 1 - 2**-24

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(key: tuple[Tensor, Tensor], counter: Words) -> Words:
    """The four output words of each (key, counter). All inputs are words and broadcast against each other."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(NUM_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = (k0 + _KEY_STEPS[0]) & _WORD_MASK
        k1 = (k1 + _KEY_STEPS[1]) & _WORD_MASK
    return c0, c1, c2, c3


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low word of the 64-bit product. int64 wraps, but its 64 bits are those of the unsigned product."""
    product = word * multiplier
    return (product >> 32).bitwise_and_(_WORD_MASK), product.bitwise_and_(_WORD_MASK)


def token_words(seed_low: Tensor, seed_high: Tensor, position: Tensor, num_tokens: int, first_token: int = 0) -> Tensor:
    """[num_rows, num_tokens] words, one for each token from first_token on; token v of a row has word v % 4 of counter
    (v // 4, position, 0, 0).

    seed_low, seed_high: [num_rows], the halves of the 64-bit seed; position: [num_rows], below 2**32. All int64.
    """
    first_call, skipped = divmod(first_token, WORDS_PER_CALL)
    end_call = -(-(first_token + num_tokens) // WORDS_PER_CALL)
    calls = torch.arange(first_call, end_call, device=position.device)[None, :]
    zero = torch.zeros(1, 1, dtype=torch.int64, device=position.device)
    words = philox((seed_low[:, None], seed_high[:, None]), (calls, position[:, None], zero, zero))
    return torch.stack(words, dim=2).flatten(1)[:, skipped : skipped + num_tokens]


def exponential_from_words(words: Tensor) -> Tensor:
    """e = -log1p(-u), exponential with rate 1 and float64: positive and finite for every word.

    u = min((word + 0.5) * 2**-32, 1 - 2**-24) is exact in float64 and lies strictly between 0 and 1.
    """
    u = words.to(torch.float64).add_(0.5).mul_(2.0**-32).clamp_(max=_MAX_UNIFORM)
    return u.neg_().log1p_().neg_()
