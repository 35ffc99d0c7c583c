"""One token a row: drawn with Philox's noise, and greedy."""

import pytest
import torch

from benchmarks import arithmetic
from benchmarks.kernels.inputs import randn
from benchmarks.shapes import NUM_SEQS, SHAPES
from nanovllm.layers.philox import exponential_from_words, token_words


@pytest.mark.parametrize("is_greedy", [False, True], ids=["drawn", "greedy"])
@pytest.mark.parametrize("num_rows", NUM_SEQS)
@pytest.mark.parametrize("vocab_size", sorted({shape.vocab_size for shape in SHAPES.values()}))
def test_sampling(measure, vocab_size, num_rows, is_greedy):
    from nanovllm.kernels.sampling import sampling

    def make(index: int) -> tuple[torch.Tensor, ...]:
        logits = 3 * randn(index, num_rows, vocab_size)
        if is_greedy:
            logits[:, vocab_size // 3] = 100.0  # one largest: torch.argmax promises nothing for ties
        halves = torch.randint(0, 2**32, (2, num_rows), generator=torch.Generator().manual_seed(index)).cuda()
        position = torch.arange(num_rows, device="cuda") + 100 * index
        temperature = torch.linspace(0.5, 1.0, num_rows, device="cuda")
        greedy = torch.full((num_rows,), is_greedy, device="cuda")
        return logits, temperature, *halves, position, greedy

    def plain(logits, temperature, seed_low, seed_high, position, greedy):
        if is_greedy:
            return logits.argmax(dim=1)
        noise = exponential_from_words(token_words(seed_low, seed_high, position, vocab_size))
        return (logits.float() / temperature[:, None] - noise.log()).argmax(dim=1)

    measure(
        "sampling",
        f"{num_rows} x {vocab_size}, {'greedy' if is_greedy else 'drawn'}",
        make=make,
        run=sampling,
        expected=plain,
        work=arithmetic.sampling(num_rows, vocab_size),
        peers={"torch": plain},
    )
