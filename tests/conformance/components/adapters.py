"""Adapters: how the targets differ, as tables, and one Adapter that inspection fills from them.

Each table lists names in the order in which they are tried. A shape that no row has is NotRecognised: what needs it is
reported as not applicable, with the reason, and never as passed. It is one file so that a new shape has one place.
"""

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

from tests.conformance.components.loading import NotRecognised, hugging_face_config

EOS = 2
NUM_HASHES = 3  # of the weak hash

# Options of the Config, of the scheduler and of the block manager.
BLOCK_SIZES = ("block_size", "kvcache_block_size", "kv_cache_block_size")
NUM_BLOCKS = ("num_blocks", "num_kvcache_blocks", "num_kv_cache_blocks")
# Queues of sequences: those that wait, those that hold blocks, those whose blocks are elsewhere.
WAITING = ("waiting", "waiting_queue", "prefilling")
RUNNING = ("running", "running_queue", "decoding")
SWAPPED = ("swapped", "swapped_queue", "swapped_out")
# Attribute of the scheduler -> its block manager.
BLOCK_MANAGERS = ("block_manager", "kvcache_manager", "kv_cache_manager", "cache_manager")
FREE_BLOCKS = ("free_block_ids", "_free_block_ids", "free_blocks", "free_list")
# Blocks that hold a cached prefix and may be taken as the free ones are: their ids, or a mapping to them.
EVICTABLE_BLOCKS = ("cached_block_ids", "cached_blocks", "evictable_block_ids", "evictable_blocks")
# Attribute of a sequence -> how many tokens it computes in the step, if the scheduler sets it.
COUNTS = ("num_scheduled_tokens", "num_new_tokens")
# Attribute of what schedule() returns -> its sequences, and which of them prefill.
BATCH_SEQUENCES = ("sequences", "seqs", "scheduled_seqs", "scheduled")
PREFILL_COUNTS = ("num_prefill_seqs", "num_prefills")
PROMPTS = ("prompt", "prompt_token_ids", "token_ids", "inputs")  # of LLMEngine.add_request
# Parameters of postprocess(): the sequences of the step, and which of them were sampled.
STEP_SEQUENCES = ("seqs", "sequences")
SAMPLED_ROWS = "seq_need_compute_logits"
ABORTS = ("abort", "abort_request", "abort_seq", "cancel")
HASH_FUNCTIONS = ("compute_hash",)
# Of a scheduler that runs ahead of the model: a sequence's number of tokens in flight; or the scheduler's method that
# is given the step in front, and the one that is given the step ahead once the tokens in front are known.
PLACEHOLDERS = ("num_output_placeholders", "num_placeholders")
NEXT_STEP, COMMIT = "schedule_next_async", "commit_async_batch"


class Scheduled(NamedTuple):
    """One sequence of a step: the tokens start .. start + count.

    is_behind: of a step that is scheduled while another is in flight. is_in_flight: its last token comes of that one.
    """

    seq: Any
    start: int
    count: int
    is_prefill: bool
    is_behind: bool = False
    is_in_flight: bool = False

    @property
    def end(self) -> int:
        return self.start + self.count


def first_of(owner: Any, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if hasattr(owner, name)), None)


def first_value(owner: Any, names: tuple[str, ...]) -> Any:
    name = first_of(owner, names)
    return None if name is None else getattr(owner, name)


def flag(owner: Any, name: str) -> Any:
    """An attribute, or what a method of that name returns; None if there is neither."""
    value = getattr(owner, name, None)
    return value() if callable(value) else value


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
                raise NotRecognised(f"{what} needs {name!r}, which no table of adapters.py knows")
            call.arguments[name] = getattr(fallback, name)
    return function(*call.args, **call.kwargs)


