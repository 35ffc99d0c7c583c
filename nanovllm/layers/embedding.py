"""Token embedding and output projection; the vocabulary is divided among the ranks."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from nanovllm.distributed.tensor_parallel import SINGLE_RANK, TensorParallel
from nanovllm.layers.ops import LayerOps
from nanovllm.layers.parameter import load_shard, make_parameter, parameter_dtype
from nanovllm.layers.torch_ops import TORCH_OPS, linear


class VocabParallelEmbedding(nn.Module):
    """Rank r holds rows r * V/size .. (r + 1) * V/size - 1 of the [V, E] table."""

    def __init__(
        self, vocab_size: int, hidden_size: int, tp: TensorParallel = SINGLE_RANK, ops: LayerOps = TORCH_OPS
    ) -> None:
        super().__init__()
        self.tp = tp
        self.ops = ops
        self.num_rows = tp.divide("vocab_size", vocab_size)
        self.weight = make_parameter((self.num_rows, hidden_size), self.weight_loader)

    def weight_loader(self, param: nn.Parameter, loaded_weight: Tensor) -> None:
        load_shard(param, loaded_weight, 0, self.tp.rank, self.tp.size)

    def forward(self, input_ids: Tensor) -> Tensor:
        """[T] ids -> [T, E]. A token outside this rank's rows adds zeros to the sum over ranks."""
        if self.tp.size == 1:
            return functional.embedding(input_ids, self.weight)
        is_here = input_ids // self.num_rows == self.tp.rank
        rows = functional.embedding(input_ids % self.num_rows, self.weight)
        return self.ops.all_reduce(torch.where(is_here[:, None], rows, 0.0), self.tp)


class ParallelLMHead(nn.Module):
    """Hidden states to logits. Rank r computes columns r * V/size .. (r + 1) * V/size - 1.

    With tied weights it holds the embedding's Parameter itself, not a copy.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        tp: TensorParallel = SINGLE_RANK,
        tied_to: VocabParallelEmbedding | None = None,
    ) -> None:
        super().__init__()
        self.tp = tp
        if tied_to is not None:
            self.weight = tied_to.weight
        else:
            self.weight = make_parameter((tp.divide("vocab_size", vocab_size), hidden_size), self.weight_loader)

    def untie(self) -> None:
        """Replace the embedding's Parameter with one of the same shape, dtype and device, uninitialised."""
        with self.weight.device, parameter_dtype(self.weight.dtype):
            self.weight = make_parameter(tuple(self.weight.shape), self.weight_loader)

    def weight_loader(self, param: nn.Parameter, loaded_weight: Tensor) -> None:
        load_shard(param, loaded_weight, 0, self.tp.rank, self.tp.size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[T, E] -> [T, V/size]."""
        return linear(hidden_states, self.weight)
