"""Mixture of experts: a router picks num_experts_per_tok of num_experts small MLPs for each token.

Paper: Shazeer et al. 2017 (arXiv 1701.06538). Every rank holds a shard of every expert's intermediate features.
"""

from collections.abc import Hashable

from torch import Tensor, nn

from nanovllm.distributed.tensor_parallel import SINGLE_RANK, TensorParallel
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import ReplicatedLinear
from nanovllm.layers.ops import LayerOps
from nanovllm.layers.parameter import WeightLoader, load_shard, make_parameter, require_shape
from nanovllm.layers.torch_ops import TORCH_OPS
from nanovllm.model_config import MoEConfig


class PackedExperts(nn.Module):
    """One matrix of each expert, packed into `weight`."""

    def __init__(self, shape: tuple[int, ...], weight_loader: WeightLoader, shard_ids: tuple[Hashable, ...]) -> None:
        super().__init__()
        self.weight = make_parameter(shape, weight_loader, shard_ids)


class Experts(nn.Module):
    """The weights of N experts, without the router's: gate_up_proj [N, 2 * F / size, E], down_proj [N, E, F / size].

    shard_id: (expert, 0 gate or 1 up) and (expert,); None for one tensor of all experts: [N, 2 * F, E], in which F rows
    of gate precede F rows of up, and [N, E, F].
    """

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        shard_size = tp.divide("moe_intermediate_size", intermediate_size)
        halves = tuple((expert, half) for expert in range(num_experts) for half in (0, 1))
        shape = (num_experts, 2 * shard_size, hidden_size)
        self.gate_up_proj = PackedExperts(shape, self.gate_up_loader, halves)
        shape = (num_experts, hidden_size, shard_size)
        self.down_proj = PackedExperts(shape, self.down_loader, tuple((expert,) for expert in range(num_experts)))

    def gate_up_loader(
        self, param: nn.Parameter, loaded_weight: Tensor, shard_id: tuple[int, int] | None = None
    ) -> None:
        if shard_id is None:
            num_experts, num_rows, hidden_size = param.shape
            require_shape(loaded_weight, [num_experts, num_rows * self.tp.size, hidden_size])
            halves = loaded_weight.unflatten(1, (2, -1))  # [N, 2, F, E]
            load_shard(param.unflatten(1, (2, -1)), halves, 2, self.tp.rank, self.tp.size)
            return
        expert, half = shard_id
        load_shard(param[expert].chunk(2)[half], loaded_weight, 0, self.tp.rank, self.tp.size)

    def down_loader(self, param: nn.Parameter, loaded_weight: Tensor, shard_id: tuple[int] | None = None) -> None:
        target = param if shard_id is None else param[shard_id[0]]
        load_shard(target, loaded_weight, target.ndim - 1, self.tp.rank, self.tp.size)


class SparseMoeBlock(nn.Module):
    """Norm, router and experts."""

    def __init__(
        self, hidden_size: int, moe: MoEConfig, ops: LayerOps = TORCH_OPS, tp: TensorParallel = SINGLE_RANK
    ) -> None:
        super().__init__()
        self.ops = ops
        self.tp = tp
        self.top_k = moe.num_experts_per_tok
        self.norm_topk_prob = moe.norm_topk_prob
        self.gate = ReplicatedLinear(hidden_size, moe.num_experts, ops=ops)
        self.experts = Experts(moe.num_experts, hidden_size, moe.moe_intermediate_size, tp)

    def forward(self, hidden_states: Tensor, residual: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        """(output [T, E] of the normalised sum, hidden_states + residual, to which it is to be added)."""
        x, residual = norm(hidden_states, residual)
        gate_up_proj, down_proj = self.experts.gate_up_proj.weight, self.experts.down_proj.weight
        output = self.ops.moe(x, self.gate(x), gate_up_proj, down_proj, self.top_k, self.norm_topk_prob)
        return self.ops.all_reduce(output, self.tp), residual
