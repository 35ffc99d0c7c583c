"""Which tokens the model reads to write four tokens after a prompt of three: generate(), and an engine with a KV cache.

generate() reads the whole text for each new token. An engine reads the prompt once, and then one token a step.
"""

import torch

from reference.checkpoint import Checkpoint, ModelConfig
from reference.generate import generate
from tools.docs.svg import Drawing

PROMPT, NUM_TOKENS = [1, 2, 3], 4


def draw() -> Drawing:
    lengths = lengths_read()
    cell, row, right = 22, 26, 206
    drawing = Drawing(372, 196, "Tokens that are read for each new token, without and with a cache")
    for left, title in ((8, "generate()"), (right, "with a KV cache")):
        drawing.text(left, 16, title, "bold", "start")
        num_read = 0
        for step, length in enumerate(lengths):
            start = 0 if left == 8 or step == 0 else lengths[step - 1]
            num_read += length - start
            for position in range(length):
                look = "free" if position < start else "a" if position < len(PROMPT) else "b"
                drawing.box(left + position * cell, 28 + row * step, cell, 20, look)
        drawing.text(left, 28 + row * len(lengths) + 18, f"{num_read} tokens read", "small", "start")
    y = 28 + row * len(lengths) + 38
    for x, look, text in ((8, "a", "prompt"), (84, "b", "generated"), (176, "free", "in the cache, not read again")):
        drawing.box(x, y, 14, 14, look)
        drawing.text(x + 20, y + 11, text, "small", "start")
    return drawing


def lengths_read() -> list[int]:
    """The length of the text before each token that generate() writes: it reads all of it."""
    weights = {"model.embed_tokens.weight": torch.eye(9), "lm_head.weight": torch.eye(9).roll(1, dims=0)}
    config = ModelConfig(num_hidden_layers=0, num_attention_heads=1, num_key_value_heads=1, head_dim=2)
    checkpoint = Checkpoint(weights | {"model.norm.weight": torch.ones(9)}, config)
    generated = generate(checkpoint, PROMPT, max_tokens=NUM_TOKENS, top_k=1).token_ids
    return [len(PROMPT) + number for number in range(len(generated))]
