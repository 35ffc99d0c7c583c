"""Loads a checkpoint's safetensors files into a model.

The tensors of the files and the weights of the model must match one to one; otherwise an error lists the rest.
Exceptions are _UNUSED_BUFFERS and an equal copy of a tied weight. Only safetensors files in the checkpoint's directory
are read, so a checkpoint cannot run code or name files elsewhere.
"""

import json
import logging
from collections.abc import Callable, Collection, Hashable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nanovllm.layers.parameter import ShapeError
from nanovllm.model_config import WEIGHT_DTYPES
from nanovllm.models.decoder import DecoderForCausalLM
from nanovllm.progress import Progress

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
EXPERTS = "experts"  # the module whose children are numbered in most checkpoints and packed in our models
BASE_PREFIX = "model."  # prefix of all names except lm_head's; absent if a base model was saved
EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
_UNSAFE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
# Buffers that older versions of transformers stored beside the weights: values that follow from config.json, and a
# constant of the attention mask.
_UNUSED_BUFFERS = (
    *(".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached"),
    ".self_attn.masked_bias",
)
_QUANTISED = {
    *("qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_scale_inv", "weight_zero_point"),
    *("input_scale", "absmax", "quant_map", "quant_state", "SCB", "weight_g_idx", "weight_shape"),
}
_MAX_LISTED = 10

logger = logging.getLogger("nanovllm")

Target = tuple[nn.Parameter, Hashable]  # (parameter that a tensor is loaded into, shard_id for its weight_loader)


def load_model(
    model: DecoderForCausalLM,
    model_dir: str | Path,
    use_tqdm: bool = True,
    on_tensor_loaded: Callable[[], None] | None = None,
) -> None:
    """Load this rank's shard of every weight from model_dir into `model`, cast to the parameters' dtype.

    use_tqdm: show progress, see nanovllm/progress.py. on_tensor_loaded: called after each tensor; may raise.
    If the files contradict config.json, the files take precedence, as in transformers, and rank 0 logs a warning:
    weights that config.json ties and that differ in the files are not tied, and a bias that no layer has is zero.
    Raises ValueError, listing names, if files or tensors are missing, unexpected, duplicate, misshapen, quantised or
    not floating point.
    """
    files = checkpoint_files(Path(model_dir))
    sources = _tensor_files(files)
    names = {name for name in sources if not f".{name}".endswith(_UNUSED_BUFFERS)}
    prefix = _missing_prefix(names)
    if model.is_tied and LM_HEAD in names:
        _untie_or_drop_copy(model, names, sources, EMBEDDING.removeprefix(prefix))
    targets = expected_weights(model, names, prefix)
    _refuse("quantised weights are not supported", (name for name in names if name.split(".")[-1] in _QUANTISED))
    _zero_absent_biases(model, targets, names)
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
                    if on_tensor_loaded is not None:
                        on_tensor_loaded()
    _refuse("weights have other shapes than config.json implies", misshapen)


def warn_of_non_finite(model_dir: Path, dtype: torch.dtype) -> None:
    """Log which weights make all logits NaN or infinite.

    This reads every file, so it is called when such logits have come up. To check each tensor when it is loaded would
    make loading on a CPU take twice as long.
    """
    sources = _tensor_files(checkpoint_files(model_dir))
    names = [name for name, file in sources.items() if not _read(file, name).isfinite().all()]
    reason = f"weights hold NaN or infinity {_listed(names)}; use another checkpoint, or download this one again"
    if not names:
        reason = (
            f"each weight is finite: {str(dtype).removeprefix('torch.')} does not hold numbers that are as large as "
            "those which the model computes; set dtype to bfloat16 or float32, or use another checkpoint"
        )
    logger.warning(f"the model computes no finite logits, so its tokens mean nothing: {reason}")


def _missing_prefix(names: Collection[str]) -> str:
    """BASE_PREFIX if the checkpoint was saved from a base model (such as Qwen3Model), whose names lack it, else ""."""
    is_present = any(name.startswith(BASE_PREFIX) for name in names)
    return BASE_PREFIX if not is_present and any(name.startswith("layers.") for name in names) else ""


def _untie_or_drop_copy(
    model: DecoderForCausalLM, names: set[str], sources: dict[str, Path], embedding_name: str
) -> None:
    """Untie lm_head if it differs from the embedding in the files; otherwise remove it from `names`.

    If the files lack the embedding, nothing is done. Each rank compares the whole tensors in the model's dtype, so that
    all ranks make the same decision.
    """
    if embedding_name not in names:
        return
    weight = model.lm_head.weight
    embedding, lm_head = (_read(sources[name], name).to(weight.dtype) for name in (embedding_name, LM_HEAD))
    if torch.equal(embedding, lm_head):
        names.discard(LM_HEAD)
        return
    model.lm_head.untie()
    _warn(
        model,
        f"config.json ties {LM_HEAD} to {embedding_name} (tie_word_embeddings), but the checkpoint holds both and they "
        "differ: they are not tied, as in transformers; set tie_word_embeddings to false to silence this",
    )


