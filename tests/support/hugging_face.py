"""transformers as an oracle: models and logits of a checkpoint, loaded once."""

import functools
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
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
class GreedyCheck:
    """How transformers, given a prompt and our tokens, rates our greedy choices.

    shortfalls [num_tokens]: float64's best logit less the chosen one's; 0 where it would have chosen the same.
    rounding: the largest error of transformers' own logits in that dtype, against float64, in this text.
    largest_logit: the largest absolute logit in this text.
    """

    shortfalls: torch.Tensor
    rounding: float
    largest_logit: float


def check_greedy_choices(model_dir: Path, prompt: list[int], token_ids: list[int], dtype: torch.dtype) -> GreedyCheck:
    """Check token_ids, generated greedily after prompt in `dtype`."""
    text = [*prompt, *token_ids]
    exact = hugging_face_logits(model_dir, text, torch.float64)
    rounding = float((hugging_face_logits(model_dir, text, dtype) - exact).abs().max())
    before = exact[len(prompt) - 1 : -1]
    chosen = before.gather(1, torch.tensor(token_ids)[:, None])[:, 0]
    return GreedyCheck(before.amax(dim=1) - chosen, rounding, float(exact.abs().max()))


# --- which module differs first ---

_COMPARED = re.compile(r"embed_tokens|layers\.\d+\.(self_attn|mlp)|norm")


def first_module_that_differs(
    model_dir: Path, decoder: torch.nn.Module, run_ours: Callable[[], object], token_ids: list[int], ratio: float
) -> str:
    """Sentence that names the first module of `decoder` whose output is off, in the order of computing.

    decoder: ours, with transformers' module names; run_ours computes all of token_ids with it. An output is off when
    its error against transformers' float64 is more than `ratio` times that of transformers' own float32.
    """
    ours = _outputs(decoder, run_ours)
    exact, rounded = (
        _outputs(load_hugging_face(model_dir, dtype).model, partial(hugging_face_logits, model_dir, token_ids, dtype))
        for dtype in (torch.float64, torch.float32)
    )
    for name, expected in exact.items():
        error = (ours[name] - expected).abs()
        allowed = ratio * float((rounded[name] - expected).abs().max())
        if not float(error.max()) <= allowed:
            position, largest = int(error.amax(dim=1).argmax()), float(error.max())
            place = f"{name}, most at position {position}: error {largest:.3g}, allowed {allowed:.3g}"
            return f"the first module whose output differs is {place}"
    return "no module's output differs: look at lm_head"


def _outputs(decoder: torch.nn.Module, run: Callable[[], object]) -> dict[str, torch.Tensor]:
    """What each compared module gives while run() computes: float64 [num_tokens, hidden_size], by its name."""
    outputs: dict[str, list[torch.Tensor]] = {}

    def note(name: str, _module: Any, _arguments: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        outputs.setdefault(name, []).append(tensor.detach().flatten(0, -2).double().cpu())

    with ExitStack() as hooks:
        for name, module in decoder.named_modules():
            if _COMPARED.fullmatch(name):
                hooks.callback(module.register_forward_hook(partial(note, name)).remove)
        run()
    return {name: torch.cat(tensors) for name, tensors in outputs.items()}
