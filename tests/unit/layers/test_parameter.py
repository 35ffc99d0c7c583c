"""What weight loaders refuse: nothing is broadcast, cut off or padded."""

from collections.abc import Callable, Hashable

import pytest
import torch
from torch import nn

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from nanovllm.layers.moe import Experts
from nanovllm.layers.parameter import ShapeError

E = 16
FIRST_OF_2 = TensorParallel(0, 2)
SHARD_LOADERS: dict[str, tuple[Callable[[], nn.Parameter], tuple[Hashable, ...], list[int]]] = {
    # name: (parameter, shard_id, shape of the checkpoint's tensor)
    "replicated": (lambda: ReplicatedLinear(E, 8).weight, (), [8, E]),
    "merged": (lambda: MergedColumnParallelLinear(E, [8, 8], tp=FIRST_OF_2).weight, (1,), [8, E]),
    "qkv": (lambda: QKVParallelLinear(E, 4, 2, 2).weight, ("k",), [8, E]),
    "row": (lambda: RowParallelLinear(E, 8, tp=FIRST_OF_2).weight, (), [8, E]),
    "bias": (lambda: RowParallelLinear(E, 8, bias=True).bias, (), [8]),
    "norm": (lambda: RMSNorm(8).weight, (), [8]),
    "embedding": (lambda: VocabParallelEmbedding(12, E, FIRST_OF_2).weight, (), [12, E]),
    "lm_head": (lambda: ParallelLMHead(12, E, FIRST_OF_2).weight, (), [12, E]),
    "expert's up": (lambda: Experts(6, E, 12, FIRST_OF_2).gate_up_proj.weight, ((0, 1),), [12, E]),
    "expert's down": (lambda: Experts(6, E, 12, FIRST_OF_2).down_proj.weight, ((0,),), [E, 12]),
}


@pytest.mark.parametrize(("make", "shard_id", "shape"), SHARD_LOADERS.values(), ids=SHARD_LOADERS)
def test_tensor_of_another_shape_is_refused_not_broadcast(make, shard_id, shape) -> None:
    """D36, D62: a row less or more, one row, one column, one number, transposed, another dimension."""
    param = make()
    rows, *columns = shape
    others = [[rows - 1, *columns], [rows + 1, *columns], [1, *columns], [1], [rows, *columns, 1], [2 * rows, *columns]]
    for given in [*others, *([[rows, 1], [*columns, rows]] if columns else [])]:
        with pytest.raises(ShapeError, match=f"expected shape {shape}, got {given}".translate({91: "\\[", 93: "\\]"})):
            param.weight_loader(param, torch.zeros(given), *shard_id)
    param.weight_loader(param, torch.zeros(shape), *shard_id)
