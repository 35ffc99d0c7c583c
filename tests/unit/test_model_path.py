"""local_model_dir: a directory as it is, a hub id by download, and a clear word for everything else."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from nanovllm.model_path import local_model_dir


def test_a_directory_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert local_model_dir(str(tmp_path)) == tmp_path
    (tmp_path / "Qwen" / "Qwen3-0.6B").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert local_model_dir("Qwen/Qwen3-0.6B") == Path("Qwen/Qwen3-0.6B"), "a local directory goes before the hub"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_model_dir("~/Qwen") == tmp_path / "Qwen"


def test_a_hub_id_is_downloaded_without_code_and_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(model_id: str, *, allow_patterns: list[str]) -> str:
        asked.update(model_id=model_id, allow_patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert local_model_dir("Qwen/Qwen3-0.6B") == tmp_path
    assert asked["model_id"] == "Qwen/Qwen3-0.6B"
    assert {"*.safetensors", "*.json"} <= set(asked["allow_patterns"])
    unwanted = ["model.py", "pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl", "model.gguf"]
    assert not any(Path(name).match(pattern) for name in unwanted for pattern in asked["allow_patterns"])


def test_what_the_hub_says_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("no network, and not in the cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ValueError, match=r"'some/model'.*no network, and not in the cache"):
        local_model_dir("some/model")


@pytest.mark.parametrize("model", ["model", "/no/such/place", "./nothing", "a/b/c", "../x/y", "some/..", "a b/c"])
def test_what_is_neither_is_refused(model: str) -> None:
    with pytest.raises(ValueError, match=r"must be an existing directory or a hub id such as 'Qwen/Qwen3-0.6B', got"):
        local_model_dir(model)
