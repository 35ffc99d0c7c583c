"""Embedding and output projection: the ranks' shares against the whole table. Rows are copied, so sums are exact."""

import pytest
import torch

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from reference.tensor_parallel import vocab_parallel_embedding
from tests.support.comparing import assert_equal
from tests.support.parallel_ranks import partial_ranks

V, E = 12, 3
EMBEDDING = "layers: embedding and output projection against the whole table"
SIZES = pytest.mark.parametrize("size", [1, 2, 4])


def embedding(rank, table):
    layer = VocabParallelEmbedding(V, E, rank)
    layer.weight.weight_loader(layer.weight, table)
    return layer


@SIZES
def test_embeddings_of_all_ranks_sum_to_the_rows_of_the_table(size):
    table, token_ids = torch.randn(V, E), torch.arange(V).flip(0).repeat(2)
    outputs = [embedding(rank, table)(token_ids) for rank in partial_ranks(size)]
    assert_equal(EMBEDDING, torch.stack(outputs).sum(0), vocab_parallel_embedding(token_ids, table, size))
    assert_equal(EMBEDDING, torch.stack(outputs).sum(0), table[token_ids])


def test_every_rank_gives_zero_for_tokens_of_other_ranks():
    """D39: also the first and the last rank."""
    for number, rank in enumerate(partial_ranks(4)):
        output = embedding(rank, torch.ones(V, E))(torch.arange(V))
        mine = torch.arange(V) // (V // 4) == number
        assert torch.equal(output, mine[:, None].expand(V, E).float())


@pytest.mark.parametrize("move", [lambda m: m.to(torch.float64), lambda m: m.half(), lambda m: m.to("cpu")])
def test_tied_weight_is_one_parameter_and_stays_one(move):
    """D67"""
    embed_tokens = embedding(TensorParallel(), torch.randn(V, E))
    lm_head = ParallelLMHead(V, E, tied_to=embed_tokens)
    model = move(torch.nn.ModuleList([embed_tokens, lm_head]))
    assert lm_head.weight is embed_tokens.weight
    assert len(list(model.parameters())) == 1