def make_config(config_class: Any, folder: str, values: dict[str, Any]) -> Any:
    """The target's Config, made of `values` as far as its validation lets it: it may derive options from them.

    The others are its own defaults. Then all of `values` are set, since a block size of 2 is refused by most.
    folder: any folder that exists, for a Config that checks that its model does.
    """
    model = {"model": folder, "model_path": folder}
    large = {name: value for name, value in values.items() if name not in BLOCK_SIZES}
    config = None
    for given in (model | values, model | large, model):
        with suppress(Exception):
            config = call_with(config_class, given, "Config")
            break
    if config is None:
        config = _defaults(config_class)
    for name, value in values.items():
        if name in getattr(config_class, "__dataclass_fields__", ()) or not hasattr(config, name):
            with suppress(AttributeError):  # of a class with slots that has no such option
                object.__setattr__(config, name, value)
    return config


def _defaults(config_class: Any) -> Any:
    """A Config whose own validation refuses to run here (no model, no GPU): its fields' defaults alone."""
    if not dataclasses.is_dataclass(config_class):
        return SimpleNamespace()
    config = object.__new__(config_class)
    for field in dataclasses.fields(config_class):
        if field.default_factory is not dataclasses.MISSING:
            object.__setattr__(config, field.name, field.default_factory())
        elif field.default is not dataclasses.MISSING:
            object.__setattr__(config, field.name, field.default)
    return config


