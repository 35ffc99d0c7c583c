"""transformers as an oracle: models and logits of a checkpoint, loaded once."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@functools.cache
def load_hugging_face(model_dir: Path, dtype: torch.dtype) -> Any:
    """transformers' model of a checkpoint on the CPU."""
    from transformers import AutoModelForCausalLM

    # The experts' default implementation has no float64.
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, experts_implementation="eager").eval()


@torch.inference_mode()
def hugging_face_logits(model_dir: Path, token_ids: list[int], dtype: torch.dtype) -> torch.Tensor:
    """float64 copy of the logits [len(token_ids), V] that transformers computes in `dtype`."""
    return load_hugging_face(model_dir, dtype)(torch.tensor([token_ids])).logits[0].double()


@dataclass(frozen=True)
class Judgement:
    """How transformers, given a prompt and our tokens, judges each of our greedy choices.

    shortfalls [num_tokens]: float64's best logit less the chosen one's; 0 where it would have chosen the same.
    rounding: the most that transformers' own logits in the judged dtype are off from float64, in this text.
    largest_logit: in this text, its sign left out.
    """

    shortfalls: torch.Tensor
    rounding: float
    largest_logit: float


def judge(model_dir: Path, prompt: list[int], token_ids: list[int], dtype: torch.dtype) -> Judgement:
    """Judge token_ids, generated greedily after prompt in `dtype`."""
    text = [*prompt, *token_ids]
    exact = hugging_face_logits(model_dir, text, torch.float64)
    rounding = float((hugging_face_logits(model_dir, text, dtype) - exact).abs().max())
    before = exact[len(prompt) - 1 : -1]
    chosen = before.gather(1, torch.tensor(token_ids)[:, None])[:, 0]
    return Judgement(before.amax(dim=1) - chosen, rounding, float(exact.abs().max()))
