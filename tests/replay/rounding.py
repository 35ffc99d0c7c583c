"""RoundingOracle: tests.oracle's judgement of near ties, for runs in any dtype."""

from dataclasses import dataclass
from functools import cached_property

import torch

from reference.checkpoint import Checkpoint, load_checkpoint
from tests.oracle import Oracle


@dataclass
class RoundingOracle(Oracle):
    """dtype: of the run, as Config has it. The reference itself, run in it, says how far rounding moves logits."""

    dtype: str = "auto"

    @cached_property
    def single(self) -> Checkpoint:
        from nanovllm.model_config import load_model_config

        dtype = load_model_config(self.model_dir).dtype if self.dtype == "auto" else self.dtype
        return load_checkpoint(self.model_dir, getattr(torch, dtype))
