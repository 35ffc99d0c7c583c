"""Which model a trace was recorded with: how to find or make it again, and a checksum that says whether it is that one.

{"bundled": true, "sha256": ...}      the bundled model
{"tiny": "llama", "variant": {...}, "sha256": ...}      tests.tiny_models.tiny_model("llama", **variant)
{"path": "/models/x", "sha256": ...}      any other directory
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from nanovllm import bundled_model_path
from tests.replay.trace import TraceError


def identify(model: Path) -> dict[str, Any]:
    """What locate() needs to find the model again."""
    from tests.tiny_models import recipe_of  # imports torch, as whoever has an engine did

    recipe = recipe_of(model)
    if model == bundled_model_path():
        identity: dict[str, Any] = {"bundled": True}
    elif recipe is not None:
        identity = {"tiny": recipe[0], "variant": recipe[1]}
    else:
        identity = {"path": str(model)}
    return {**identity, "sha256": checksum(model) if model.is_dir() else None}


def locate(identity: dict[str, Any]) -> Path:
    """The model's directory. Raises TraceError when it is gone, or its weights are others now."""
    if identity.get("bundled"):
        model = bundled_model_path()
    elif "tiny" in identity:
        from tests.tiny_models import tiny_model

        model = tiny_model(identity["tiny"], **{name: _as_given(value) for name, value in identity["variant"].items()})
    else:
        model = Path(identity["path"])
    if not model.is_dir():
        raise TraceError(f"the trace's model {model} is not there; --replay-device none replays the decisions alone")
    if checksum(model) != identity["sha256"]:
        raise TraceError(
            f"the weights in {model} are not those the trace was recorded with (sha256 {identity['sha256']}): its "
            "tokens mean nothing here; --replay-device none replays the decisions alone"
        )
    return model


def checksum(model: Path) -> str:
    """SHA-256 of names, dtypes, shapes and values of the weights, whatever files and order they are stored in."""
    digest = hashlib.sha256()
    entries = [entry for file in model.glob("*.safetensors") for entry in _tensors(file)]
    for name, dtype, shape, values in sorted(entries):
        digest.update(f"{name} {dtype} {shape} ".encode())
        digest.update(values)
    return digest.hexdigest()


def _tensors(file: Path) -> list[tuple[str, str, str, bytes]]:
    """Name, dtype, shape and bytes: eight bytes of length, a JSON header, then the values."""
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    return [
        (name, entry["dtype"], str(entry["shape"]), content[slice(*(start + at for at in entry["data_offsets"]))])
        for name, entry in header.items()
    ]


def _as_given(value: Any) -> Any:
    """JSON has lists only, and the variants' keywords are hashed."""
    return tuple(value) if isinstance(value, list) else value
