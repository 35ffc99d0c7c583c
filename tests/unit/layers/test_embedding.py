"""A tied output projection. models/test_models.py compares the embedding of several ranks with that of one."""

import pytest
import torch

from nanovllm.layers.embedding import ParallelLMHead, VocabParallelEmbedding


@pytest.mark.parametrize("move", [lambda m: m.to(torch.float64), lambda m: m.half(), lambda m: m.to("cpu")])
def test_tied_weight_is_one_parameter_and_stays_one(move):
    """D67"""
    embed_tokens = VocabParallelEmbedding(12, 3)
    lm_head = ParallelLMHead(12, 3, tied_to=embed_tokens)
    model = move(torch.nn.ModuleList([embed_tokens, lm_head]))
    assert lm_head.weight is embed_tokens.weight
    assert len(list(model.parameters())) == 1
