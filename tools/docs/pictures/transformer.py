"""The weights of a Qwen3 layer in the order in which transformer() reads them, around the stream of vectors.

Each layer adds two results to the stream, first that of attention and then that of the feed-forward network.
"""

import torch

from reference.checkpoint import ModelConfig
from reference.transformer import transformer
from tools.docs.svg import Drawing

SIZE, PROJECTIONS = 4, ("q_proj", "k_proj", "v_proj", "o_proj")
LAYER = "model.layers.0"


def draw() -> Drawing:
    names = weights_read()
    attention = [name.split(".")[-2] for name in names if ".self_attn." in name]
    feed_forward = [name.split(".")[-2] for name in names if ".mlp." in name]
    first_norm, second_norm = (name.split(".")[-2] for name in names if "_layernorm" in name)
    drawing = Drawing(372, 372, "The weights of a transformer in the order in which they are read")
    drawing.arrow((50, 32), (50, 330), look="a")
    _box(drawing, 6, 8, 92, names[0].split(".")[-2], "a")
    _branch(drawing, 50, first_norm, attention[:-1], "attention", attention[-1])
    _branch(drawing, 178, second_norm, feed_forward[:-1], "silu_and_mul", feed_forward[-1])
    _box(drawing, 6, 300, 92, names[-2].split(".")[-2], "c")
    _box(drawing, 6, 336, 92, names[-1].split(".")[-2], "a")
    drawing.text(106, 354, "logits: a number for each token id", "faint small", "start")
    drawing.text(106, 22, "a vector for each token of the text", "faint small", "start")
    return drawing


def _branch(drawing: Drawing, top: float, norm: str, inputs: list[str], between: str, output: str) -> None:
    """From the stream through a norm, the input matrices, a function and the output matrix, and added again."""
    drawing.arrow((50, top + 10), (106, top + 10))
    _box(drawing, 106, top, 170, norm, "c")
    for row, name in enumerate(inputs):
        _box(drawing, 290, top + 22 * row, 76, name, "c" if name.endswith("norm") else "b")
    drawing.arrow((276, top + 10), (290, top + 10))
    middle = top + 22 * max(len(inputs) - 1, 2) + 2
    _box(drawing, 106, middle - 18, 88, between, "free")
    drawing.arrow((290, middle - 8), (194, middle - 8))
    _box(drawing, 106, middle + 12, 88, output, "b")
    drawing.arrow((150, middle + 2), (150, middle + 12))
    drawing.arrow((106, middle + 22), (60, middle + 22))
    drawing.circle(50, middle + 22, 9, "free")
    drawing.text(50, middle + 26, "+")


def _box(drawing: Drawing, x: float, y: float, width: float, name: str, look: str) -> None:
    drawing.box(x, y, width, 20, look)
    drawing.text(x + width / 2, y + 14, name, "small")


def weights_read() -> list[str]:
    """The names of the weights of a model of one layer, in the order of their first use."""
    ones = dict.fromkeys(["model.embed_tokens", "model.norm", "lm_head"], torch.ones(1))
    ones |= {f"{LAYER}.self_attn.{name}": torch.ones(1) for name in (*PROJECTIONS, "q_norm", "k_norm")}
    ones |= {f"{LAYER}.mlp.{name}_proj": torch.ones(1) for name in ("gate", "up", "down")}
    ones |= {f"{LAYER}.{name}_layernorm": torch.ones(1) for name in ("input", "post_attention")}
    read = list[str]()

    class Weights(dict[str, torch.Tensor]):
        def __getitem__(self, name: str) -> torch.Tensor:
            if name not in read:
                read.append(name)
            return super().__getitem__(name)

    sizes = {name: (SIZE,) if "norm" in name else (SIZE, SIZE) for name in ones}
    config = ModelConfig(num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=SIZE)
    transformer([0, 1], Weights({f"{name}.weight": torch.ones(size) for name, size in sizes.items()}), config)
    return read