class Adapter:
    """One scheduler of the target, with its sequences and its input preparation, behind one set of names."""

    def __init__(self, found: dict[str, Any], setup: Any) -> None:
        for role in ("Scheduler", "Sequence"):
            if role not in found:
                reason = found["reasons"].get(role, f"no class {role} in the package {found['package'].name}")
                raise NotRecognised(reason)
        self.found = found
        self.setup = setup
        self.sequence_class = found["Sequence"]
        has_own_class = setup.is_async and "AsyncScheduler" in found
        self.scheduler_class = found["AsyncScheduler" if has_own_class else "Scheduler"]
        values = self._config_values()
        folder = str(found["package"])
        self.config = make_config(found["Config"], folder, values) if "Config" in found else SimpleNamespace(**values)
        block_size = vars(self.sequence_class).get("block_size")
        if block_size is not None and not isinstance(block_size, property):  # upstream's, which LLMEngine sets
            self.sequence_class.block_size = setup.block_size
        self.patches = ExitStack()
        self.scheduler = self._make_scheduler()
        if first_of(self.scheduler, WAITING) is None or first_of(self.scheduler, RUNNING) is None:
            raise NotRecognised(f"the scheduler has none of the queues {WAITING} or none of {RUNNING}")
        self.swapped_name = first_of(self.scheduler, SWAPPED)
        self.manager = first_value(self.scheduler, BLOCK_MANAGERS)
        if self.manager is None:
            raise NotRecognised(f"the scheduler has none of {BLOCK_MANAGERS}")
        self.runs_behind = hasattr(self.scheduler, NEXT_STEP) and hasattr(self.scheduler, COMMIT)
        self._ids = itertools.count(1)
        self.no_step = ""  # why the steps of this scheduler cannot be followed
        self.postprocess_parameters = inspect.signature(self.scheduler.postprocess).parameters

    def close(self) -> None:
        """Give the target's class its hash function back."""
        self.patches.close()

    # --- construction ---

    def _config_values(self) -> dict[str, Any]:
        setup = self.setup
        sizes = dict.fromkeys(BLOCK_SIZES, setup.block_size) | dict.fromkeys(NUM_BLOCKS, setup.num_blocks)
        return sizes | {
            "max_num_batched_tokens": setup.max_num_batched_tokens,
            "max_num_seqs": setup.max_num_seqs,
            "max_model_len": setup.longest,
            "eos": EOS,
            "eos_token_id": EOS,
            "hf_config": hugging_face_config(),
        }

    def _make_scheduler(self) -> Any:
        manager_class = self.found.get("BlockManager")
        values = self._config_values() | {"config": self.config, "eos_token_ids": frozenset({EOS})}
        needed = inspect.signature(self.scheduler_class).parameters
        if manager_class is not None and any(name in needed for name in BLOCK_MANAGERS):
            manager = call_with(manager_class, self._manager_values(manager_class), "BlockManager", self.config)
            values |= dict.fromkeys(BLOCK_MANAGERS, manager)
        elif self.setup.weak_hash:
            name = first_of(manager_class, HASH_FUNCTIONS)
            if name is None:
                raise NotRecognised(f"the block manager has no hash function of the names {HASH_FUNCTIONS}")
            weak = staticmethod(_weak(getattr(manager_class, name)))
            self.patches.enter_context(mock.patch.object(manager_class, name, weak))
        return call_with(self.scheduler_class, values, "Scheduler", self.config)

    def _manager_values(self, manager_class: Any) -> dict[str, Any]:
        values = {"num_blocks": self.setup.num_blocks, "block_size": self.setup.block_size}
        if self.setup.weak_hash:
            parameter = inspect.signature(manager_class).parameters.get("hash_function")
            if parameter is None:
                raise NotRecognised("the block manager's hash function is not found")
            values["hash_function"] = _weak(parameter.default)
        return values

    def add(self, tokens: list[int], temperature: float, max_tokens: int, ignore_eos: bool) -> Any:
        """Add a request, with the checks of LLMEngine.add_request if that runs here. Returns its sequence."""
        can_submit = not self.no_submit
        options: dict[str, Any] = {"temperature": temperature, "max_tokens": max_tokens, "ignore_eos": ignore_eos}
        params = self._params(options)
        if can_submit:
            return self._submit(tokens, params)
        number = next(self._ids)
        values = options | {
            "token_ids": tokens,
            "prompt_token_ids": tokens,
            "sampling_params": params,
            "params": params,
            "block_size": self.setup.block_size,
            "seq_id": number,
            "request_id": str(number),
            "seed": 0,
        }
        seq = call_with(self.sequence_class, values, "Sequence", self.config)
        self.scheduler.add(seq)
        return seq

    def _params(self, options: dict[str, Any]) -> Any:
        params_class = self.found.get("SamplingParams")
        return None if params_class is None else call_with(params_class, options, "SamplingParams")

    @property
    def no_submit(self) -> str:
        """Why LLMEngine.add_request is not asked, "" if it is. Found out once a process, with another scheduler."""
        if "no_submit" not in self.found:
            self.found["no_submit"] = self._reason_against_submit()
        return self.found["no_submit"]

    def _reason_against_submit(self) -> str:
        if "LLMEngine" not in self.found:
            return self.found["reasons"].get("LLMEngine", "") or "no class LLMEngine"
        try:
            trial = Adapter(self.found, self.setup)
            seq = trial._submit([1, 1], trial._params({"temperature": 1.0, "max_tokens": 1, "ignore_eos": False}))
            return "" if len(seq) == 2 else "LLMEngine.add_request makes another sequence of the tokens"
        except Exception as error:
            return f"LLMEngine.add_request does not run without an engine: {type(error).__name__}: {error}"

    def _submit(self, tokens: list[int], params: Any) -> Any:
        engine = object.__new__(self.found["LLMEngine"])
        engine.scheduler, engine.config = self.scheduler, self.config
        engine.tokenizer = SimpleNamespace(eos_token_id=EOS, encode=list)
        before = {id(seq) for seq in self.queue(WAITING)}
        values = dict.fromkeys(PROMPTS, tokens) | {"sampling_params": params, "params": params}
        call_with(engine.add_request, values, "add_request", self.config)
        added = [seq for seq in self.queue(WAITING) if id(seq) not in before]
        if len(added) != 1:
            raise NotRecognised(f"LLMEngine.add_request adds {len(added)} sequences to the waiting queue")
        return added[0]

    # --- state ---

    def queue(self, names: tuple[str, ...]) -> list[Any]:
        """The sequences of a queue in its order; a priority queue holds tuples with a sequence. Empty if none is."""
        queue = first_value(self.scheduler, names) or []
        items = sorted(queue) if any(isinstance(item, tuple) for item in queue) else list(queue)
        return [self._sequence_in(item) for item in items]

    def _sequence_in(self, item: Any) -> Any:
        if isinstance(item, self.sequence_class):
            return item
        parts = item if isinstance(item, tuple) else vars(item).values()
        found = [part for part in parts if isinstance(part, self.sequence_class)]
        if len(found) != 1:
            raise NotRecognised(f"a queue holds {type(item).__name__} objects")
        return found[0]

    @property
    def can_swap(self) -> bool:
        return self.swapped_name is not None or hasattr(self.manager, "swap_out")

    @property
    def is_first_come_first_served(self) -> bool:
        queue = first_value(self.scheduler, WAITING)
        return hasattr(queue, "popleft") and hasattr(queue, "appendleft")

    def is_finished(self, seq: Any) -> bool:
        value = flag(seq, "is_finished")
        return getattr(seq.status, "name", "") == "FINISHED" if value is None else bool(value)

    def ref_counts(self) -> list[int] | None:
        blocks = getattr(self.manager, "blocks", None)
        if not blocks or not hasattr(next(iter(blocks)), "ref_count"):
            return None
        return [block.ref_count for block in blocks]

    def free_blocks(self) -> list[int] | None:
        """Blocks that a new request may take, also those that hold a cached prefix until then."""
        empty, others = self.empty_blocks(), first_value(self.manager, EVICTABLE_BLOCKS)
        if empty is None or others is None:
            return empty
        ids = others.values() if isinstance(others, Mapping) else others
        return empty + [getattr(block, "block_id", block) for block in ids]

    def empty_blocks(self) -> list[int] | None:
        blocks = first_value(self.manager, FREE_BLOCKS)
        return None if blocks is None else list(blocks)

    # --- a step ---

    def schedule(self) -> tuple[Any, list[Scheduled]]:
        """What schedule() returned, and the sequences in it."""
        if self.no_step:
            raise NotRecognised(self.no_step)
        result = self.scheduler.schedule()
        return result, self._read(result)

    def is_ahead(self, batch: list[Scheduled]) -> bool:
        """Whether the next step may be scheduled before the tokens of this one are known: all have placeholders."""
        return bool(batch) and all(first_value(item.seq, PLACEHOLDERS) for item in batch)

    def schedule_next(self, front: Any) -> tuple[Any, list[Scheduled]]:
        """The step behind `front`, which schedule_next returned or schedule did; (None, []) if there is none yet."""
        result = getattr(self.scheduler, NEXT_STEP)(front)
        return result, [] if result is None else self._read(result)

    def commit(self, result: Any) -> tuple[Any, list[Any]]:
        """What is left of a step ahead, and of its sequences, once the tokens of the step in front are known."""
        result = getattr(self.scheduler, COMMIT)(result)
        return result, list(first_value(result, BATCH_SEQUENCES))

    def cache_entries(self) -> dict[int, list[int]]:
        """Block -> the tokens that the prefix cache says it holds. Empty where the blocks do not say that."""
        blocks = getattr(self.manager, "blocks", [])
        entered = [block for block in blocks if getattr(block, "hash", -1) not in (-1, None)]
        return {block.block_id: list(block.token_ids) for block in entered if getattr(block, "token_ids", None)}

    def watch_moves(self, moved: Callable[[bool, list[tuple[int, int]]], None]) -> None:
        """Call moved(is_out, pairs) whenever the block manager decides to copy blocks to the CPU, or back."""
        for is_out, name in ((True, "swap_out"), (False, "swap_in")):
            if hasattr(self.manager, name):
                setattr(self.manager, name, _watched(getattr(self.manager, name), is_out, moved))
            elif self.swapped_name is not None:
                self.no_step = f"the scheduler has a queue {self.swapped_name}, the block manager no {name}"

    def _read(self, result: Any) -> list[Scheduled]:
        """The sequences of a step in each of the shapes that schedule() returns."""
        sequences, count = first_value(result, BATCH_SEQUENCES), first_value(result, PREFILL_COUNTS)
        if isinstance(result, tuple):
            if len(result) in (2, 4 if self.swapped_name else 2) and isinstance(result[1], bool):
                return [self._scheduled(seq, result[1]) for seq in result[0]]
            if len(result) == 2 and all(isinstance(part, list) for part in result):
                return [self._scheduled(seq, part is result[0]) for part in result for seq in part]
        elif isinstance(result, list):
            return [self._scheduled(seq, None) for seq in result]
        elif hasattr(result, "is_prefill") and sequences is not None:
            return [self._scheduled(seq, result.is_prefill) for seq in sequences]
        elif sequences is not None:
            return [self._scheduled(seq, None if count is None else i < count) for i, seq in enumerate(sequences)]
        raise NotRecognised(f"schedule() returns {describe(result)}; no table of adapters.py knows that")

    def _prefills(self, seq: Any) -> bool:
        value = flag(seq, "is_prefill")
        if value is not None:
            return bool(value)
        if self.count_name is None:
            raise NotRecognised("nothing says which sequences of a step are in prefill")
        return seq.num_cached_tokens < max(seq.num_prompt_tokens, len(seq) - 1)

    def _scheduled(self, seq: Any, is_prefill: bool | None) -> Scheduled:
        """is_prefill: None if the sequence itself has to say it."""
        if is_prefill is None:
            is_prefill = self._prefills(seq)
        if self.count_name is not None:
            return Scheduled(seq, seq.num_cached_tokens, getattr(seq, self.count_name), is_prefill)
        start = seq.num_cached_tokens if is_prefill else len(seq) - 1
        return Scheduled(seq, start, len(seq) - start, is_prefill)

    @property
    def count_name(self) -> str | None:
        """Which of COUNTS the scheduler sets. Found out once a process, with another scheduler.

        A Sequence may have one that nothing sets: of a branch that was merged in part.
        """
        if "count_name" not in self.found:
            trial = Adapter(self.found, dataclasses.replace(self.setup, weak_hash=False))
            seq = trial.add([1], 1.0, 1, False)
            try:
                trial.scheduler.schedule()
                self.found["count_name"] = next((name for name in COUNTS if getattr(seq, name, 0)), None)
            except Exception:
                self.found["count_name"] = first_of(seq, COUNTS)
        return self.found["count_name"]

    def first_stored(self, item: Scheduled) -> int:
        """The first position whose key the step stores; what lies before is in a shared block."""
        return max(item.start, getattr(item.seq, "num_tokens_with_kv", 0) if item.is_prefill else 0)

    def postprocess(self, result: Any, batch: list[Scheduled], tokens: list[int]) -> None:
        """tokens: one for each sequence of the batch, also for those that get none in this step."""
        parameters = self.postprocess_parameters
        is_object = not isinstance(result, tuple | list)
        rows = [row for row, item in enumerate(batch) if item.end == len(item.seq)]
        needs_sampling = is_object and all(hasattr(item.seq, "needs_sampling") for item in batch)
        if needs_sampling or hasattr(result, "sampled_sequences") or SAMPLED_ROWS in parameters:
            tokens = [tokens[row] for row in rows]
        takes_sequences = not is_object or next(iter(parameters), "") in STEP_SEQUENCES
        values: list[Any] = [[item.seq for item in batch] if takes_sequences else result, tokens]
        rest = list(result[1:]) if isinstance(result, tuple) else []
        for name, parameter in list(parameters.items())[2:]:
            if name == SAMPLED_ROWS:
                values.append(rows)
            elif name == "is_prefill" and takes_sequences and not rest:
                values.append(getattr(result, "is_prefill", batch[0].is_prefill))
            elif rest:
                values.append(rest.pop(0))
            elif parameter.default is not parameter.empty or parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
                break
            else:
                raise NotRecognised(f"postprocess takes {list(parameters)}, and no table knows {name!r}")
        self.scheduler.postprocess(*values)

    @property
    def abort_name(self) -> str | None:
        return first_of(self.scheduler, ABORTS)


def _weak(function: Callable[..., int]) -> Callable[..., int]:
    """The hash function with so few values that they collide."""
    return lambda *args, **options: function(*args, **options) % NUM_HASHES


def _watched(function: Callable[..., Any], is_out: bool, moved: Callable[..., None]) -> Callable[..., Any]:
    def watched(*args: Any, **options: Any) -> Any:
        result = function(*args, **options)
        pairs = list(result.items()) if isinstance(result, dict) else result
        if not isinstance(pairs, list) or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
            raise NotRecognised(f"{function.__name__} returns {describe(result)}, and not which blocks it moves")
        moved(is_out, pairs)
        return result

    return watched


def describe(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}: {', '.join(type(part).__name__ for part in value)}"
    return f"a {type(value).__name__}"
