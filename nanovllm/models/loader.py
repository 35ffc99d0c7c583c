"""Loads a checkpoint's safetensors files into a model: every tensor in its place exactly once, or an error with names.

Nothing but safetensors is read, so no code from a checkpoint can run, and an index cannot name files elsewhere.
"""

import json
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from nanovllm.layers.parameter import ShapeError
from nanovllm.models.decoder import DecoderForCausalLM
from nanovllm.progress import Progress

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
EXPERTS = "experts"  # the module whose children are numbered in the checkpoint and packed here
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_UNSAFE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_STALE = "rotary_emb.inv_freq"  # a buffer that old checkpoints stored; it follows from config.json
_QUANTISED = {
    *("qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_scale_inv", "weight_zero_point"),
    *("input_scale", "absmax", "quant_map", "quant_state", "SCB", "weight_g_idx", "weight_shape"),
}
_MAX_LISTED = 10

Target = tuple[nn.Parameter, Hashable]  # the parameter that a tensor goes to, and the shard_id to load it with


def load_model(
    model: DecoderForCausalLM,
    model_dir: str | Path,
    use_tqdm: bool = True,
    between_tensors: Callable[[], None] | None = None,
) -> None:
    """Fill all parameters of `model` from model_dir, each rank with its share, cast to the parameters' dtype.

    use_tqdm: show progress, see nanovllm/progress.py. between_tensors is called after each tensor.
    Raises ValueError, listing names, when files or tensors are missing, unexpected, duplicate, misshapen, quantised or
    not floating point.
    """
    files = checkpoint_files(Path(model_dir))
    targets = expected_weights(model)
    sources = _tensor_files(files)
    is_tied = model.config.tie_word_embeddings
    names = {name for name in sources if not _is_ignored(name, is_tied)}
    _refuse("quantised weights are not supported", (name for name in names if name.split(".")[-1] in _QUANTISED))
    _refuse("the checkpoint lacks weights of this model", targets.keys() - names)
    _refuse("the checkpoint has weights that this model does not", names - targets.keys())
    misshapen = []
    with Progress("Loading weights", len(targets), is_shown=use_tqdm) as progress:
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                for name in sorted(targets.keys() & set(tensors.keys())):
                    try:
                        _load(targets[name], tensors.get_tensor(name))
                    except ShapeError as error:
                        misshapen.append(f"{name}: {error}")
                    except ValueError as error:
                        raise ValueError(f"{name} in {file}: {error}") from None
                    progress.update()
                    if between_tensors is not None:
                        between_tensors()
    _refuse("weights have other shapes than config.json implies", misshapen)


def expected_weights(model: DecoderForCausalLM) -> dict[str, Target]:
    """Every tensor name that a complete checkpoint of `model` has, and where it goes.

    Names are compared as a whole, and packed modules found as whole components of a name: gate_up_proj is not up_proj.
    """
    originals: dict[tuple[str, Hashable], str] = {target: name for name, target in model.packed_modules_mapping.items()}
    targets: dict[str, Target] = {}
    for param_name, param in model.named_parameters():  # a tied parameter appears once
        for shard_id in _shard_ids(param):
            targets[_checkpoint_name(param_name, shard_id, originals)] = (param, shard_id)
    return targets


def _shard_ids(param: Any) -> tuple[Hashable, ...]:
    return param.shard_ids


def _checkpoint_name(param_name: str, shard_id: Hashable, originals: dict[tuple[str, Hashable], str]) -> str:
    """The checkpoint's name of one shard, such as model.layers.0.self_attn.q_proj.weight of ...qkv_proj.weight."""
    *path, module, leaf = param_name.split(".")
    if path and path[-1] == EXPERTS and isinstance(shard_id, tuple):
        expert, *rest = shard_id
        path.append(str(expert))
        shard_id = rest[0] if rest else None
    if shard_id is not None:
        module = originals[module, shard_id]
    return ".".join([*path, module, leaf])


def _load(target: Target, loaded_weight: torch.Tensor) -> None:
    if loaded_weight.dtype not in WEIGHT_DTYPES:
        supported = ", ".join(str(dtype).removeprefix("torch.") for dtype in WEIGHT_DTYPES)
        raise ValueError(f"weights must be {supported}, got {str(loaded_weight.dtype).removeprefix('torch.')}")
    param: Any
    param, shard_id = target
    if shard_id is None:
        param.weight_loader(param, loaded_weight)
    else:
        param.weight_loader(param, loaded_weight, shard_id)


def checkpoint_files(model_dir: Path) -> list[Path]:
    """The safetensors files of a checkpoint: model.safetensors, or the shards that its index names.

    Raises ValueError when there are none, when a shard is missing, and for an index that names anything but files
    beside it. Names are judged as text, since the hub's cache consists of symbolic links.
    """
    if (model_dir / SINGLE_FILE).is_file():
        return [model_dir / SINGLE_FILE]
    index_file = model_dir / INDEX_FILE
    if not index_file.is_file():
        unsafe = sorted(path.name for path in model_dir.glob("*") if path.suffix in _UNSAFE_SUFFIXES)
        found = f"only {', '.join(unsafe)}, which can run code when read" if unsafe else "neither"
        raise ValueError(
            f"{str(model_dir)!r} must hold {SINGLE_FILE} or {INDEX_FILE}, and there is {found}; "
            "download or convert the weights to safetensors"
        )
    shards = sorted(set(_weight_map(index_file).values()))
    _refuse(f"{index_file} names files outside its directory", (name for name in shards if not _is_plain_name(name)))
    _refuse(f"{index_file} names shards that are missing", (n for n in shards if not (model_dir / n).is_file()))
    return [model_dir / name for name in shards]


def _weight_map(index_file: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index_file.read_text(encoding="utf-8"))["weight_map"]
        if weight_map and all(isinstance(name, str) for name in weight_map.values()):
            return weight_map
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f"{index_file} must be JSON with a weight_map from tensor to file names; download it again")


def _is_plain_name(name: str) -> bool:
    return name not in ("", ".", "..") and not set(name) & set("/\\:\0") and name.endswith(".safetensors")


def _tensor_files(files: list[Path]) -> dict[str, Path]:
    """Which file holds which tensor. Raises ValueError when one cannot be read, or two hold the same."""
    sources: dict[str, Path] = {}
    duplicate = []
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                names = list(tensors.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{file} must be a safetensors file that can be read: {error}; download it again"
            ) from None
        duplicate += [f"{name} ({sources[name].name} and {file.name})" for name in names if name in sources]
        sources.update(dict.fromkeys(names, file))
    _refuse("several files hold the same weight", duplicate)
    return sources


def _is_ignored(name: str, is_tied: bool) -> bool:
    """Tensors that a correct checkpoint may hold and the model does not need."""
    return (is_tied and name == "lm_head.weight") or name == _STALE or name.endswith("." + _STALE)


def _refuse(reason: str, names: Iterable[str]) -> None:
    """Raise ValueError that gives the reason and lists names, if there are any."""
    listed = sorted(names)
    if listed:
        more = f" and {len(listed) - _MAX_LISTED} more" if len(listed) > _MAX_LISTED else ""
        raise ValueError(f"{reason} ({len(listed)}): {'; '.join(listed[:_MAX_LISTED])}{more}")
