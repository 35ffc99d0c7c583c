"""transformers as an oracle: models and logits of a checkpoint, loaded once."""

import functools
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
