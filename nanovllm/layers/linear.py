"""Linear layers, y = x W' + b, replicated or divided among the ranks of a TensorParallel.

Weights are [output features, input features] as in torch. A column-parallel layer holds some of the outputs (rows of
W), a row-parallel layer some of the inputs (columns of W), and sums over ranks. A packed layer (merged, qkv) is several
matrices of the checkpoint on top of each other; shard_id is the number or name of one of them.
Paper: Shoeybi et al. 2019 (arXiv 1909.08053).
"""

from collections.abc import Callable, Hashable

from torch import Tensor, nn

from nanovllm.distributed.tensor_parallel import SINGLE_RANK, TensorParallel
from nanovllm.layers.ops import LayerOps
from nanovllm.layers.parameter import WHOLE, load_replicated, load_shard, make_parameter
from nanovllm.layers.torch_ops import TORCH_OPS


class LinearBase(nn.Module):
    """A layer of which this rank holds a shard, which weight_loader loads.

    input_size, output_size: of this rank's shard. shard_ids: of weight and bias, see make_parameter.
    """

    weight_loader: Callable[..., None]

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = False,
        tp: TensorParallel = SINGLE_RANK,
        ops: LayerOps = TORCH_OPS,
        shard_ids: tuple[Hashable, ...] = WHOLE,
    ) -> None:
        super().__init__()
        self.tp = tp
        self.ops = ops
        self.weight = make_parameter((output_size, input_size), self.weight_loader, shard_ids)
        self.bias = make_parameter((output_size,), self.weight_loader, shard_ids) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.linear(x, self.weight, self.bias)


class ReplicatedLinear(LinearBase):
    """Every rank holds and computes the whole layer: [T, input_size] -> [T, output_size]."""

    weight_loader = staticmethod(load_replicated)


class MergedColumnParallelLinear(LinearBase):
    """Column-parallel matrices of one input, packed: rank r computes its shard of each, in order.

    [T, input_size] -> [T, sum(output_sizes) / size]. shard_id: index into output_sizes.
    """

    def __init__(
        self,
        input_size: int,
        output_sizes: list[int],
        bias: bool = False,
        tp: TensorParallel = SINGLE_RANK,
        ops: LayerOps = TORCH_OPS,
    ) -> None:
        shard_sizes = [tp.divide(f"output_sizes[{i}]", output_size) for i, output_size in enumerate(output_sizes)]
        super().__init__(input_size, sum(shard_sizes), bias, tp, ops, tuple(range(len(output_sizes))))
        self.shard_sizes = shard_sizes

    def weight_loader(self, param: nn.Parameter, loaded_weight: Tensor, shard_id: int) -> None:
        load_shard(param.split(self.shard_sizes)[shard_id], loaded_weight, 0, self.tp.rank, self.tp.size)


class QKVParallelLinear(LinearBase):
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
        ops: LayerOps = TORCH_OPS,
    ) -> None:
        num_heads, num_kv_heads, kv_replicas = tp.divide("num_attention_heads", total_num_heads), 1, 1
        if tp.size > total_num_kv_heads and tp.size % total_num_kv_heads == 0:
            kv_replicas = tp.size // total_num_kv_heads
        else:
            num_kv_heads = tp.divide("num_key_value_heads", total_num_kv_heads)
        super().__init__(hidden_size, (num_heads + 2 * num_kv_heads) * head_dim, bias, tp, ops, ("q", "k", "v"))
        self.head_dim = head_dim
        self.num_heads, self.num_kv_heads, self.kv_replicas = num_heads, num_kv_heads, kv_replicas

    def weight_loader(self, param: nn.Parameter, loaded_weight: Tensor, shard_id: str) -> None:
        heads = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        target = param.split([count * self.head_dim for count in heads])["qkv".index(shard_id)]
        replicas = 1 if shard_id == "q" else self.kv_replicas
        load_shard(target, loaded_weight, 0, self.tp.rank // replicas, self.tp.size // replicas)


class RowParallelLinear(LinearBase):
    """Each rank multiplies its shard of the features; sum over ranks: [T, input_size / size] -> [T, output_size].

    Every rank holds the bias, but only rank 0 adds it, so that the sum contains it once.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = False,
        tp: TensorParallel = SINGLE_RANK,
        ops: LayerOps = TORCH_OPS,
    ) -> None:
        super().__init__(tp.divide("input_size", input_size), output_size, bias, tp, ops)

    def weight_loader(self, param: nn.Parameter, loaded_weight: Tensor) -> None:
        if param is self.bias:
            load_replicated(param, loaded_weight)
        else:
            load_shard(param, loaded_weight, 1, self.tp.rank, self.tp.size)

    def forward(self, x: Tensor) -> Tensor:
        output = self.ops.linear(x, self.weight, self.bias if self.tp.rank == 0 else None)
        return self.ops.all_reduce(output, self.tp)
