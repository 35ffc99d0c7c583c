"""The supported architectures: each file of this package that is not one of the shared files states one.

Neither this module nor the files of the architectures import torch, since LLMEngine reads a model's configuration
before torch is imported.
"""

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path

from nanovllm import models
from nanovllm.model_config import Architecture, ModelConfig, read_model_config

SHARED_FILES = {"decoder", "loader", "registry"}


@functools.cache
def architectures() -> Mapping[str, Architecture]:
    """model_type -> the ARCHITECTURE of a file in this package, for all such files, in the order of their names."""
    names = [module.name for module in pkgutil.iter_modules(models.__path__) if module.name not in SHARED_FILES]
    found = [importlib.import_module(f"{models.__name__}.{name}").ARCHITECTURE for name in sorted(names)]
    return {architecture.model_type: architecture for architecture in found}


def load_model_config(model_dir: str | Path) -> ModelConfig:
    """The configuration of the checkpoint in model_dir. Raises ValueError: see read_model_config."""
    return read_model_config(model_dir, architectures())
