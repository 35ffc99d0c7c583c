"""Cases of millions of draws from the sampler, with the exact probabilities that they must follow."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from nanovllm.layers.sampler import Sampler, to_device
from nanovllm.sampling_metadata import SamplingMetadata, make_sampling_metadata
from reference.sampling import allowed_mask
from tests.support.statistics import check_counts, check_temperature, fresh_seed

MAX_ROWS = 2**19  # at a time
RARE = 1e-4
DTYPES = {"top_k": np.int64, "seed": np.uint64, "position": np.int64}
NO_FILTER: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}

Draw = Callable[[torch.Tensor, SamplingMetadata[torch.Tensor]], torch.Tensor]  # the signature of Sampler.forward


def make_rows(num_rows: int, **fields: Any) -> SimpleNamespace:
    """The arguments of make_sampling_metadata for num_rows rows; a field is one value for all rows or one a row."""
    values = {**NO_FILTER, "seed": 0, "position": 0, **fields}
    return SimpleNamespace(
        **{
            name: np.broadcast_to(np.asarray(value, dtype=DTYPES.get(name, np.float32)), (num_rows,)).copy()
            for name, value in values.items()
        }
    )


def rows_on_device(rows: SimpleNamespace, device: torch.device | str) -> SamplingMetadata[torch.Tensor]:
    return to_device(make_sampling_metadata(**vars(rows)), device)


def make_sampler(device: torch.device | str) -> Sampler:
    """The sampler of an engine on `device`: on a GPU with the Triton kernel."""
    if torch.device(device).type == "cpu":
        return Sampler()
    from nanovllm.layers.triton_ops import TRITON_OPS

    return Sampler(TRITON_OPS.sample_unfiltered)


def sample(logits: torch.Tensor, rows: SimpleNamespace) -> list[int]:
    """Token ids of `rows`, which make_rows made, on the device of the logits."""
    return make_sampler(logits.device)(logits, rows_on_device(rows, logits.device)).tolist()


def counters(layout: str, purpose: str, start: int, stop: int) -> dict[str, np.ndarray | int]:
    """Seeds and positions of draws `start` to `stop`, as requests have them.

    "one request": one seed, each position once. "many requests": seeds that follow each other, one position.
    "a batch": 1024 seeds at random, each at the same positions.
    """
    number = np.arange(start, stop)
    first_seed = fresh_seed(purpose)
    if layout == "one request":
        return {"seed": first_seed, "position": number}
    if layout == "many requests":
        return {"seed": number.astype(np.uint64) + np.uint64(first_seed), "position": first_seed % 100_000}
    seeds = np.random.default_rng(first_seed).integers(0, 2**64, 1024, dtype=np.uint64)
    return {"seed": seeds[number % 1024], "position": number // 1024}


@dataclass(frozen=True)
class Case:
    """Draws from weights / sum(weights), reached with logits of `dtype` at `temperature` and then filtered."""

    name: str
    weights: tuple[float, ...]
    num_draws: int
    layout: str = "one request"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return self.name

    @property
    def logits(self) -> torch.Tensor:
        weights = torch.tensor(self.weights, dtype=torch.float64)
        return (np.float32(self.temperature) * weights.log()).to(self.dtype)

    @property
    def probs(self) -> list[float]:
        """The reference's filters and softmax in float64, from the logits as they were rounded."""
        z = self.logits.double() / float(np.float32(self.temperature))
        is_kept = allowed_mask(z, self.top_k or None, self.top_p, self.min_p)
        return z.where(is_kept, -torch.inf).softmax(dim=0).tolist()

    def draw(self, sampler: Draw | None = None) -> list[int]:
        """How often each token was drawn."""
        sampler = sampler or Sampler()
        logits = self.logits
        filters = {name: getattr(self, name) for name in NO_FILTER}
        counts = torch.zeros(len(logits), dtype=torch.int64)
        for start in range(0, self.num_draws, MAX_ROWS):
            stop = min(start + MAX_ROWS, self.num_draws)
            rows = make_rows(stop - start, **filters, **counters(self.layout, self.name, start, stop))
            tokens = sampler(logits.expand(stop - start, -1), rows_on_device(rows, "cpu"))
            counts += tokens.bincount(minlength=len(logits))
        return counts.tolist()

    def check(self, counts: list[int]) -> None:
        """Raise AssertionError unless draws from `probs` can have these counts, each token's and all rare ones'."""
        probs = self.probs
        check_counts(counts, self.num_draws, probs, self.name)
        rare = [token for token, prob in enumerate(probs) if 0 < prob < RARE]
        rare_count, rare_prob = sum(counts[token] for token in rare), sum(probs[token] for token in rare)
        check_counts([rare_count], self.num_draws, [rare_prob], f"{self.name}, all rare ones")
        self.check_temperature(counts)

    def check_temperature(self, counts: list[int]) -> None:
        """Raise AssertionError unless draws at the right temperature can have these counts."""
        pairs = [(count, prob) for count, prob in zip(counts, self.probs, strict=True) if prob > 0]
        check_temperature(*zip(*pairs, strict=True), self.name)


def one_against(num_others: int, prob: float, *tail: float) -> tuple[float, ...]:
    """One token of probability `prob`, equal others, and a tail: the distribution that shows a wrong temperature best.

    Their variance of log-probability, which decides how many draws a given error takes, is the largest for one token
    against many.
    """
    rest = 1 - prob - sum(tail)
    return (
        *[rest / num_others] * (num_others // 2),
        prob,
        *[rest / num_others] * (num_others - num_others // 2),
        *tail,
    )
