"""The shapes that are measured: four architectures, and how many sequences decode or are prefilled at once."""

import random
from typing import NamedTuple


class Shape(NamedTuple):
    """num_experts is 0 for a dense model; intermediate_size is one expert's for the others."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_experts: int = 0
    top_k: int = 0


SHAPES = {
    "qwen3-0.6b": Shape(16, 8, 128, 1024, 3072, 151936),
    "llama-3-8b": Shape(32, 8, 128, 4096, 14336, 128256),
    "qwen2.5-0.5b": Shape(14, 2, 64, 896, 4864, 151936),
    "qwen3-30b-a3b": Shape(32, 4, 128, 2048, 768, 151936, num_experts=128, top_k=8),
}
NUM_SEQS = (1, 8, 64, 256)
NUM_TOKENS = (*NUM_SEQS, 16384)  # of a decode step, and of a full prefill step


def draw_lens(num_seqs: int, low: int, high: int) -> list[int]:
    """Lengths drawn evenly, both ends included; the same at every call."""
    rng = random.Random(num_seqs)
    return [rng.randint(low, high) for _ in range(num_seqs)]
