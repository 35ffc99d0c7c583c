"""SamplingMetadata: how each row of logits is sampled; numpy arrays on the host, tensors on the device."""

from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

Array = TypeVar("Array")  # np.ndarray or torch.Tensor


@dataclass(frozen=True)
class SamplingMetadata(Generic[Array]):
    """The sampling parameters of num_rows rows of logits, and which rows need which work.

    top_k: [num_rows] int64; 0 for no limit, 1 for greedy.
    seed_low, seed_high: [num_rows] int64, the halves of the 64-bit seed.
    position: [num_rows] int64, the position of the sampled token in its sequence.
    filtered_rows: int64 numbers of the rows that are drawn after top_k, top_p or min_p. The host makes them, so that
        it need not wait for the device.
    temperature, top_p, min_p: [num_rows] float32.
    takes_argmax: [num_rows] bool, False for a row that is drawn from the whole vocabulary. True for a greedy row, and
        for a filtered one, whose token is drawn afterwards.
    Fields are declared by falling item size: packed end to end in this order, each one is aligned.
    """

    top_k: Array
    seed_low: Array
    seed_high: Array
    position: Array
    filtered_rows: Array
    temperature: Array
    top_p: Array
    min_p: Array
    takes_argmax: Array


def make_sampling_metadata(
    *,
    temperature: np.ndarray,
    top_k: np.ndarray,
    top_p: np.ndarray,
    min_p: np.ndarray,
    seed: np.ndarray,
    position: np.ndarray,
) -> SamplingMetadata[np.ndarray]:
    """The SamplingMetadata of num_rows rows. seed: uint64, the others as in SamplingMetadata.

    top_k 0, top_p 1 and min_p 0 filter nothing.
    """
    is_greedy = top_k == 1
    is_filtered = ~is_greedy & ((top_k > 0) | (top_p < 1) | (min_p > 0))
    return SamplingMetadata(
        top_k=top_k,
        seed_low=(seed & np.uint64(0xFFFFFFFF)).astype(np.int64),
        seed_high=(seed >> np.uint64(32)).astype(np.int64),
        position=position,
        filtered_rows=np.flatnonzero(is_filtered),
        temperature=temperature,
        top_p=top_p,
        min_p=min_p,
        takes_argmax=is_greedy | is_filtered,
    )
