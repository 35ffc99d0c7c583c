"""Adapters of input preparation: ModelRunner's methods without a model, or functions of sequences."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from tests.conformance.components.adapters.adapter import Adapter
from tests.conformance.components.adapters.names import describe, first_of, first_value
from tests.conformance.components.adapters.steps import Scheduled, takes_sequences
from tests.conformance.components.loading import NotRecognised

CONTEXT_MODULES = ("utils.context", "context", "engine.context")
# What one contract reads of a prepared step -> the names that it has in the Context, in the order of the tokens:
# prefill first, then decode.
PREFILL_TABLES = ("prefill_block_tables", "block_tables")
DECODE_TABLES = ("decode_block_tables", "block_tables")
# Methods of a ModelRunner that prepare a whole step, of what schedule() returned or of the sequences. The unified ones
# have cu_seqlens, context_lens and tables of all rows, as if all were prefilled.
UNIFIED = ("prepare_batch", "prepare_model_input")
WHOLE_STEP = ("prepare_inputs", *UNIFIED)
# The preparation of a decode step some of whose tokens are in flight: a function of the sequences and of those that the
# step in front samples. A ModelRunner prepares it as any other.
DECODE_BEHIND = "prepare_decode_async"
UNKNOWN_STEPS = "inputs of steps that are scheduled ahead"


class Prepared(NamedTuple):
    """The integers of one forward pass, as plain lists. None: this target's step has no such part."""

    input_ids: list[int]
    positions: list[int]
    slots: list[int]
    cu_seqlens_q: list[int] | None
    cu_seqlens_k: list[int] | None
    context_lens: list[int] | None
    prefill_tables: list[list[int]] | None
    decode_tables: list[list[int]] | None
    temperatures: list[float] | None
    is_unified: bool = False  # cu_seqlens, context_lens and tables are of all rows, as if all were prefilled


class UnknownStep(Exception):
    """The inputs of one kind of step are prepared in an unknown way; those of the others are checked."""


def find_preparation(adapter: Adapter) -> Callable[..., Prepared]:
    """prepare(what schedule() returned, its sequences, is_worker) -> Prepared. Raises NotRecognised if none is found.

    is_worker: prepares as another rank than the first, which samples nothing.
    """
    package = adapter.found["package"].name
    module = _import(f"{package}.engine.model_input")
    if _has_both(module):
        return lambda result, batch, is_worker=False: _from_functions(module, batch, is_worker)
    runner_class = adapter.found.get("ModelRunner")
    if runner_class is None:
        raise NotRecognised(adapter.found["reasons"].get("ModelRunner", "no class ModelRunner"))
    contexts = (_import(f"{package}.{name}") for name in CONTEXT_MODULES)
    context = next((module for module in contexts if hasattr(module, "get_context")), None)
    if context is None:
        raise NotRecognised(f"no module of {CONTEXT_MODULES} has get_context()")
    options = inspect.signature(runner_class.__init__).parameters.values()
    values = {option.name: option.default for option in options if option.default is not option.empty} | {
        "config": adapter.config,
        "block_size": adapter.setup.block_size,
        "world_size": 1,
        "rank": 0,
        "enforce_eager": True,
        "device": "cpu",
        "use_cuda": False,
    }
    runner = object.__new__(runner_class)
    for name, value in values.items():
        setattr(runner, name, value)
    if not _has_both(runner) and first_of(runner, WHOLE_STEP) is None:
        raise NotRecognised(f"ModelRunner has neither prepare_prefill and prepare_decode nor one of {WHOLE_STEP}")
    return lambda result, batch, is_worker=False: _from_runner(runner, context, result, batch, is_worker)


def _from_functions(module: Any, batch: list[Scheduled], is_worker: bool) -> Prepared:
    is_prefill, sequences = batch[0].is_prefill, [item.seq for item in batch]
    if not is_prefill and batch[0].is_behind:
        inputs = getattr(module, DECODE_BEHIND)(sequences, [item.seq for item in batch if item.is_in_flight])
    else:
        inputs = (module.prepare_prefill if is_prefill else module.prepare_decode)(sequences)
    tables = inputs.block_tables.tolist() if inputs.reads_cache else None
    return Prepared(
        inputs.input_ids.tolist(),
        inputs.positions.tolist(),
        inputs.slot_mapping.tolist(),
        inputs.cu_seqlens_q.tolist(),
        inputs.cu_seqlens_k.tolist(),
        inputs.context_lens.tolist(),
        tables if is_prefill else None,
        None if is_prefill else tables,
        None if is_worker else inputs.sampling.temperature.tolist(),
    )


def _from_runner(runner: Any, context_module: Any, result: Any, batch: list[Scheduled], is_worker: bool) -> Prepared:
    sequences = [item.seq for item in batch]
    has_prefill = any(item.is_prefill for item in batch)
    has_decode = not all(item.is_prefill for item in batch)
    is_unified = False
    if not _has_both(runner):
        name = str(first_of(runner, WHOLE_STEP))
        prepare = getattr(runner, name)
        prepared = prepare(sequences if takes_sequences(inspect.signature(prepare).parameters, result) else result)
        if is_unified := name in UNIFIED:
            has_prefill = has_decode = True
    elif has_prefill and has_decode:
        raise NotRecognised("a step has prefill and decode, and ModelRunner prepares only one at a time")
    else:
        other = [name for name in dir(runner) if name.startswith("prepare_") and "async" in name]
        if other and any(item.is_in_flight for item in batch):
            raise UnknownStep(f"ModelRunner has {other[0]}, which no table of preparing.py knows")
        prepared = (runner.prepare_prefill if has_prefill else runner.prepare_decode)(sequences)
    if not isinstance(prepared, tuple) or len(prepared) < 2:
        raise NotRecognised(f"the preparation of a step returns {describe(prepared)}")
    context = context_module.get_context()

    def read(is_there: bool, *names: str) -> Any:
        value = first_value(context, names) if is_there else None
        return getattr(value, "tolist", lambda: value)()

    temperatures = None
    if not is_worker:
        temperatures = runner.prepare_sample(sequences) if hasattr(runner, "prepare_sample") else None
        if is_unified and not hasattr(temperatures, "tolist"):
            temperatures = (*prepared, None)[2]
    return Prepared(
        prepared[0].tolist(),
        prepared[1].tolist(),
        read(True, "slot_mapping"),
        read(has_prefill, "cu_seqlens_q"),
        read(has_prefill, "cu_seqlens_k"),
        read(has_decode, "context_lens"),
        read(has_prefill, *PREFILL_TABLES),
        read(has_decode, *DECODE_TABLES),
        getattr(temperatures, "tolist", lambda: None)(),
        is_unified,
    )


def _has_both(owner: Any) -> bool:
    return hasattr(owner, "prepare_prefill") and hasattr(owner, "prepare_decode")


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception:
        return None
