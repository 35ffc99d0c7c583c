"""Text of an engine's outputs, from generate and the stream, with special tokens and with byte tokens.

tests/unit/engine/test_text_of_tokenizers.py has stop strings and other vocabularies.
"""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from nanovllm import LLM, SamplingParams
from tests.e2e.conftest import bundled_llm, contents, joined
from tests.support.tiny_models import tiny_model
from tests.unit.engine.text_tokenizers import byte_fallback

IM_END = 257


def model_that_says(directory: Path, tokens: list[int]) -> Path:
    """A tiny model that says `tokens[i + 1]` after `tokens[i]`, and "<|im_end|>" as a special token 257."""
    from safetensors.torch import load_file, save_file
    from tokenizers import AddedToken, Tokenizer

    shutil.copytree(tiny_model("llama"), directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    assert tokenizer.token_to_id("<|im_end|>") == IM_END
    tokenizer.save(str(directory / "tokenizer.json"))
    weights = load_file(directory / "model.safetensors")
    for name, weight in weights.items():
        if ("layers" in name and "norm" not in name) or "embed" in name or "lm_head" in name:
            weight.zero_()
    for row, (token, following) in enumerate(itertools.pairwise(tokens)):
        weights["model.embed_tokens.weight"][token, row] = weights["lm_head.weight"][following, row] = 1
    save_file({name: torch.clone(weight) for name, weight in weights.items()}, directory / "model.safetensors")
    return directory


def said(llm: LLM, prompt: list[int], **options: Any) -> tuple[str, str, list[int]]:
    """Text, finish reason and tokens, on which generate and generate_stream must agree."""
    params = SamplingParams.greedy(**options)
    (output,) = contents(llm.generate([prompt], params, use_tqdm=False))
    assert joined(llm.generate_stream([prompt], params)) == [output]
    return output["text"], output["finish_reason"], output["token_ids"]


def test_special_token_that_is_also_the_end_of_sequence(tmp_path: Path) -> None:
    """D83: with ignore_eos the stop string ends the request, without it either does."""
    directory = model_that_says(tmp_path / "m", [70, 71, IM_END, 72, 73])
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": IM_END}))
    with bundled_llm(directory) as llm:
        for options in ({}, {"stop": "<|im_end|>"}, {"stop": "<|im_end|>", "ignore_eos": True}):
            assert said(llm, [70], max_tokens=3, **options) == ("h", "stop", [71, IM_END])
        assert said(llm, [70], max_tokens=3, ignore_eos=True) == ("hi", "length", [71, IM_END, 72])


def test_text_of_a_byte_fallback_vocabulary_follows_the_prompt(tmp_path: Path) -> None:
    """D82, D84: the space of the first word is there, a character that max_tokens cuts is one U+FFFD."""
    known = byte_fallback()
    completion = [known.id_of(token) for token in (b" the", b" a", b"\n", b"\xf0", b"\x9f")]
    prompt = [known.id_of("<s>"), known.tokenizer.convert_tokens_to_ids("b")]
    directory = model_that_says(tmp_path / "m", [prompt[-1], *completion])
    for path in directory.glob("tokenizer*"):
        path.unlink()
    known.tokenizer.save_pretrained(directory)
    with bundled_llm(directory) as llm:
        assert said(llm, prompt, max_tokens=5) == (" the a\n\ufffd", "length", completion)
        assert llm.generate("b", SamplingParams.greedy(max_tokens=2), use_tqdm=False)[0]["text"] == " the a"
        assert said(llm, prompt[1:] + completion[:1], max_tokens=1) == (" a", "length", completion[1:2])
