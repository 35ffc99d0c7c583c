"""Text of an engine's outputs, from generate and the stream, with special tokens and with byte tokens."""

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams
from tests.e2e.conftest import BUNDLED_OPTIONS
from tests.support.tiny_models import tiny_model
from tests.unit.engine.text_tokenizers import byte_fallback

IM_END = 257
SAID = [71, 72, IM_END, 198, 73, 74]


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


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """Says "hi<|im_end|>\\njk" after "g"."""
    directory = model_that_says(tmp_path_factory.mktemp("talking") / "m", [70, *SAID, 75])
    with LLM(str(directory), **BUNDLED_OPTIONS) as llm:
        assert llm.tokenizer.decode([70, *SAID]) == "ghi<|im_end|>\njk"
        yield llm


def both_ways(llm: LLM, prompt: list[int], **options: Any) -> tuple[str, str | None, list[int]]:
    """Text, finish reason and tokens, which generate and generate_stream must agree on."""
    params = SamplingParams.greedy(**options)
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    items = list(llm.generate_stream([prompt], params))
    streamed = "".join(item["text"] for item in items), items[-1]["finish_reason"]
    assert streamed == (output["text"], output["finish_reason"])
    assert [token_id for item in items for token_id in item["token_ids"]] == output["token_ids"]
    return output["text"], output["finish_reason"], output["token_ids"]


@pytest.mark.parametrize("ignore_eos", [False, True])
@pytest.mark.parametrize("stop", ["<|im_end|>", ["<|im_end|>"], ["no", "<|im_end|>", "i<|im_end|>no"]])
def test_stop_string_that_is_a_special_token(talking: LLM, stop: Any, ignore_eos: bool) -> None:
    """D83: it ends the text as any other stop string; its token is the last of token_ids."""
    expected = "hi", "stop", [71, 72, IM_END]
    assert both_ways(talking, [70], max_tokens=6, stop=stop, ignore_eos=ignore_eos) == expected


def test_stop_string_of_a_special_token_and_text(talking: LLM) -> None:
    """D83."""
    assert both_ways(talking, [70], max_tokens=6, stop="hi<|im_end|>\n") == ("", "stop", SAID[:4])
    assert both_ways(talking, [70], max_tokens=6, stop="i\n") == ("h", "stop", SAID[:4]), "as the text shows it"
    assert both_ways(talking, [70], max_tokens=6, stop=["<|im_end|>jk", "im_end"]) == ("hi\njk", "length", SAID)


def test_special_token_that_is_also_the_end_of_sequence(tmp_path: Path) -> None:
    """D83: with ignore_eos the stop string ends the request, without it either does."""
    directory = model_that_says(tmp_path / "m", [70, 71, IM_END, 72, 73])
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": IM_END}))
    with LLM(str(directory), **BUNDLED_OPTIONS) as llm:
        for options in ({}, {"stop": "<|im_end|>"}, {"stop": "<|im_end|>", "ignore_eos": True}):
            assert both_ways(llm, [70], max_tokens=3, **options) == ("h", "stop", [71, IM_END])
        assert both_ways(llm, [70], max_tokens=3, ignore_eos=True) == ("hi", "length", [71, IM_END, 72])


def test_text_of_a_byte_fallback_vocabulary_follows_the_prompt(tmp_path: Path) -> None:
    """D82, D84: the space of the first word is there, a character that max_tokens cuts is one U+FFFD."""
    known = byte_fallback()
    said = [known.id_of(token) for token in (b" the", b" a", b"\n", b"\xf0", b"\x9f")]
    prompt = [known.id_of("<s>"), known.tokenizer.convert_tokens_to_ids("b")]
    directory = model_that_says(tmp_path / "m", [prompt[-1], *said])
    for path in directory.glob("tokenizer*"):
        path.unlink()
    known.tokenizer.save_pretrained(directory)
    with LLM(str(directory), **BUNDLED_OPTIONS) as llm:
        assert both_ways(llm, prompt, max_tokens=5) == (" the a\n\ufffd", "length", said)
        assert llm.generate("b", SamplingParams.greedy(max_tokens=2), use_tqdm=False)[0]["text"] == " the a"
        assert both_ways(llm, prompt[1:] + said[:1], max_tokens=1) == (" a", "length", said[1:2])


def test_text_of_sampled_tokens_is_that_of_their_bytes(tmp_path: Path) -> None:
    """D82, D84: any tokens, ids without a token among them."""
    known = byte_fallback()
    directory = tmp_path / "m"
    shutil.copytree(tiny_model("llama"), directory)
    for path in directory.glob("tokenizer*"):
        path.unlink()
    known.tokenizer.save_pretrained(directory)
    prompts = [[known.id_of("<s>"), known.id_of(b"b"), 3 * index] for index in range(20)]
    params = [SamplingParams(max_tokens=24, seed=seed, temperature=5.0, ignore_eos=True) for seed in range(20)]
    with LLM(str(directory), **BUNDLED_OPTIONS) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        texts = [""] * len(prompts)
        for item in llm.generate_stream(prompts, params):
            texts[item["index"]] += item["text"]
    assert texts == [output["text"] for output in outputs]
    for prompt, output in zip(prompts, outputs, strict=True):
        with_a_token = [token_id for token_id in output["token_ids"] if token_id < len(known.token_bytes)]
        assert output["text"] == known.text_after(prompt, with_a_token)
