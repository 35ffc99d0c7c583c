"""load_tokenizer: a directory without one, with a broken one, and with one that wants to run its own code."""

import logging
from pathlib import Path

import pytest

from nanovllm.engine.tokenizer import load_tokenizer


def test_a_directory_without_a_tokenizer_is_said_once_and_gives_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "nanovllm"):
        assert load_tokenizer(tmp_path) is None
    assert caplog.messages == [f"{tmp_path} has no tokenizer: prompts must be token ids, and outputs have no text"]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.json"])
def test_a_broken_tokenizer_is_an_error_that_names_the_directory(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{")
    with pytest.raises(ValueError, match=f"^the tokenizer in '{tmp_path}' cannot be read: ."):
        load_tokenizer(tmp_path)


def test_code_that_comes_with_a_tokenizer_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor does anybody ask on the terminal whether to run it."""
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["code.Tokenizer", null]}}')
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')\nclass Tokenizer: pass\n")
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "was_run").exists()
    assert capsys.readouterr().out == ""
