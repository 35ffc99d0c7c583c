"""Constructs a target's Config, BlockManager and Scheduler of one Setup, by the names of their parameters."""

import dataclasses
import inspect
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

from tests.conformance.components.adapters.names import (
    BLOCK_MANAGERS,
    BLOCK_SIZES,
    HASH_FUNCTIONS,
    NUM_BLOCKS,
    first_of,
)
from tests.conformance.components.loading import NotRecognised, hugging_face_config
from tests.conformance.components.sizes import EOS, Setup

NUM_HASHES = 3  # of the weak hash


def call_with(function: Callable[..., Any], values: dict[str, Any], what: str, fallback: Any = None) -> Any:
    """Call `function` with those of `values` that its parameters name; `fallback` has the others as attributes.

    Raises NotRecognised for a parameter without a default that neither has.
    """
    signature = inspect.signature(function)
    call = signature.bind_partial()
    for name, parameter in signature.parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if name in values:
            call.arguments[name] = values[name]
        elif parameter.default is parameter.empty:
            if not hasattr(fallback, name):
                raise NotRecognised(f"{what} needs {name!r}, which no table of adapters/ knows")
            call.arguments[name] = getattr(fallback, name)
    return function(*call.args, **call.kwargs)


def make_config(found: dict[str, Any], setup: Setup) -> Any:
    """The target's Config, made of these values as far as its validation lets it: it may derive options from them.

    The others are its own defaults. Then all of the values are set, since a block size of 2 is refused by most.
    """
    values, config_class = _config_values(setup), found.get("Config")
    if config_class is None:
        return SimpleNamespace(**values)
    folder = str(found["package"])  # one that exists, which some check
    model: dict[str, Any] = {"model": folder, "model_path": folder}
    large = {name: value for name, value in values.items() if name not in BLOCK_SIZES}
    for given in (model | values, model | large, model):
        with suppress(Exception, NotRecognised):
            config = call_with(config_class, given, "Config")
            break
    else:
        config = _defaults(config_class)
    for name, value in values.items():
        if name in getattr(config_class, "__dataclass_fields__", ()) or not hasattr(config, name):
            with suppress(AttributeError):  # of a class with slots that has no such option
                object.__setattr__(config, name, value)
    return config


def _defaults(config_class: Any) -> Any:
    """A Config whose own validation refuses to run here (no model, no GPU): its fields' defaults alone."""
    if not hasattr(config_class, "__dataclass_fields__"):
        return SimpleNamespace()
    config = object.__new__(config_class)
    for field in dataclasses.fields(config_class):
        if field.default_factory is not dataclasses.MISSING:
            object.__setattr__(config, field.name, field.default_factory())
        elif field.default is not dataclasses.MISSING:
            object.__setattr__(config, field.name, field.default)
    return config


def _config_values(setup: Setup) -> dict[str, Any]:
    sizes = dict.fromkeys(BLOCK_SIZES, setup.block_size) | dict.fromkeys(NUM_BLOCKS, setup.num_blocks)
    return sizes | {
        "max_num_batched_tokens": setup.max_num_batched_tokens,
        "max_num_seqs": setup.max_num_seqs,
        "max_model_len": setup.longest,
        "eos": EOS,
        "eos_token_id": EOS,
        "hf_config": hugging_face_config(),
    }


def make_scheduler(found: dict[str, Any], setup: Setup, config: Any) -> Any:
    """A BlockManager that takes no hash function has the setup's until the next scheduler is made."""
    manager_class = found.get("BlockManager")
    has_own_class = setup.is_async and "AsyncScheduler" in found
    scheduler_class = found["AsyncScheduler" if has_own_class else "Scheduler"]
    values = _config_values(setup) | {"config": config, "eos_token_ids": frozenset({EOS})}
    needed = inspect.signature(scheduler_class).parameters
    if manager_class is not None and any(name in needed for name in BLOCK_MANAGERS):
        manager = call_with(manager_class, _manager_values(manager_class, setup), "BlockManager", config)
        values |= dict.fromkeys(BLOCK_MANAGERS, manager)
    elif (name := first_of(manager_class, HASH_FUNCTIONS)) is not None:
        setattr(manager_class, name, found.setdefault("hash_function", inspect.getattr_static(manager_class, name)))
        if setup.weak_hash:
            setattr(manager_class, name, staticmethod(_weak(getattr(manager_class, name))))
    elif setup.weak_hash:
        raise NotRecognised(f"the block manager has no hash function of the names {HASH_FUNCTIONS}")
    return call_with(scheduler_class, values, "Scheduler", config)


def _manager_values(manager_class: Any, setup: Setup) -> dict[str, Any]:
    values: dict[str, Any] = {"num_blocks": setup.num_blocks, "block_size": setup.block_size}
    if setup.weak_hash:
        parameter = inspect.signature(manager_class).parameters.get("hash_function")
        if parameter is None:
            raise NotRecognised("the block manager's hash function is not found")
        values["hash_function"] = _weak(parameter.default)
    return values


def _weak(function: Callable[..., int]) -> Callable[..., int]:
    """The hash function with so few values that they collide."""
    return lambda *args, **options: function(*args, **options) % NUM_HASHES
