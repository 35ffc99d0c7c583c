"""Where a model's files are: a local directory, or a download from the Hugging Face hub."""

import re
from pathlib import Path

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Only these are fetched: weights in safetensors, configuration, tokenizer. No pickles, no code.
_HUB_FILES = ["*.safetensors", "*.json", "tokenizer.model", "merges.txt", "vocab.txt", "*.jinja"]


def local_model_dir(model: str) -> Path:
    """The directory of `model`, a path or a hub id; the latter is downloaded, or taken from the hub's cache.

    Raises ValueError when `model` is neither a directory nor a hub id that can be had.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"model must be a directory or a hub id, got the file {model!r}; give the directory it is in")
    if not _HUB_ID.fullmatch(model) or ".." in model:
        raise ValueError(
            f"model must be an existing directory or a hub id such as 'Qwen/Qwen3-0.6B', got {model!r}; check the path"
        )
    return _download(model)


def _download(model_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model_id, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"model must be an existing directory or a hub id that can be downloaded, got {model_id!r}: there is no "
            f"such directory, and the hub said: {error}"
        ) from error
