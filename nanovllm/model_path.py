"""Finds a model's directory: a local one, or a download from the Hugging Face hub."""

import errno
import os
import re
from pathlib import Path

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Only these are downloaded: weights in safetensors, configuration, tokenizer; neither pickles nor code.
_HUB_FILES = ["*.safetensors", "*.json", "tokenizer.model", "merges.txt", "vocab.txt", "*.jinja"]
# Weights that are not read, as large as those that are: of earlier checkpoints, and in the layout of their authors.
_OTHER_WEIGHTS = ["*/*.safetensors", "consolidated*.safetensors"]
_MAX_REASON_CHARS = 500


def local_model_dir(model: str) -> Path:
    """The directory of `model`, a path or a hub id. A model of the hub is downloaded unless it is in the hub's cache.

    Raises ValueError if `model` is neither a directory nor a hub id that can be downloaded.
    """
    path = Path(os.path.expanduser(model))  # Path.expanduser raises RuntimeError for a user that does not exist
    if os.path.isdir(path):  # Path.is_dir raises OSError for a name that is too long
        return path
    if os.path.exists(path):
        raise ValueError(f"model must be a directory or a hub id, got the file {model!r}; give the directory it is in")
    if not _HUB_ID.fullmatch(model) or ".." in model:
        raise ValueError(
            f"model must be an existing directory or a hub id such as 'Qwen/Qwen3-0.6B', got {model!r}; check the path"
        )
    return _download(model)


def _download(model_id: str) -> Path:
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model_id, allow_patterns=_HUB_FILES, ignore_patterns=_OTHER_WEIGHTS))
    except Exception as error:  # from the hub's client, its HTTP library, the network or the disk
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        if len(reason) > _MAX_REASON_CHARS:  # some servers reply with a page of HTML
            reason = reason[:_MAX_REASON_CHARS] + " ..."
        raise ValueError(
            f"model must be an existing directory or a hub id that can be downloaded, got {model_id!r}: there is no "
            f"such directory, and the download failed: {reason}; {_remedy(model_id, error)}"
        ) from error


def _remedy(model_id: str, error: Exception) -> str:
    # Names, since the hub's client and its HTTP library move their classes between modules
    kinds = {kind.__name__ for kind in type(error).__mro__}
    page = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}/{model_id}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free disk space, or set HF_HOME to a directory on another disk"
    if isinstance(error, PermissionError):
        return "set HF_HOME to a directory that you may write to"
    if "GatedRepoError" in kinds:
        return f"accept the model's licence at {page}, then log in with `hf auth login` or set HF_TOKEN"
    if "RepositoryNotFoundError" in kinds:
        return "check the spelling; for a private model, log in with `hf auth login` or set HF_TOKEN"
    offline = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    if any(value.upper() in ("1", "ON", "YES", "TRUE") for value in offline):
        return "unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE to download it, or give a local directory"
    if "HF_ENDPOINT" in os.environ:
        return f"check HF_ENDPOINT={os.environ['HF_ENDPOINT']!r} or unset it, or give a local directory"
    return "check the network connection, or give a local directory"
