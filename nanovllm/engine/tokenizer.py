"""Loading a checkpoint's tokenizer."""

import logging
from pathlib import Path
from typing import Any

from nanovllm.thread_waiting import sleeping_threads

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")

logger = logging.getLogger("nanovllm")


def load_tokenizer(model_dir: Path) -> Any:
    """The directory's transformers tokenizer; None if it has no tokenizer files (prompts are then token ids only).

    Raises ValueError when the files are there and cannot be read.
    """
    if not any((model_dir / name).is_file() for name in _FILES):
        logger.warning("%s has no tokenizer: prompts must be token ids, and outputs have no text", model_dir)
        return None
    with sleeping_threads():  # transformers imports torch
        from transformers import AutoTokenizer  # takes a second to import

    try:
        return AutoTokenizer.from_pretrained(str(model_dir), trust_remote_code=False)
    except Exception as error:  # whatever the library raises on a broken file
        raise ValueError(f"the tokenizer in {str(model_dir)!r} cannot be read: {error}") from error
