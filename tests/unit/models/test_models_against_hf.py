"""Our models against transformers on the same weights: every variant of tests/support/tiny_models.py.

The error of either implementation is measured against transformers in float64. Both compute the same formulas in
float32 with sums in different orders, so their errors are two draws of one kind: ours may be at most ERROR_RATIO times
theirs, plus a few units in the last place of the largest value, which keeps a lucky draw of theirs from failing ours.
"""

import pytest
import torch

from nanovllm.context import Context, set_context
from nanovllm.layers.torch_ops import TORCH_OPS
from nanovllm.models.decoder import build_model
from nanovllm.models.loader import load_model
from nanovllm.models.registry import load_model_config
from tests.support.comparing import assert_within
from tests.support.tiny_models import VARIANTS, VOCAB_SIZE, tiny_model

ERROR_RATIO = 4
ULPS = 8
LENGTHS = (1, 40, 97)  # packed into one prefill; the last is beyond original_max_position_embeddings


def prefill_context(lengths):
    """Whole prompts, packed, nothing cached and nothing stored."""
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    return Context(
        is_prefill=True,
        slot_mapping=torch.full((sum(lengths),), -1),
        cu_seqlens_q=bounds,
        cu_seqlens_k=bounds,
        max_seqlen_q=max(lengths),
        max_seqlen_k=max(lengths),
        context_lens=torch.tensor(lengths).int(),
        block_tables=None,
    )


def our_outputs(model_dir, prompts):
    model = build_model(load_model_config(model_dir), TORCH_OPS)
    load_model(model, model_dir, use_tqdm=False)
    lengths = [len(prompt) for prompt in prompts]
    positions = torch.cat([torch.arange(length) for length in lengths])
    with torch.no_grad(), set_context(prefill_context(lengths)):
        hidden_states = model(torch.cat(prompts), positions)
        return hidden_states, model.compute_logits(hidden_states)


def hf_outputs(model_dir, prompts, dtype):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
    model.config._experts_implementation = "eager"  # the default has no float64
    hidden_states, logits = [], []
    with torch.no_grad():
        for prompt in prompts:
            output = model.model(prompt[None]).last_hidden_state[0]
            hidden_states.append(output)
            logits.append(model.lm_head(output))
    return torch.cat(hidden_states), torch.cat(logits)


@pytest.mark.parametrize("variant", [pytest.param(variant, id=name) for name, variant in VARIANTS])
def test_hidden_states_and_logits_equal_those_of_transformers(variant):
    """D64, D65, D66: right architecture, rope read from both layouts, biases and head_dim as the checkpoint says."""
    model_dir = tiny_model(**variant)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(VOCAB_SIZE, (length,), generator=generator) for length in LENGTHS]
    exact = hf_outputs(model_dir, prompts, torch.float64)
    theirs = hf_outputs(model_dir, prompts, torch.float32)
    ours = our_outputs(model_dir, prompts)
    for name, our, their, truth in zip(("hidden states", "logits"), ours, theirs, exact, strict=True):
        their_error = (their - truth).abs().max()
        ulp = truth.abs().max() * torch.finfo(torch.float32).eps
        allowed = float(ERROR_RATIO * their_error + ULPS * ulp)
        assert_within(f"models: {name} against transformers", our, truth, allowed, f"{their_error} {ulp}")
        assert their_error <= 200 * ulp, f"{name}: the yardstick is no float32 error"
