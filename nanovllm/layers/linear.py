"""Linear layers, y = x W' + b, replicated or divided among the ranks of a TensorParallel.

Weights are [output features, input features] as in torch. A column-parallel layer holds some of the outputs (rows of
W), a row-parallel layer some of the inputs (columns of W), and sums over ranks. A packed layer (merged, qkv) is several
matrices of the checkpoint on top of each other; shard_id is the number or name of one of them.
Paper: Shoeybi et al. 2019 (arXiv 1909.08053).
"""

import torch
from torch import nn

from nanovllm.distributed.tensor_parallel import SINGLE_RANK, TensorParallel
from nanovllm.layers.parameter import load_replicated, load_shard, make_parameter
from nanovllm.layers.torch_ops import linear


class ReplicatedLinear(nn.Module):
    """Every rank holds and computes the whole layer."""

    def __init__(self, input_size: int, output_size: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = make_parameter((output_size, input_size), load_replicated)
        self.bias = make_parameter((output_size,), load_replicated) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [T, input_size] -> [T, output_size]
        return linear(x, self.weight, self.bias)


class ColumnParallelLinear(nn.Module):
    """Each rank computes and keeps its shard of the outputs: [T, input_size] -> [T, output_size / size]."""

    def __init__(self, input_size: int, output_size: int, bias: bool = False, tp: TensorParallel = SINGLE_RANK) -> None:
        super().__init__()
        self.tp = tp
        shard_size = tp.divide("output_size", output_size)
        self.weight = make_parameter((shard_size, input_size), self.weight_loader)
        self.bias = make_parameter((shard_size,), self.weight_loader) if bias else None

    def weight_loader(self, param: nn.Parameter, loaded_weight: torch.Tensor) -> None:
        """Loads weight or bias: both are divided along the outputs, dimension 0."""
        load_shard(param, loaded_weight, 0, self.tp.rank, self.tp.size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


class MergedColumnParallelLinear(nn.Module):
    """Column-parallel matrices of one input, packed: rank r computes its shard of each, in order.

    shard_id: index into output_sizes.
    """

    def __init__(
        self, input_size: int, output_sizes: list[int], bias: bool = False, tp: TensorParallel = SINGLE_RANK
    ) -> None:
        super().__init__()
        self.tp = tp
        self.shard_sizes = [tp.divide(f"output_sizes[{i}]", output_size) for i, output_size in enumerate(output_sizes)]
        shard_ids = tuple(range(len(output_sizes)))
        self.weight = make_parameter((sum(self.shard_sizes), input_size), self.weight_loader, shard_ids)
        self.bias = make_parameter((sum(self.shard_sizes),), self.weight_loader, shard_ids) if bias else None

    def weight_loader(self, param: nn.Parameter, loaded_weight: torch.Tensor, shard_id: int) -> None:
        target = param.narrow(0, sum(self.shard_sizes[:shard_id]), self.shard_sizes[shard_id])
        load_shard(target, loaded_weight, 0, self.tp.rank, self.tp.size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [T, input_size] -> [T, sum(output_sizes) / size]
        return linear(x, self.weight, self.bias)


class QKVParallelLinear(nn.Module):
    """Query, key and value projections, packed: [T, hidden_size] -> [T, (num_heads + 2 * num_kv_heads) * head_dim].

    Query heads are divided among the ranks. So are key/value heads, unless there are more ranks than key/value heads:
    then each rank holds the one head that its query heads read, and several ranks hold the same head.
    num_heads, num_kv_heads: of this rank. shard_id: "q", "k" or "v".
    """

    def __init__(
        self,
        hidden_size: int,
        head_dim: int,
        total_num_heads: int,
        total_num_kv_heads: int,
        bias: bool = False,
        tp: TensorParallel = SINGLE_RANK,
    ) -> None:
        super().__init__()
        self.tp = tp
        self.head_dim = head_dim
        self.num_heads = tp.divide("num_attention_heads", total_num_heads)
        if tp.size > total_num_kv_heads and tp.size % total_num_kv_heads == 0:
            self.num_kv_heads, self.kv_replicas = 1, tp.size // total_num_kv_heads
        else:
            self.num_kv_heads, self.kv_replicas = tp.divide("num_key_value_heads", total_num_kv_heads), 1
        num_rows = (self.num_heads + 2 * self.num_kv_heads) * head_dim
        self.weight = make_parameter((num_rows, hidden_size), self.weight_loader, ("q", "k", "v"))
        self.bias = make_parameter((num_rows,), self.weight_loader, ("q", "k", "v")) if bias else None

    def weight_loader(self, param: nn.Parameter, loaded_weight: torch.Tensor, shard_id: str) -> None:
        heads = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        target = param.split([count * self.head_dim for count in heads])["qkv".index(shard_id)]
        replicas = 1 if shard_id == "q" else self.kv_replicas
        load_shard(target, loaded_weight, 0, self.tp.rank // replicas, self.tp.size // replicas)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """Each rank multiplies its shard of the features; sum over ranks: [T, input_size / size] -> [T, output_size].

    Every rank holds the bias, but only rank 0 adds it, so that the sum contains it once.
    """

    def __init__(self, input_size: int, output_size: int, bias: bool = False, tp: TensorParallel = SINGLE_RANK) -> None:
        super().__init__()
        self.tp = tp
        self.weight = make_parameter((output_size, tp.divide("input_size", input_size)), self.weight_loader)
        self.bias = make_parameter((output_size,), load_replicated) if bias else None

    def weight_loader(self, param: nn.Parameter, loaded_weight: torch.Tensor) -> None:
        load_shard(param, loaded_weight, 1, self.tp.rank, self.tp.size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tp.all_reduce(linear(x, self.weight, self.bias if self.tp.rank == 0 else None))
