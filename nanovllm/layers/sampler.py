"""Sampler: logits -> token ids, each row a function of its own logits and request alone.

    z = logits / temperature, after top_k, top_p and min_p;  token = argmax(z - log e),  e exponential noise

which is argmax(p / e), the first arrival of exponentials with rates p (Gumbel-max), and so draws from p. The noise is
counter-based (see philox): it depends neither on the batch, nor on its order, nor on the device's generator.

LayerOps.sample_unfiltered takes all rows (the filtered ones are drawn again afterwards): here in PyTorch, in
triton_ops.py in one pass over the logits. Both compare float64 scores of the same words and logits, so they choose the
same token unless the best two scores differ in their last bits only.

Of several ranks, each has the logits of its part of the vocabulary. It chooses the best of these tokens, and the ranks
exchange the tokens and their scores: 16 bytes a row, where all logits would be V / R of 2 bytes from each rank.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from nanovllm.distributed.tensor_parallel import SINGLE_RANK, TensorParallel
from nanovllm.layers.philox import exponential_from_words, token_words
from nanovllm.sampling_metadata import SamplingMetadata

# Rows are sampled in slices of at most this many logits (or one row), whatever the batch. A slice needs at most 64
# bytes of temporaries a logit: 16 MiB on the CPU, five times as fast because they stay in its cache, and 256 MiB on a
# GPU, where the launches take the time.
MAX_LOGITS_PER_SLICE = {"cpu": 2**18, "cuda": 2**22}
MAX_BYTES_PER_LOGIT = 64

_DTYPES = {np.dtype("int64"): torch.int64, np.dtype("float32"): torch.float32, np.dtype("bool"): torch.bool}


def to_device(metadata: SamplingMetadata[np.ndarray], device: torch.device | str) -> SamplingMetadata[Tensor]:
    """`metadata` as tensors on `device`, with one copy of all its bytes.

    A copy to a GPU starts in pinned memory, so the host does not wait for it. The tensors are parts of one buffer, so
    their alignment depends on the number of rows.
    """
    arrays = list(vars(metadata).values())
    sizes = [array.nbytes for array in arrays]
    packed = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=torch.device(device).type == "cuda")
    np.concatenate([array.view(np.uint8) for array in arrays], out=packed.numpy())
    parts = packed.to(device, non_blocking=True).split(sizes)
    return SamplingMetadata(*(part.view(_DTYPES[array.dtype]) for part, array in zip(parts, arrays, strict=True)))


class Sampler(nn.Module):
    """One token id a row.

    A logit of -inf, or one that division by the temperature takes there, is drawn only if all of the row's are; NaN
    counts as -inf; a row without any other logit gives 0. Greedy rows are not divided.
    sample_op: LayerOps.sample_unfiltered of the model; by default in PyTorch.
    Logits are [num_rows, vocab_size / tp.size], of any float dtype, and are not changed: this rank's columns.
    """

    def __init__(self, sample_op: Callable[..., Tensor] | None = None, tp: TensorParallel = SINGLE_RANK) -> None:
        super().__init__()
        self.sample_op = sample_op or sample_unfiltered_in_torch
        self.tp = tp

    def forward(self, logits: Tensor, rows: SamplingMetadata[Tensor]) -> Tensor:
        """[num_rows] int64 token ids. On ranks other than 0 those of filtered rows are not what is drawn."""
        columns = (rows.temperature, rows.seed_low, rows.seed_high, rows.position, rows.takes_argmax)
        token_ids = self.sample_unfiltered(logits, *columns)
        self.sample_filtered(logits, rows, token_ids)
        return token_ids

    def sample_unfiltered(self, logits: Tensor, *columns: Tensor) -> Tensor:
        """[num_rows] int64 token ids, on every rank, as if no row were filtered. columns: as in LayerOps."""
        if self.tp.size == 1:
            return self.sample_op(logits, *columns)
        scores = torch.empty(len(logits), dtype=torch.float64, device=logits.device)
        first_token = self.tp.rank * logits.shape[1]
        token_ids = self.sample_op(logits, *columns, first_token=first_token, scores=scores)
        best = torch.stack((scores, token_ids.to(torch.float64)))  # float64 holds every token id
        all_scores, all_token_ids = self.tp.all_gather(best).unbind(1)  # [tp.size, num_rows]
        return all_token_ids.gather(0, argmax(all_scores, dim=0)[None])[0].to(torch.int64)

    def sample_filtered(self, logits: Tensor, rows: SamplingMetadata[Tensor], token_ids: Tensor) -> None:
        """Write the tokens of rows.filtered_rows into token_ids [num_rows], on rank 0."""
        for row_ids in _slices(rows.filtered_rows, logits, self.tp.size * logits.shape[1]):
            all_logits = self.tp.gather(logits[row_ids])
            if all_logits is None:
                continue
            scaled = _scaled(all_logits, rows.temperature[row_ids])
            allowed = allowed_mask(scaled, rows.top_k[row_ids], rows.top_p[row_ids], rows.min_p[row_ids])
            counters = (rows.seed_low[row_ids], rows.seed_high[row_ids], rows.position[row_ids])
            token_ids[row_ids] = argmax(_gumbel_scores(scaled.masked_fill_(~allowed, -torch.inf), *counters))


def sample_unfiltered_in_torch(
    logits: Tensor,
    temperature: Tensor,
    seed_low: Tensor,
    seed_high: Tensor,
    position: Tensor,
    takes_argmax: Tensor,
    *,
    first_token: int = 0,
    scores: Tensor | None = None,
) -> Tensor:
    """LayerOps.sample_unfiltered: [num_rows] int64, with the columns of SamplingMetadata. Waits for the device."""
    token_ids = torch.empty(len(logits), dtype=torch.int64, device=logits.device)

    def choose(row_ids: Tensor, row_scores: Tensor) -> None:
        chosen = argmax(row_scores)
        token_ids[row_ids] = chosen + first_token
        if scores is not None:
            scores[row_ids] = row_scores.gather(1, chosen[:, None])[:, 0].to(torch.float64)

    for row_ids in _slices(takes_argmax.nonzero()[:, 0], logits, logits.shape[1]):
        choose(row_ids, _replace_non_finite(logits[row_ids]))
    for row_ids in _slices(takes_argmax.logical_not().nonzero()[:, 0], logits, logits.shape[1]):
        counters = (seed_low[row_ids], seed_high[row_ids], position[row_ids])
        choose(row_ids, _gumbel_scores(_scaled(logits[row_ids], temperature[row_ids]), *counters, first_token))
    return token_ids


def argmax(scores: Tensor, dim: int = 1) -> Tensor:
    """The index of the largest score along dim, the lowest on a tie, which torch.max promises."""
    return scores.max(dim=dim).indices


def allowed_mask(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """[num_rows, vocab_size] bool, the tokens that may be drawn. scaled: [num_rows, vocab_size] float32.

    top_k: keeps the k largest and what ties with the k-th; 0 keeps all. top_p: of what is left, keeps a token when the
    tokens before it (by probability, then by id) have less than top_p; 1 keeps all; the first token stays. min_p: of
    what is left, keeps a token whose probability is at least min_p times the largest.
    """
    vocab_size = scaled.shape[1]
    descending, order = scaled.sort(dim=1, descending=True, stable=True)
    last = torch.where(top_k > 0, top_k, vocab_size).clamp(max=vocab_size) - 1
    keep = scaled >= descending.gather(1, last[:, None])
    del descending

    probs = scaled.masked_fill(~keep, -torch.inf).softmax(dim=1).gather(1, order)
    # Summed in float64, so that a GPU's order of summation cannot decide; compared in float32, as top_p is given.
    mass_before = probs.cumsum(dim=1, dtype=torch.float64).roll(1, dims=1).to(torch.float32)
    mass_before[:, 0] = -torch.inf
    in_nucleus = (mass_before < top_p[:, None]) | (top_p[:, None] >= 1)
    keep &= torch.empty_like(keep).scatter_(1, order, in_nucleus)
    del order, mass_before

    probs = scaled.masked_fill(~keep, -torch.inf).softmax(dim=1)
    return keep & (probs >= min_p[:, None] * probs.amax(dim=1, keepdim=True))


def _slices(row_ids: Tensor, logits: Tensor, row_size: int) -> Iterator[Tensor]:
    if len(row_ids):
        yield from row_ids.split(max(1, MAX_LOGITS_PER_SLICE[logits.device.type] // row_size))


def _replace_non_finite(scores: Tensor) -> Tensor:
    """NaN becomes -inf, +inf the largest finite number, with which softmax can compute."""
    return scores.nan_to_num(nan=-torch.inf, neginf=-torch.inf)


def _scaled(logits: Tensor, temperature: Tensor) -> Tensor:
    return _replace_non_finite(logits.to(torch.float32) / temperature[:, None])


def _gumbel_scores(
    scaled: Tensor, seed_low: Tensor, seed_high: Tensor, position: Tensor, first_token: int = 0
) -> Tensor:
    """z - log e, float64, of the tokens from first_token on."""
    noise = exponential_from_words(token_words(seed_low, seed_high, position, scaled.shape[1], first_token))
    return noise.log_().neg_().add_(scaled)
