"""checkpoint, transformer and generate against transformers and safetensors, on tiny models with random weights.

The reference computes in float64. transformers, asked for float64, still computes norms, the router's softmax and
rotary angles in float32, whose relative rounding is 2**-24 = 6e-8; an angle of 40 radians is off by 40 * 6e-8 = 2.4e-6.
With logits of size 1 to 10 behind two or three layers, 1e-4 bounds what that can do (seen: below 2e-5). A forgotten
bias, norm or scaling changes them by more than 1.
"""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from reference.checkpoint import Checkpoint, load_checkpoint
from reference.generate import generate
from reference.sampling import sampling
from reference.transformer import transformer
from tests.support.comparing import assert_close
from tests.support.hugging_face import hugging_face_logits
from tests.support.tiny_models import VARIANTS, copy_model, tiny_model

BOUND = 1e-4
THETA = {"rope_theta": 100.0}  # so that the frequencies of a small head differ within 40 positions
TOKEN_IDS = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(1)).tolist()
YARN = {"rope_type": "yarn", "factor": 4.0, **THETA}
TRAINED = {"original_max_position_embeddings": 64}
YARN_OPTIONS: list[dict[str, Any]] = [
    {"attention_factor": 1.5, **TRAINED},
    {"beta_fast": 8.0, "beta_slow": 2.0, **TRAINED},
    {"truncate": False, **TRAINED},
    {"mscale": 1.0, "mscale_all_dim": 0.5, **TRAINED},
    {"original_max_position_embeddings": 4096},  # some pairs are left as they are
    {},  # the trained length is max_position_embeddings
]


def logits_of(checkpoint: Checkpoint) -> torch.Tensor:
    return transformer(TOKEN_IDS, *checkpoint)


def check_logits(folder: Path) -> None:
    actual = logits_of(load_checkpoint(folder, torch.float64))
    assert actual.dtype == torch.float64
    expected = hugging_face_logits(folder, TOKEN_IDS, torch.float64)
    assert_close("reference: logits against transformers", actual, expected, rtol=0, atol=BOUND)


@pytest.mark.parametrize("variant", [variant for _, variant in VARIANTS], ids=[name for name, _ in VARIANTS])
def test_logits_are_those_of_transformers(variant: dict[str, Any]) -> None:
    """D64, D65, D66: every architecture, rope type, option and layout of config.json."""
    check_logits(tiny_model(**variant | THETA))


@pytest.mark.parametrize("options", YARN_OPTIONS, ids=str)
def test_logits_with_the_options_of_yarn(options: dict[str, Any], tmp_path: Path) -> None:
    check_logits(copy_model(tiny_model("llama"), tmp_path / "copy", config={"rope_parameters": {**YARN, **options}}))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_safetensors_are_read_as_their_own_library_reads_them(dtype: str) -> None:
    folder = tiny_model("qwen2", dtype=dtype)
    weights, _ = load_checkpoint(folder, getattr(torch, dtype))
    expected = safetensors.torch.load_file(folder / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in expected.items())


def test_the_ids_that_end_a_text_come_from_both_files(tmp_path: Path) -> None:
    """D70."""
    ids = {"config": {"eos_token_id": 60}, "generation_config": {"eos_token_id": [3, 5]}}
    assert load_checkpoint(copy_model(tiny_model("llama"), tmp_path / "copy", **ids)).config.eos_token_ids == {3, 5, 60}


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return load_checkpoint(tiny_model("qwen3", **THETA), torch.float64)


def test_each_token_is_sampled_from_the_logits_after_the_text_so_far(checkpoint: Checkpoint) -> None:
    prompt, options = TOKEN_IDS[:5], {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "seed": 5}
    result = generate(checkpoint, prompt, max_tokens=10, ignore_eos=True, **options)
    once = transformer([*prompt, *result.token_ids], *checkpoint)
    torch.testing.assert_close(result.logits, once[4:14], rtol=0, atol=1e-11)
    again = [sampling(row, **options, position=5 + i) for i, row in enumerate(result.logits)]
    assert result.token_ids == again
    assert generate(checkpoint, prompt, 10, ignore_eos=True, **{**options, "seed": 6}).token_ids != again


def test_where_a_text_ends(checkpoint: Checkpoint) -> None:
    prompt = TOKEN_IDS[:5]
    free = generate(checkpoint, prompt, max_tokens=8, top_k=1, ignore_eos=True)
    first = free.token_ids[3]
    cut = free.token_ids.index(first) + 1
    assert (len(free.token_ids), free.finish_reason) == (8, "length")
    for ending in ({"stop_token_ids": [first], "ignore_eos": True}, {"eos_token_ids": [59, first]}):
        stopped = generate(checkpoint, prompt, max_tokens=8, top_k=1, **ending)
        assert (stopped.token_ids, stopped.finish_reason) == (free.token_ids[:cut], "stop")
    ignored = generate(checkpoint, prompt, max_tokens=8, top_k=1, eos_token_ids=[first], ignore_eos=True)
    assert ignored.token_ids == free.token_ids
    capped = generate(checkpoint, prompt, max_tokens=8, top_k=1, ignore_eos=True, max_model_len=7)
    assert (capped.token_ids, capped.finish_reason) == (free.token_ids[:2], "length")
