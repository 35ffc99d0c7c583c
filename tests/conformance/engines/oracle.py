"""transformers in float64 as the oracle of greedy tokens, and what rounding explains.

Nothing here imports nanovllm: the engine under test may have that name.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.support.hugging_face import hugging_face_logits, load_hugging_face, num_excused


def are_greedy_choices(model_dir: Path, prompt: Sequence[int], token_ids: Sequence[int], dtype: str) -> bool:
    """Whether transformers, given the tokens before, would choose each of token_ids, but for rounding in `dtype`."""
    return not token_ids or _are_greedy_choices(model_dir, tuple(prompt), tuple(token_ids), dtype)


@functools.cache
def _are_greedy_choices(model_dir: Path, prompt: tuple[int, ...], token_ids: tuple[int, ...], dtype: str) -> bool:
    try:
        num_excused(model_dir, list(prompt), list(token_ids), getattr(torch, dtype), torch.float64)
    except AssertionError:
        return False
    return True


def greedy_tokens(model_dir: Path, prompt: Sequence[int], number: int) -> list[int]:
    """The first `number` tokens of transformers after `prompt`; nothing ends them."""
    text = list(prompt)
    for _ in range(number):
        text.append(int(hugging_face_logits(model_dir, text, torch.float64)[-1].argmax()))
    return text[len(prompt) :]


@functools.cache
@torch.inference_mode()
def prompt_that_ends(model_dir: Path, eos_token_id: int) -> tuple[list[int], list[int]]:
    """A random prompt of 6 bytes and its greedy tokens, of which the last, and no other, is eos_token_id.

    There are 3 to 7 tokens. Of 512 prompts it is the one with the largest margins, so that rounding
    changes none of its tokens.
    """
    texts = torch.randint(256, (512, 6), generator=torch.Generator().manual_seed(0))
    model, margins = load_hugging_face(model_dir, torch.float64), []
    for _ in range(7):
        best = model(texts).logits[:, -1].topk(2)
        margins.append(best.values[:, 0] - best.values[:, 1])
        texts = torch.cat([texts, best.indices[:, :1]], dim=1)
    found: list[tuple[float, list[int], int]] = []  # smallest margin, text, number of its tokens after the prompt
    for text, margin in zip(texts.tolist(), torch.stack(margins, dim=1), strict=True):
        if eos_token_id in text and (number := text.index(eos_token_id) - 5) >= 3:
            found.append((float(margin[:number].min()), text, number))
    if not found:
        raise ValueError(f"no prompt of 512 reaches token {eos_token_id} in 7 tokens: try another tiny model")
    _, text, number = max(found)
    return text[:6], text[6 : 6 + number]
