"""load_tokenizer: the tokenizer of a checkpoint."""

import importlib.util
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

from nanovllm.model_config import ModelConfig
from nanovllm.models.registry import load_model_config
from nanovllm.omp_wait_policy import passive_omp_wait

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_SENTENCEPIECE = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}  # package -> module

logger = logging.getLogger("nanovllm")


def load_tokenizer(model_dir: Path, model_config: ModelConfig | None = None) -> Any:
    """The tokenizer that AutoTokenizer gives for the directory; None without tokenizer files.

    AutoTokenizer does not read config.json here, since it refuses values that nanovllm accepts. The keys that it needs
    come from model_config, which is read from model_dir if it is None.
    Raises ValueError if the tokenizer files cannot be read.
    """
    found = [name for name in _FILES if (model_dir / name).is_file()]
    if not found:
        logger.warning("%s has no tokenizer: prompts must be token ids, and outputs have no text", model_dir)
        return None
    if found == ["tokenizer.model"]:
        _require_sentencepiece(model_dir)
    model_config = model_config or load_model_config(model_dir)
    with passive_omp_wait():  # transformers imports torch
        from transformers import AutoConfig, AutoTokenizer  # takes a second to import

    try:
        config = AutoConfig.for_model(model_config.model_type, name_or_path=str(model_dir))
        config.tokenizer_class = model_config.tokenizer_class
        return AutoTokenizer.from_pretrained(str(model_dir), config=config, trust_remote_code=False)
    except Exception as error:  # the library raises various types for broken files
        raise ValueError(
            f"the tokenizer in {str(model_dir)!r} cannot be read: {error}; download its files again"
        ) from error


def _require_sentencepiece(model_dir: Path) -> None:
    """Raise ValueError unless the packages are installed that transformers needs for a tokenizer.model."""
    with suppress(ModuleNotFoundError):  # of the parent package
        if all(map(importlib.util.find_spec, _SENTENCEPIECE.values())):
            return
    raise ValueError(
        f"the tokenizer in {str(model_dir)!r} cannot be read: without a tokenizer.json, tokenizer.model needs "
        f"{' and '.join(_SENTENCEPIECE)} (nanovllm's extra [sentencepiece]), which are not installed; "
        f"pip install {' '.join(_SENTENCEPIECE)}"
    )
