"""transformers as an oracle: models and logits of a checkpoint, loaded once."""

import functools
import re
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.support.counts import count_comparisons, record_error

# Our logits' error may be so many times that of transformers' own in the same dtype. float32: tests/support/oracle.py's
# ERROR_RATIO; bfloat16: FlashAttention's own criterion, same dtype and another order of summation.
FACTORS = {torch.float32: 4.0, torch.bfloat16: 2.0}


@functools.cache
def load_hugging_face(model_dir: Path, dtype: torch.dtype) -> Any:
    """transformers' model of a checkpoint on the CPU."""
    from transformers import AutoModelForCausalLM

    # The experts' default implementation has no float64.
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, experts_implementation="eager").eval()


@torch.inference_mode()
def hugging_face_logits(model_dir: Path, token_ids: list[int], dtype: torch.dtype, num_last: int = 0) -> torch.Tensor:
    """float64 copy of the logits [len(token_ids), V] that transformers computes in `dtype`; or of the last num_last."""
    model = load_hugging_face(model_dir, dtype)
    return model(torch.tensor([token_ids]), logits_to_keep=num_last).logits[0].double()


def num_excused(
    model_dir: Path, prompt: list[int], token_ids: list[int], dtype: torch.dtype, exact_dtype: torch.dtype
) -> int:
    """How many of token_ids, generated greedily after prompt, are not transformers' argmax in `dtype`.

    Fails where that is not rounding: where the exact logit of a choice is below the largest by more than twice the
    bound of a logit, which is FACTORS[dtype] times the largest error of transformers' own logits in that dtype, and
    half a unit in the last place.
    """
    text, chosen, number = [*prompt, *token_ids], torch.tensor(token_ids), len(token_ids) + 1
    rounded = hugging_face_logits(model_dir, text, dtype, number)[:-1]
    count_comparisons("engine: greedy tokens against transformers", len(token_ids))
    excused = int((rounded.argmax(dim=1) != chosen).sum())
    if excused:
        exact = hugging_face_logits(model_dir, text, exact_dtype, number)[:-1]
        half_place = torch.finfo(dtype).eps * float(exact.abs().max()) / 2
        allowed = 2 * (FACTORS[dtype] * float((rounded - exact).abs().max()) + half_place)
        shortfall = float((exact.amax(dim=1) - exact.gather(1, chosen[:, None])[:, 0]).max())
        record_error(f"greedy choices against transformers, {dtype}", shortfall, allowed)
        assert shortfall <= allowed, (prompt[-20:], token_ids)
    return excused


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
