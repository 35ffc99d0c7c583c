"""The bundled model: a small Qwen3 that ships with the package, so that a fresh machine has something to run."""

from importlib.resources import files
from pathlib import Path


def bundled_model_path() -> Path:
    """The bundled model's directory, a Hugging Face checkpoint. Raises FileNotFoundError if it was not installed."""
    path = Path(str(files(__name__) / "bundled_model"))
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"the bundled model is missing from this installation: no config.json in {path}")
    return path
