"""The engine's Philox against reference.philox, which is tested with its authors' known answers."""

import torch

from nanovllm.layers.philox import exponential_from_words, token_words
from reference.sampling import exponential_noise
from tests.support.comparing import assert_close

SEEDS = [0, 1, 2**31, 2**32 - 1, 2**32, 2**63 + 12345, 2**64 - 1]
POSITIONS = [0, 1, 2, 131071, 2**31, 5, 2**32 - 1]


def words_of(seeds: list[int], positions: list[int], vocab_size: int) -> torch.Tensor:
    low, high = torch.tensor([seed % 2**32 for seed in seeds]), torch.tensor([seed >> 32 for seed in seeds])
    return token_words(low, high, torch.tensor(positions), vocab_size)


def test_exponential_noise_equals_the_reference_bit_for_bit():
    for seed, position in zip(SEEDS, POSITIONS, strict=True):
        noise = exponential_from_words(words_of([seed], [position], 4099))[0]
        expected = exponential_noise(seed, position, 4099)
        assert_close("layers: sampling noise against the reference", noise, expected, rtol=0, atol=0)


def test_noise_grows_with_the_word_and_is_positive_and_finite_for_every_edge_word():
    """D56: words 0 and 2**32 - 1, and those around float32's last step below 1."""
    edges = [0, 1, 2, 2**16, 2**31 - 1, 2**31, 2**32 - 1000, 2**32 - 257, 2**32 - 256, 2**32 - 2, 2**32 - 1]
    noise = exponential_from_words(torch.tensor(edges))
    assert torch.isfinite(noise).all()
    assert (noise[:7].diff() > 0).all()
    # u = 2**-33 gives e = u to within u**2; u is capped at 1 - 2**-24, which gives e = 24 log 2.
    torch.testing.assert_close(noise[0].item(), 2.0**-33, rtol=1e-9, atol=0)
    torch.testing.assert_close(noise[-1].item(), 24 * torch.log(torch.tensor(2.0, dtype=torch.float64)).item())
