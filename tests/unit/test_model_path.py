"""local_model_dir: a directory as it is, a hub id by download, and an error with a remedy for everything else."""

import errno
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from nanovllm.model_path import local_model_dir
from tests.support.programs import run_python


def test_a_directory_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert local_model_dir(str(tmp_path)) == tmp_path
    (tmp_path / "Qwen" / "Qwen3-0.6B").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert local_model_dir("Qwen/Qwen3-0.6B") == Path("Qwen/Qwen3-0.6B"), "a local directory goes before the hub"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_model_dir("~/Qwen") == tmp_path / "Qwen"
    (tmp_path / "~nobody-of-this-name").mkdir()
    assert local_model_dir("~nobody-of-this-name") == Path("~nobody-of-this-name")


def test_a_hub_id_is_downloaded_without_code_and_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(model_id: str, **patterns: list[str]) -> str:
        asked.update(model_id=model_id, patterns=patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert local_model_dir("Qwen/Qwen3-0.6B") == tmp_path
    assert asked["model_id"] == "Qwen/Qwen3-0.6B"
    wanted = ["model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json"]
    wanted += ["tokenizer.model", "chat_template.jinja"]
    unwanted = ["model.py", "pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl", "model.gguf"]
    unwanted += ["consolidated.safetensors", "checkpoint-500/model.safetensors", "onnx/decoder.safetensors"]
    assert list(filter_repo_objects([*wanted, *unwanted], **asked["patterns"])) == wanted


@pytest.mark.parametrize(
    "model",
    [
        "model",
        "/no/such/place",
        "~nobody-of-this-name/x",
        "./nothing",
        "a/b/c",
        "../x/y",
        "some/..",
        "a b/c",
        "a" * 5000,
    ],
)
def test_neither_a_directory_nor_a_hub_id_is_refused(model: str) -> None:
    with pytest.raises(ValueError, match=r"must be an existing directory or a hub id such as 'Qwen/Qwen3-0.6B', got"):
        local_model_dir(model)


def hub_error(name: str, base: type[Exception] = OSError) -> Exception:
    """An exception with the name of one of huggingface_hub's, whose constructors differ between versions."""
    return type(name, (base,), {})("the hub's words")


OFFLINE = hub_error("LocalEntryNotFoundError")
CHECK_NETWORK = "check the network connection, or give a local directory"


@pytest.mark.parametrize(
    ("error", "variables", "remedy"),
    [
        (hub_error("UnsupportedProtocol", Exception), {"HF_ENDPOINT": "x"}, "check HF_ENDPOINT='x' or unset it, or"),
        (hub_error("ConnectError", Exception), {}, CHECK_NETWORK),
        (TypeError("a client that changed"), {}, CHECK_NETWORK),
        (OFFLINE, {"HF_HUB_OFFLINE": "1"}, "unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE"),
        (OFFLINE, {"HF_HUB_OFFLINE": "0"}, CHECK_NETWORK),
        (hub_error("GatedRepoError"), {}, "licence at https://huggingface.co/some/model, then log in with `hf auth"),
        (hub_error("RepositoryNotFoundError"), {}, "check the spelling; for a private model, log in"),
        (OSError(errno.ENOSPC, "No space left on device"), {}, "free disk space, or set HF_HOME"),
        (PermissionError(errno.EACCES, "Permission denied", "/cache"), {}, "set HF_HOME to a directory that you may"),
        (OSError("<p>\n" * 100_000), {}, " ...; " + CHECK_NETWORK),  # a page of HTML is cut
    ],
)
def test_every_error_of_the_hub_is_a_value_error_with_a_remedy(error, variables, remedy, monkeypatch) -> None:
    """D92: a wrong HF_ENDPOINT raised an exception of the HTTP library."""

    def refuse(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    for name in ("HF_ENDPOINT", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"^model must be .*, got 'some/model'") as caught:
        local_model_dir("some/model")
    assert remedy in str(caught.value)
    assert str(error)[:20].split("\n")[0] in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("endpoint", ["notaurl", "ftp://localhost", "http://127.0.0.1:1", "http://[", ""])
def test_a_wrong_endpoint_is_one_line_at_the_command_line(endpoint: str, tmp_path: Path) -> None:
    """D92: with the hub's own client, which reads the variable when it is imported."""
    variables = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0" if endpoint else "1", "HF_HOME": str(tmp_path)}
    result = run_python("-m", "nanovllm", "generate", "--model", "some/model", "x", **variables)
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("nanovllm: error: --model must be ")
