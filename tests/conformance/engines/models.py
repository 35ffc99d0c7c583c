"""The checkpoints of the contracts, and how a script spells each: its folder goes when the run ends."""

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

from tests.support.source_tree import ROOT
from tests.support.tiny_models import EOS_TOKEN_ID, tiny_model

BUNDLED = ROOT / "nanovllm" / "assets" / "bundled_model"
TINY = {"head_dim": 32, "max_position_embeddings": 1024}
_sources: dict[Path, str] = {}


def tiny(architecture: str, dtype: str = "float32", ends: tuple[int, ...] = (EOS_TOKEN_ID,)) -> Path:
    """A random model of two layers. Its head_dim and its length suit the kernels of engines on a GPU too.

    ends: eos_token_id of its config.json and generation_config.json, a list if there are several.
    """
    is_default = ends == (EOS_TOKEN_ID,)
    options = TINY if is_default else {**TINY, "eos_token_id": ends}
    source = f"tiny({architecture!r}, {dtype!r}{'' if is_default else f', {ends}'})"
    return _named(source, tiny_model(architecture, **options, dtype=dtype))


@functools.cache
def bundled(dtype: str = "float32") -> Path:
    """The bundled model; in another dtype than its own a copy whose config.json says so."""
    config = json.loads((BUNDLED / "config.json").read_text())
    source = f"bundled({dtype!r})"
    if config["dtype"] == dtype:
        return _named(source, BUNDLED)
    folder = Path(tempfile.mkdtemp(prefix="nanovllm-bundled-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    shutil.copytree(BUNDLED, folder, dirs_exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, "dtype": dtype, "torch_dtype": dtype}))
    return _named(source, folder)


def source_of(model_dir: Path) -> str:
    """Source of the path of a checkpoint of this module; of another one, its path."""
    return _sources.get(model_dir, repr(model_dir.as_posix()))


def _named(source: str, folder: Path) -> Path:
    _sources[folder] = f"str({source})"
    return folder
