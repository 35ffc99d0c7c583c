"""Kernels that store what sampling's device functions return, so that tests can look at it."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from nanovllm.kernels.sampling import (  # noqa: E402 (it needs triton)
    approx_log2_arrival_times,
    exact_gumbel,
    sampling_tile_kernel,
    scores_of,
)


def store_noise(words: torch.Tensor, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """exact_gumbel (float64) and approx_log2_arrival_times (float32) of logits of 0, for int64 words."""
    exact = torch.empty(len(words), dtype=torch.float64, device=device)
    approximate = torch.empty(len(words), dtype=torch.float32, device=device)
    grid = (triton.cdiv(len(words), 256),)
    noise_kernel[grid](words.to(device), exact, approximate, len(words), TILE_SIZE=256)  # pyright: ignore
    return exact, approximate


def tile_maxima(logits: torch.Tensor, rows: dict[str, torch.Tensor], tile_size: int) -> torch.Tensor:
    """What the first of sampling's two launches leaves to the second: [R, number of tiles] float32."""
    num_rows, vocab_size = logits.shape
    num_tiles = triton.cdiv(vocab_size, tile_size)
    maxima = torch.empty(num_rows, num_tiles, device=logits.device)
    arguments = (*rows.values(), maxima, logits.stride(0), 0, 0, vocab_size, num_tiles)
    largest = torch.finfo(logits.dtype).max
    sampling_tile_kernel[(maxima.numel(),)](logits, *arguments, LARGEST=largest, TILE_SIZE=tile_size)
    return maxima


@triton.jit
def noise_kernel(words_ptr, exact_ptr, approximate_ptr, num_words, TILE_SIZE: tl.constexpr):
    index = tl.program_id(0) * TILE_SIZE + tl.arange(0, TILE_SIZE)
    words = tl.load(words_ptr + index, mask=index < num_words, other=0).to(tl.uint32)
    tl.store(exact_ptr + index, exact_gumbel(words), mask=index < num_words)
    approximate = scores_of(approx_log2_arrival_times(tl.zeros((TILE_SIZE,), tl.float32), -1.0, words))
    tl.store(approximate_ptr + index, approximate, mask=index < num_words)
