"""Generate: read the text, sample the token that comes next, append it, and start again from the whole text.

    repeat:  logits = transformer(tokens)[last];  token = sampling(logits);  tokens = tokens + [token]
    until    the token ends the text ("stop"), or max_tokens or max_model_len is reached ("length")

Why it is the oracle of the engine: it has no cache that could be stale, no batch whose requests could mix, and no
schedule that could be wrong. An engine that caches, batches, chunks, shares and preempts computes the same function
faster, so its tokens must be these. A token depends on its sequence, its request's parameters and seed, and on nothing
else.

Its cost is why engines exist: for n tokens it computes n * n / 2, where an engine with a cache computes n.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from reference.checkpoint import Checkpoint, load_checkpoint
from reference.sampling import sampling
from reference.transformer import transformer


class Generation(NamedTuple):
    token_ids: list[int]  # without the prompt, with the token that stopped it
    finish_reason: str  # "stop" or "length"
    logits: Float[Tensor, "n V"]  # row i is what token i was sampled from


def generate(
    model: Checkpoint | str | Path,
    prompt_token_ids: Sequence[int],
    max_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    ignore_eos: bool = False,
    stop_token_ids: Collection[int] = (),
    eos_token_ids: Collection[int] | None = None,
    max_model_len: int | None = None,
) -> Generation:
    """Continue one prompt. model: a folder, or what load_checkpoint made of it (load once, generate often).

    eos_token_ids defaults to the checkpoint's own. top_k=1 is greedy. The model of transformer's doctest counts up:

    >>> from reference.checkpoint import ModelConfig
    >>> weights = {"model.embed_tokens.weight": torch.eye(5), "lm_head.weight": torch.eye(5).roll(1, dims=0)}
    >>> config = ModelConfig(num_hidden_layers=0, num_attention_heads=1, num_key_value_heads=1, head_dim=2)
    >>> counting = Checkpoint(weights | {"model.norm.weight": torch.ones(5)}, config)
    >>> generate(counting, [0, 1], max_tokens=4, top_k=1)[:2]
    ([2, 3, 4, 0], 'length')
    >>> generate(counting, [0, 1], max_tokens=4, top_k=1, stop_token_ids=[3])[:2]
    ([2, 3], 'stop')
    """
    weights, config = model if isinstance(model, Checkpoint) else load_checkpoint(model)
    ending = set(stop_token_ids)
    if not ignore_eos:
        ending |= set(config.eos_token_ids if eos_token_ids is None else eos_token_ids)
    tokens, logits = list(prompt_token_ids), []
    while True:
        logits.append(transformer(tokens, weights, config)[-1])
        tokens.append(sampling(logits[-1], temperature, top_k, top_p, min_p, seed, position=len(tokens)))
        generated = tokens[len(prompt_token_ids) :]
        if generated[-1] in ending:
            return Generation(generated, "stop", torch.stack(logits))
        if len(generated) == max_tokens or len(tokens) == max_model_len:
            return Generation(generated, "length", torch.stack(logits))


if __name__ == "__main__":
    __import__("reference").show_examples(__file__)
