"""The benchmarks of sampling: rows that are drawn, and greedy rows."""

import torch

from benchmarks.arithmetic import Work
from benchmarks.kernels.inputs import randn
from benchmarks.measuring import Measured
from nanovllm.layers.philox import exponential_from_words, token_words
from tests.support.kernels.registry import lazy

sampling = lazy("sampling.sampling")


def measured(num_rows: int, vocab_size: int, is_greedy: bool) -> Measured:
    def make(index: int) -> tuple[torch.Tensor, ...]:
        logits = 3 * randn(index, num_rows, vocab_size)
        if is_greedy:
            logits[:, vocab_size // 3] = 100.0  # a unique maximum: for ties, torch.argmax may return any of them
        seed_halves = torch.randint(0, 2**32, (2, num_rows), generator=torch.Generator().manual_seed(index)).cuda()
        position = torch.arange(num_rows, device="cuda") + 100 * index
        temperature = torch.linspace(0.5, 1.0, num_rows, device="cuda")
        return logits, temperature, *seed_halves, position, torch.full((num_rows,), is_greedy, device="cuda")

    def plain(logits, temperature, seed_low, seed_high, position, _):
        if is_greedy:
            return logits.argmax(dim=1)
        noise = exponential_from_words(token_words(seed_low, seed_high, position, vocab_size))
        return (logits.float() / temperature[:, None] - noise.log()).argmax(dim=1)

    work = Work(num_rows * vocab_size * 2, 8 * num_rows)  # reads the logits once, writes a token id of 8 bytes a row
    return Measured(make=make, run=sampling, expected=plain, work=work, peers={"torch": plain})
