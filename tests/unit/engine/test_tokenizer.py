"""load_tokenizer: the tokenizer that AutoTokenizer gives, whatever config.json holds; and tokenizers that are broken,
missing, or want to run their own code.
"""

import importlib.util
import itertools
import logging
from pathlib import Path
from typing import Any

import pytest

from nanovllm import bundled_model_path
from nanovllm.engine.tokenizer import _require_sentencepiece, load_tokenizer
from nanovllm.models.registry import load_model_config
from tests.support.checkpoints import small_config
from tests.support.counts import count_comparisons
from tests.support.tiny_models import ABSENT, ARCHITECTURES, copy_model, tiny_model

TEXT = "In the beginning <eos> was\n the Word, \u00e9\u4e2d <|im_end|> "


def test_a_directory_without_a_tokenizer_is_said_once_and_gives_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "nanovllm"):
        assert load_tokenizer(tmp_path, small_config()) is None
    assert caplog.messages == [f"{tmp_path} has no tokenizer: prompts must be token ids, and outputs have no text"]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.json"])
def test_a_broken_tokenizer_is_an_error_that_names_the_directory(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{")
    with pytest.raises(ValueError, match=f"^the tokenizer in '{tmp_path}' cannot be read: .*; ."):
        load_tokenizer(tmp_path, small_config())


def test_code_that_comes_with_a_tokenizer_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor is the user asked whether to run it."""
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["code.Tokenizer", null]}}')
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')\nclass Tokenizer: pass\n")
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer(tmp_path, small_config())
    assert not (tmp_path / "was_run").exists()
    assert capsys.readouterr().out == ""


def state_of(tokenizer: Any) -> dict[str, Any]:
    """What users see of a tokenizer."""
    token_ids = tokenizer.encode(TEXT)
    names = ("special_tokens_map", "eos_token_id", "model_max_length", "chat_template")
    return {
        "class": type(tokenizer),
        "token_ids": token_ids,
        "text": tokenizer.decode(token_ids, skip_special_tokens=True),
        "serialised": tokenizer.backend_tokenizer.to_str(),
        **{name: getattr(tokenizer, name) for name in names},
    }


CLASSES = ["PreTrainedTokenizerFast", "LlamaTokenizer", "Qwen2TokenizerFast"]
FILES = ["tokenizer_config", "config"]


@pytest.mark.parametrize("named", ["as it was made", "nowhere", *itertools.product(FILES, CLASSES)], ids=str)
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "bundled"])
def test_it_is_the_tokenizer_that_auto_tokenizer_gives(
    tmp_path: Path, architecture: str, named: str | tuple[str, str]
) -> None:
    """D90: whether tokenizer_config.json, config.json or the model's type determines the class."""
    from transformers import AutoTokenizer

    changes: dict[str, dict[str, Any]] = {"tokenizer_config": {}, "config": {}}
    if named != "as it was made":
        changes["tokenizer_config"] = {"tokenizer_class": ABSENT, "chat_template": "{{ messages }}"}
    if isinstance(named, tuple):
        file, tokenizer_class = named
        changes[file]["tokenizer_class"] = tokenizer_class
    source = bundled_model_path() if architecture == "bundled" else tiny_model(architecture)
    model_dir = copy_model(source, tmp_path / "model", **changes)
    expected = state_of(AutoTokenizer.from_pretrained(str(model_dir)))
    assert state_of(load_tokenizer(model_dir, load_model_config(model_dir))) == expected
    count_comparisons("tokenizer: state against AutoTokenizer", len(expected))


LENIENT = [
    {"attention_bias": None},
    {"tie_word_embeddings": None},
    {"max_position_embeddings": 512.0},
    {"hidden_size": 64.0},
    {"rms_norm_eps": 1},
    {"use_cache": "yes"},
    {"rope_parameters": {"rope_type": "linear", "factor": 2}},
    {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
    {"eos_token_id": -1},
    {"auto_map": {"AutoConfig": "code.Config"}},
    {"transformers_version": None},
]


@pytest.mark.parametrize("changes", LENIENT, ids=lambda changes: "-".join(changes))
@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_a_config_that_we_read_leaves_the_tokenizer_as_it_is(
    tmp_path: Path, architecture: str, changes: dict[str, Any]
) -> None:
    """D90: AutoTokenizer refuses some of these, as if the tokenizer were broken."""
    expected = state_of(load_tokenizer(tiny_model(architecture)))
    assert (
        state_of(load_tokenizer(copy_model(tiny_model(architecture), tmp_path / "model", config=changes))) == expected
    )


@pytest.mark.parametrize("missing", ["sentencepiece", "google.protobuf", "google"])
def test_what_a_tokenizer_model_needs_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, caplog: pytest.LogCaptureFixture
) -> None:
    """D89: both packages and the extra, at once."""

    def find_spec(name: str) -> object | None:
        if missing == "google" and name.startswith("google."):
            raise ModuleNotFoundError(name)  # the parent of a dotted name does not exist
        return None if name == missing else object()

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a")
    with pytest.raises(
        ValueError, match=r"without a tokenizer\.json, tokenizer\.model needs sentencepiece and"
    ) as caught:
        load_tokenizer(tmp_path, small_config())
    assert "(nanovllm's extra [sentencepiece])" in str(caught.value)
    assert str(caught.value).endswith("pip install sentencepiece protobuf")
    assert caplog.messages == []
    missing = "neither"
    _require_sentencepiece(tmp_path)  # no error


def test_a_tokenizer_json_needs_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """D89"""
    copy_model(tiny_model("llama"), tmp_path / "model")
    (tmp_path / "model" / "tokenizer.model").write_bytes(b"\x0a")
    monkeypatch.setattr("nanovllm.engine.tokenizer._require_sentencepiece", None)  # a call would fail
    assert load_tokenizer(tmp_path / "model").eos_token_id == 256
