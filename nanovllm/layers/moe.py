"""Mixture of experts: a router picks num_experts_per_tok of num_experts small MLPs for each token.

Paper: Shazeer et al. 2017 (arXiv 1701.06538). Every rank holds a share of every expert's intermediate features.
"""

import torch
from torch import nn
from torch.nn import functional

from nanovllm.distributed.tensor_parallel import SINGLE_RANK, TensorParallel
from nanovllm.layers.activation import SiluAndMul
from nanovllm.layers.kernel_choice import has_kernels
from nanovllm.layers.linear import ReplicatedLinear
from nanovllm.layers.parameter import load_shard, make_parameter, require_shape
from nanovllm.model_config import MoEConfig


class ExpertsGateUp(nn.Module):
    """Gate and up matrices of all experts, packed: weight [N, 2 * F / size, E].

    shard_id: (expert, 0 gate or 1 up); None for one tensor [N, 2 * F, E] of all experts, in which F rows of gate
    precede F rows of up.
    """

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.share = tp.divide("moe_intermediate_size", intermediate_size)
        shard_ids = tuple((expert, half) for expert in range(num_experts) for half in (0, 1))
        self.weight = make_parameter((num_experts, 2 * self.share, hidden_size), self.weight_loader, shard_ids)

    def weight_loader(
        self, param: nn.Parameter, loaded_weight: torch.Tensor, shard_id: tuple[int, int] | None = None
    ) -> None:
        if shard_id is None:
            num_experts, num_rows, hidden_size = param.shape
            require_shape(loaded_weight, [num_experts, num_rows * self.tp.size, hidden_size])
            halves = loaded_weight.unflatten(1, (2, -1))  # [N, 2, F, E]
            load_shard(param.unflatten(1, (2, -1)), halves, 2, self.tp.rank, self.tp.size)
            return
        expert, half = shard_id
        target = param[expert].narrow(0, half * self.share, self.share)
        load_shard(target, loaded_weight, 0, self.tp.rank, self.tp.size)


class ExpertsDown(nn.Module):
    """Down matrices of all experts: weight [N, E, F / size].

    shard_id: (expert,); None for one tensor [N, E, F] of all experts.
    """

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        share = tp.divide("moe_intermediate_size", intermediate_size)
        shard_ids = tuple((expert,) for expert in range(num_experts))
        self.weight = make_parameter((num_experts, hidden_size, share), self.weight_loader, shard_ids)

    def weight_loader(
        self, param: nn.Parameter, loaded_weight: torch.Tensor, shard_id: tuple[int] | None = None
    ) -> None:
        target = param if shard_id is None else param[shard_id[0]]
        load_shard(target, loaded_weight, target.ndim - 1, self.tp.rank, self.tp.size)


class Experts(nn.Module):
    """The experts, without the router."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int, tp: TensorParallel) -> None:
        super().__init__()
        self.gate_up_proj = ExpertsGateUp(num_experts, hidden_size, intermediate_size, tp)
        self.down_proj = ExpertsDown(num_experts, hidden_size, intermediate_size, tp)
        self.act_fn = SiluAndMul()

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x [T, E], chosen and weights [T, k] -> [T, E], this rank's summand of the weighted sum of chosen experts."""
        output = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            token, choice = torch.where(chosen == expert)
            hidden = self.act_fn(functional.linear(x[token], self.gate_up_proj.weight[expert]))
            hidden = functional.linear(hidden, self.down_proj.weight[expert])
            output.index_add_(0, token, hidden * weights[token, choice, None])
        return output


class SparseMoeBlock(nn.Module):
    """Router and experts: [T, E] -> [T, E]. The softmax is float32 or wider, and over all experts.

    On a GPU with triton, kernels.moe_routing and kernels.grouped_gemm do the work.
    """

    def __init__(self, hidden_size: int, moe: MoEConfig, tp: TensorParallel = SINGLE_RANK) -> None:
        super().__init__()
        self.tp = tp
        self.top_k = moe.num_experts_per_tok
        self.num_experts = moe.num_experts
        self.norm_topk_prob = moe.norm_topk_prob
        self.gate = ReplicatedLinear(hidden_size, moe.num_experts)
        self.experts = Experts(moe.num_experts, hidden_size, moe.moe_intermediate_size, tp)

    @property
    def is_graph_safe(self) -> bool:
        """Whether it may be recorded in a CUDA graph: torch's way asks the device which experts were chosen."""
        return has_kernels(self.gate.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.gate(x)
        output = self._grouped(x, logits) if has_kernels(x) else self._expert_by_expert(x, logits)
        return self.tp.all_reduce(output)

    def _grouped(self, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        from nanovllm.kernels.grouped_gemm import choose_tile_config, grouped_gemm  # imports triton
        from nanovllm.kernels.moe_routing import moe_routing

        tiles = choose_tile_config(len(x) * self.top_k, self.num_experts, x.element_size())
        routing = moe_routing(logits, self.top_k, self.norm_topk_prob, tiles.rows)
        experts = self.experts
        return grouped_gemm(x, experts.gate_up_proj.weight, experts.down_proj.weight, routing, tiles=tiles)

    def _expert_by_expert(self, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        probability = logits.softmax(dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))
        weights, chosen = probability.topk(self.top_k, dim=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return self.experts(x, chosen, weights.to(x.dtype))
