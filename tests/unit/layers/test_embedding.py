"""Embedding and tied output projection of each rank against the whole table. Rows are copied, so they are exact."""

import pytest
import torch

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from tests.support.comparing import assert_equal
from tests.support.parallel_ranks import partial_ranks

V, E = 12, 3


def embedding(rank, table):
    layer = VocabParallelEmbedding(V, E, rank)
    layer.weight.weight_loader(layer.weight, table)
    return layer


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_rank_gives_its_rows_and_zero_for_tokens_of_other_ranks(size):
    """D39: also the first and the last rank."""
    table, token_ids = torch.randn(V, E), torch.arange(V).flip(0).repeat(2)
    for number, rank in enumerate(partial_ranks(size)):
        is_mine = token_ids // (V // size) == number
        expected = torch.where(is_mine[:, None], table[token_ids], 0)
        assert_equal("layers: embedding against the table", embedding(rank, table)(token_ids), expected)


@pytest.mark.parametrize("move", [lambda m: m.to(torch.float64), lambda m: m.half(), lambda m: m.to("cpu")])
def test_tied_weight_is_one_parameter_and_stays_one(move):
    """D67"""
    embed_tokens = embedding(TensorParallel(), torch.randn(V, E))
    lm_head = ParallelLMHead(V, E, tied_to=embed_tokens)
    model = move(torch.nn.ModuleList([embed_tokens, lm_head]))
    assert lm_head.weight is embed_tokens.weight
    assert len(list(model.parameters())) == 1