def _zero_absent_biases(model: DecoderForCausalLM, targets: dict[str, Target], names: set[str]) -> None:
    """If only biases are missing, each of them in all layers, fill them with zeros and remove them from targets."""
    missing = targets.keys() - names
    kinds = {_module_and_leaf(name) for name in missing}
    if not missing or kinds & {_module_and_leaf(name) for name in names} or not all(k.endswith(".bias") for k in kinds):
        return
    for name in missing:
        param, _ = targets.pop(name)
        param.zero_()  # before any tensor is loaded: other parts of a packed parameter may be in the files
    listed = ", ".join(sorted(kinds))
    _warn(model, f"config.json implies {listed}, but no layer of the checkpoint has it: zero, as in transformers")


def _module_and_leaf(name: str) -> str:
    """The last two components of a name, such as o_proj.bias."""
    return ".".join(name.split(".")[-2:])


def _warn(model: DecoderForCausalLM, message: str) -> None:
    if model.lm_head.tp.rank == 0:  # the other ranks would log the same
        logger.warning(message)


def expected_weights(model: DecoderForCausalLM, names: Collection[str], prefix: str) -> dict[str, Target]:
    """Tensor name -> target, for every tensor of a complete checkpoint of `model`.

    names: the names in the checkpoint, which decide how the weights are stored: all experts of a layer in one tensor or
    one by one, and a tied weight under either of its names. Names are compared as a whole, and a packed module must
    match a whole component of a name: gate_up_proj does not match up_proj. prefix: of our names that theirs lack.
    """
    originals: dict[tuple[str, Hashable], str] = {target: name for name, target in model.packed_modules_mapping.items()}
    targets: dict[str, Target] = {}
    for param_name, param in model.named_parameters():  # a tied parameter appears once
        stored_name = param_name.removeprefix(prefix)
        fused_name = stored_name.removesuffix(".weight")
        if f".{EXPERTS}." in stored_name and fused_name in names:
            targets[fused_name] = (param, None)
        elif model.is_tied and param_name == EMBEDDING and LM_HEAD in names and stored_name not in names:
            targets[LM_HEAD] = (param, None)
        else:
            for shard_id in param.shard_ids:  # type: ignore[attr-defined]
                targets[_checkpoint_name(stored_name, shard_id, originals)] = (param, shard_id)
    return targets


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


def _load(target: Target, loaded_weight: Tensor) -> None:
    dtype = str(loaded_weight.dtype).removeprefix("torch.")
    if dtype not in WEIGHT_DTYPES:
        raise ValueError(f"weights must be {', '.join(WEIGHT_DTYPES)}, got {dtype}")
    param, shard_id = target
    param.weight_loader(param, loaded_weight, *(() if shard_id is None else (shard_id,)))  # type: ignore[operator]


def checkpoint_files(model_dir: Path) -> list[Path]:
    """The safetensors files of a checkpoint: model.safetensors, or the shards that its index names.

    Raises ValueError if there are none, if a shard is missing, or if the index names a path outside the directory. Only
    the name is checked: symbolic links are followed, because the Hugging Face cache consists of symbolic links.
    """
    if (model_dir / SINGLE_FILE).is_file():
        return [model_dir / SINGLE_FILE]
    index_file = model_dir / INDEX_FILE
    if not index_file.is_file():
        names = sorted(path.name for path in model_dir.glob("*"))
        shards = [name for name in names if name.endswith(".safetensors")]
        unsafe = [name for name in names if Path(name).suffix in _UNSAFE_SUFFIXES]
        found, remedy = "neither", "download or convert the weights to safetensors"
        if shards:
            found = f"only {', '.join(shards[:_MAX_LISTED])}"
            remedy = f"download {INDEX_FILE}, or rename a single file to {SINGLE_FILE}"
        elif unsafe:
            found = f"only {', '.join(unsafe[:_MAX_LISTED])}, which can run code when read"
        raise ValueError(f"{str(model_dir)!r} must hold {SINGLE_FILE} or {INDEX_FILE}, and there is {found}; {remedy}")
    shards = sorted(set(_weight_map(index_file).values()))
    _refuse(f"{index_file} names files outside its directory", (name for name in shards if not _is_plain_name(name)))
    _refuse(f"{index_file} names shards that are missing", (n for n in shards if not (model_dir / n).is_file()))
    return [model_dir / name for name in shards]


def _weight_map(index_file: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index_file.read_text(encoding="utf-8"))["weight_map"]
        if weight_map and all(isinstance(name, str) for name in weight_map.values()):
            return weight_map
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise ValueError(f"{index_file} must be JSON with a weight_map from tensor to file names; download it again")


def _is_plain_name(name: str) -> bool:
    return name not in ("", ".", "..") and not set(name) & set("/\\:\0") and name.endswith(".safetensors")


def _tensor_files(files: list[Path]) -> dict[str, Path]:
    """Tensor name -> its file. Raises ValueError if a file cannot be read or if two files hold the same tensor."""
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


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name)


def _refuse(reason: str, names: Iterable[str]) -> None:
    """Raise ValueError with the reason and the list of names, unless names is empty."""
    listed = sorted(names)
    if listed:
        raise ValueError(f"{reason} {_listed(listed)}")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return f"({len(names)}): {'; '.join(sorted(names)[:_MAX_LISTED])}{more}"
