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
from tests.support.hugging_face import hugging_face_logits
from tests.support.tiny_models import VARIANTS, VOCAB_SIZE, tiny_model

ERROR_RATIO = 4
ULPS = 8
LENGTHS = (1, 40, 97)  # packed into one prefill; the last is beyond original_max_position_embeddings


def our_logits(model_dir, prompts):
    """Logits of whole prompts, packed, with nothing cached and nothing stored."""
    model = build_model(load_model_config(model_dir), TORCH_OPS)
    load_model(model, model_dir, use_tqdm=False)
    bounds, longest = torch.tensor([0, *LENGTHS]).cumsum(0).int(), max(LENGTHS)
    no_slots, context_lens = torch.full((sum(LENGTHS),), -1), torch.tensor(LENGTHS).int()
    context = Context(True, no_slots, bounds, bounds, longest, longest, context_lens, None)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    with torch.no_grad(), set_context(context):
        return model.compute_logits(model(torch.cat(prompts), positions))


@pytest.mark.parametrize("variant", [pytest.param(variant, id=name) for name, variant in VARIANTS])
def test_logits_equal_those_of_transformers(variant):
    """D64, D65, D66: right architecture, rope read from both layouts, biases and head_dim as the checkpoint says."""
    model_dir = tiny_model(**variant)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(VOCAB_SIZE, (length,), generator=generator) for length in LENGTHS]
    exact, theirs = (
        torch.cat([hugging_face_logits(model_dir, prompt.tolist(), dtype) for prompt in prompts])
        for dtype in (torch.float64, torch.float32)
    )
    their_error = (theirs - exact).abs().max()
    ulp = exact.abs().max() * torch.finfo(torch.float32).eps
    assert their_error <= 200 * ulp, "the yardstick is no float32 error"
    allowed = float(ERROR_RATIO * their_error + ULPS * ulp)
    assert_within("models: logits against transformers", our_logits(model_dir, prompts), exact, allowed)
