"""Adapters: how the targets differ, as tables, and one Adapter that inspection fills from them.

Each table lists names in the order in which they are tried. A shape that no row has is NotRecognised: what needs it is
reported as not applicable, with the reason, and never as passed. It is one file so that a new shape has one place.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

from tests.conformance.components.loading import NotRecognised, hugging_face_config

EOS = 2
NUM_HASHES = 3  # of the weak hash

# Queues of sequences: those that wait, those that hold blocks, those whose blocks are elsewhere.
WAITING = ("waiting", "waiting_queue", "prefilling")
RUNNING = ("running", "running_queue", "decoding")
SWAPPED = ("swapped", "swapped_queue", "swapped_out")
# Attribute of the scheduler -> its block manager.
BLOCK_MANAGERS = ("block_manager", "kvcache_manager", "kv_cache_manager", "cache_manager")
FREE_BLOCKS = ("free_block_ids", "_free_block_ids", "free_blocks", "free_list")
# Blocks that hold a cached prefix and may be taken as the free ones are: their ids, or a mapping to them.
EVICTABLE_BLOCKS = ("cached_block_ids", "cached_blocks", "evictable_block_ids", "evictable_blocks")
BLOCK_LISTS = ("blocks",)
# Attribute of a sequence -> how many tokens it computes in the step, if the scheduler sets it.
COUNTS = ("num_scheduled_tokens", "num_new_tokens")
# Attribute of what schedule() returns -> its sequences, and which of them prefill.
BATCH_SEQUENCES = ("sequences", "seqs", "scheduled_seqs", "scheduled")
PREFILL_COUNTS = ("num_prefill_seqs", "num_prefills")
PROMPTS = ("prompt", "prompt_token_ids", "token_ids", "inputs")  # of LLMEngine.add_request
# Parameters of postprocess(): the sequences of the step, and which of them were sampled.
STEP_SEQUENCES = ("seqs", "sequences")
SAMPLED_ROWS = ("seq_need_compute_logits",)
ABORTS = ("abort", "abort_request", "abort_seq", "cancel")
HASH_FUNCTIONS = ("compute_hash",)
# Of a scheduler that runs ahead of the model: a sequence's number of tokens in flight; or the scheduler's method that
# is given the step in front, and the one that is given the step ahead once the tokens in front are known.
PLACEHOLDERS = ("num_output_placeholders", "num_placeholders")
NEXT_STEP, COMMIT = ("schedule_next_async",), ("commit_async_batch",)


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


def first_of(owner: Any, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if hasattr(owner, name)), None)


def call_with(function: Callable[..., Any], values: dict[str, Any], what: str, fallback: Any = None) -> Any:
    """Call `function` with those of `values` that its parameters name; `fallback` has the others as attributes.

    Raises NotRecognised for a parameter without a default that neither has.
    """
    arguments: dict[str, Any] = {}
    positional: list[Any] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if name in values:
            value = values[name]
        elif parameter.default is not parameter.empty:
            continue
        elif fallback is not None and hasattr(fallback, name):
            value = getattr(fallback, name)
        else:
            raise NotRecognised(f"{what} needs {name!r}, which no table of adapters.py knows")
        if parameter.kind is parameter.POSITIONAL_ONLY:
            positional.append(value)
        else:
            arguments[name] = value
    return function(*positional, **arguments)


def make_config(config_class: Any, folder: str, values: dict[str, Any]) -> Any:
    """The target's Config, made of `values` as far as its validation lets it: it may derive options from them.

    The others are its own defaults. Then all of `values` are set, since a block size of 2 is refused by most.
    folder: any folder that exists, for a Config that checks that its model does.
    """
    model = {"model": folder, "model_path": folder}
    large = {name: value for name, value in values.items() if "block_size" not in name}
    config = None
    for given in (model | values, model | large, model):
        try:
            config = call_with(config_class, given, "Config")
            break
        except Exception:
            continue
    if config is None:
        config = _defaults(config_class)
    for name, value in values.items():
        if name in _names(config_class) or not hasattr(config, name):
            try:
                object.__setattr__(config, name, value)
            except AttributeError:  # a class with slots that has no such option
                continue
    return config


def _names(config_class: Any) -> set[str]:
    return (
        {field.name for field in dataclasses.fields(config_class)} if dataclasses.is_dataclass(config_class) else set()
    )


def _defaults(config_class: Any) -> Any:
    """A Config whose own validation refuses to run here (no model, no GPU): its fields' defaults alone."""
    if not dataclasses.is_dataclass(config_class):
        return SimpleNamespace()
    config = object.__new__(config_class)
    for field in dataclasses.fields(config_class):
        if field.default is not dataclasses.MISSING:
            object.__setattr__(config, field.name, field.default)
        elif field.default_factory is not dataclasses.MISSING:
            object.__setattr__(config, field.name, field.default_factory())
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
        self._set_block_size()
        self.scheduler = self._make_scheduler()
        self.waiting_name = first_of(self.scheduler, WAITING)
        self.running_name = first_of(self.scheduler, RUNNING)
        if self.waiting_name is None or self.running_name is None:
            raise NotRecognised(f"the scheduler has none of the queues {WAITING} or none of {RUNNING}")
        self.swapped_name = first_of(self.scheduler, SWAPPED)
        manager = first_of(self.scheduler, BLOCK_MANAGERS)
        if manager is None:
            raise NotRecognised(f"the scheduler has none of {BLOCK_MANAGERS}")
        self.manager = getattr(self.scheduler, manager)
        self._num_made = 0
        self.no_step = ""  # why the steps of this scheduler cannot be followed
        self.postprocess_parameters = inspect.signature(self.scheduler.postprocess).parameters

    # --- construction ---

    def _config_values(self) -> dict[str, Any]:
        setup = self.setup
        return {
            "max_num_batched_tokens": setup.max_num_batched_tokens,
            "max_num_seqs": setup.max_num_seqs,
            "max_model_len": setup.longest,
            "eos": EOS,
            "eos_token_id": EOS,
            "kvcache_block_size": setup.block_size,
            "kv_cache_block_size": setup.block_size,
            "block_size": setup.block_size,
            "num_kvcache_blocks": setup.num_blocks,
            "num_kv_cache_blocks": setup.num_blocks,
            "num_blocks": setup.num_blocks,
            "hf_config": hugging_face_config(),
        }

    def _set_block_size(self) -> None:
        """Upstream's block size is an attribute of the class Sequence, which LLMEngine sets."""
        if "block_size" in vars(self.sequence_class) and not isinstance(
            vars(self.sequence_class)["block_size"], property
        ):
            self.sequence_class.block_size = self.setup.block_size

    def _make_scheduler(self) -> Any:
        setup, manager_class = self.setup, self.found.get("BlockManager")
        values = self._config_values() | {"config": self.config, "eos_token_ids": frozenset({EOS})}
        needed = inspect.signature(self.scheduler_class).parameters
        if manager_class is not None and any(name in needed for name in BLOCK_MANAGERS):
            manager = call_with(manager_class, self._manager_values(manager_class), "BlockManager", self.config)
            values |= dict.fromkeys(BLOCK_MANAGERS, manager)
        elif setup.weak_hash:
            self._weaken(manager_class)
        return call_with(self.scheduler_class, values, "Scheduler", self.config)

    def _manager_values(self, manager_class: Any) -> dict[str, Any]:
        values = {"num_blocks": self.setup.num_blocks, "block_size": self.setup.block_size}
        if self.setup.weak_hash:
            default = inspect.signature(manager_class).parameters.get("hash_function")
            if default is None:
                raise NotRecognised("the block manager's hash function is not found")
            values["hash_function"] = lambda *args: default.default(*args) % NUM_HASHES
        return values

    def _weaken(self, manager_class: Any) -> None:
        name = first_of(manager_class, HASH_FUNCTIONS)
        if name is None or first_of(manager_class, ("_conformance_hash",)):
            raise NotRecognised(f"the block manager has no hash function of the names {HASH_FUNCTIONS}")
        strong = getattr(manager_class, name)
        setattr(manager_class, name, staticmethod(lambda *args, **options: strong(*args, **options) % NUM_HASHES))
        self._restore_hash = lambda: setattr(manager_class, name, staticmethod(strong))

    def close(self) -> None:
        """Give the target's class its hash function back."""
        restore = getattr(self, "_restore_hash", None)
        if restore is not None:
            restore()

    def make_sequence(self, tokens: list[int], temperature: float, max_tokens: int, ignore_eos: bool) -> Any:
        params = self._params(temperature, max_tokens, ignore_eos)
        self._num_made += 1
        values: dict[str, Any] = {
            "temperature": temperature,
            "max_tokens": max_tokens,
            "ignore_eos": ignore_eos,
            "token_ids": tokens,
            "prompt_token_ids": tokens,
            "sampling_params": params,
            "params": params,
            "block_size": self.setup.block_size,
            "seq_id": self._num_made,
            "request_id": str(self._num_made),
            "seed": 0,
        }
        return call_with(self.sequence_class, values, "Sequence", self.config)

    def add(self, tokens: list[int], temperature: float, max_tokens: int, ignore_eos: bool) -> Any:
        """Add a request, with the checks of LLMEngine.add_request if that runs here. Returns its sequence."""
        if not self._can_submit():
            seq = self.make_sequence(tokens, temperature, max_tokens, ignore_eos)
            self.scheduler.add(seq)
            return seq
        return self._submit(tokens, self._params(temperature, max_tokens, ignore_eos))

    def _can_submit(self) -> bool:
        """Found out once a process, with another scheduler. The reason why not is found["no_submit"]."""
        if "no_submit" not in self.found:
            self.found["no_submit"] = "it is being tried"
            self.found["no_submit"] = self._reason_against_submit()
        return not self.found["no_submit"]

    def _reason_against_submit(self) -> str:
        if "LLMEngine" not in self.found:
            return self.found["reasons"].get("LLMEngine", "") or "no class LLMEngine"
        try:
            trial = Adapter(self.found, self.setup)
            seq = trial._submit([1, 1], trial._params(1.0, 1, False))
            return "" if len(seq) == 2 else "LLMEngine.add_request makes another sequence of the tokens"
        except Exception as error:
            return f"LLMEngine.add_request does not run without an engine: {type(error).__name__}: {error}"

    def _submit(self, tokens: list[int], params: Any) -> Any:
        engine = object.__new__(self.found["LLMEngine"])
        tokenizer = SimpleNamespace(eos_token_id=EOS, encode=list)
        for name, value in {"scheduler": self.scheduler, "config": self.config, "tokenizer": tokenizer}.items():
            setattr(engine, name, value)
        before = self.waiting
        values = dict.fromkeys(PROMPTS, tokens) | {"sampling_params": params, "params": params}
        call_with(engine.add_request, values, "add_request", self.config)
        added = [seq for seq in self.waiting if not any(seq is other for other in before)]
        if len(added) != 1:
            raise NotRecognised(f"LLMEngine.add_request adds {len(added)} sequences to the waiting queue")
        return added[0]

    def _params(self, temperature: float, max_tokens: int, ignore_eos: bool) -> Any:
        values = {"temperature": temperature, "max_tokens": max_tokens, "ignore_eos": ignore_eos}
        return (
            call_with(self.found["SamplingParams"], values, "SamplingParams")
            if "SamplingParams" in self.found
            else None
        )

    # --- state ---

    def queue(self, name: str | None) -> list[Any]:
        """The sequences of a queue in its order; a priority queue holds tuples with a sequence."""
        if name is None:
            return []
        queue = getattr(self.scheduler, name)
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
    def waiting(self) -> list[Any]:
        return self.queue(self.waiting_name)

    @property
    def running(self) -> list[Any]:
        return self.queue(self.running_name)

    @property
    def swapped(self) -> list[Any]:
        return self.queue(self.swapped_name)

    @property
    def can_swap(self) -> bool:
        return self.swapped_name is not None or hasattr(self.manager, "swap_out")

    @property
    def is_first_come_first_served(self) -> bool:
        queue = getattr(self.scheduler, self.waiting_name or "")
        return hasattr(queue, "popleft") and hasattr(queue, "appendleft")

    def is_finished(self, seq: Any) -> bool:
        value = getattr(seq, "is_finished", None)
        if value is None:
            return getattr(seq.status, "name", "") == "FINISHED"
        return bool(value() if callable(value) else value)

    def ref_counts(self) -> list[int] | None:
        name = first_of(self.manager, BLOCK_LISTS)
        blocks = getattr(self.manager, name) if name else None
        if not blocks or not hasattr(next(iter(blocks)), "ref_count"):
            return None
        return [block.ref_count for block in blocks]

    def free_blocks(self) -> list[int] | None:
        """Blocks that a new request may take, also those that hold a cached prefix until then."""
        empty = self.empty_blocks()
        other = first_of(self.manager, EVICTABLE_BLOCKS)
        if empty is None or other is None:
            return empty
        blocks = getattr(self.manager, other)
        ids = blocks.values() if isinstance(blocks, Mapping) else blocks
        return empty + [getattr(block, "block_id", block) for block in ids]

    def empty_blocks(self) -> list[int] | None:
        name = first_of(self.manager, FREE_BLOCKS)
        return list(getattr(self.manager, name)) if name else None

    # --- a step ---

    def schedule(self) -> tuple[Any, list[Scheduled]]:
        """What schedule() returned, and the sequences in it."""
        if self.no_step:
            raise NotRecognised(self.no_step)
        result = self.scheduler.schedule()
        return result, self._read(result)

    def is_ahead(self, batch: list[Scheduled]) -> bool:
        """Whether the next step may be scheduled before the tokens of this one are known: all have placeholders."""
        names = [first_of(item.seq, PLACEHOLDERS) for item in batch]
        have = [name is not None and getattr(item.seq, name) for name, item in zip(names, batch, strict=True)]
        return bool(have) and all(have)

    def schedule_next(self, front: Any) -> tuple[Any, list[Scheduled]]:
        """The step behind `front`, which schedule_next returned or schedule did; (None, []) if there is none yet."""
        result = getattr(self.scheduler, str(self.next_step_name))(front)
        return result, [] if result is None else self._read(result)

    def commit(self, result: Any) -> tuple[Any, list[Any]]:
        """What is left of a step ahead, and of its sequences, once the tokens of the step in front are known."""
        result = getattr(self.scheduler, str(first_of(self.scheduler, COMMIT)))(result)
        return result, list(getattr(result, str(first_of(result, BATCH_SEQUENCES))))

    @property
    def next_step_name(self) -> str | None:
        return first_of(self.scheduler, NEXT_STEP) if first_of(self.scheduler, COMMIT) else None

    def cache_entries(self) -> dict[int, list[int]]:
        """Block -> the tokens that the prefix cache says it holds. Empty where the blocks do not say that."""
        name = first_of(self.manager, BLOCK_LISTS)
        blocks = getattr(self.manager, name) if name else []
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
        if isinstance(result, tuple) and len(result) in (2, 4) and isinstance(result[1], bool):
            if len(result) == 4 and self.swapped_name is None:
                raise NotRecognised(f"schedule() returns {describe(result)}; no table of adapters.py knows that")
            return [self._scheduled(seq, result[1]) for seq in result[0]]
        if isinstance(result, tuple) and len(result) == 2 and all(isinstance(part, list) for part in result):
            return [self._scheduled(seq, part is result[0]) for part in result for seq in part]
        if isinstance(result, list):
            return [self._scheduled(seq, None) for seq in result]
        name = first_of(result, BATCH_SEQUENCES)
        if name is None or isinstance(result, tuple):
            raise NotRecognised(f"schedule() returns {describe(result)}; no table of adapters.py knows that")
        sequences = list(getattr(result, name))
        if hasattr(result, "is_prefill"):
            return [self._scheduled(seq, result.is_prefill) for seq in sequences]
        count = first_of(result, PREFILL_COUNTS)
        if count is not None:
            return [self._scheduled(seq, index < getattr(result, count)) for index, seq in enumerate(sequences)]
        return [self._scheduled(seq, None) for seq in sequences]

    def _prefills(self, seq: Any) -> bool:
        value = getattr(seq, "is_prefill", None)
        if value is not None:
            return bool(value() if callable(value) else value)
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
        is_sampled = [item.start + item.count == len(item.seq) for item in batch]
        rows = [row for row, wanted in enumerate(is_sampled) if wanted]
        needs_sampling = all(hasattr(item.seq, "needs_sampling") for item in batch)
        takes_rows = any(name in SAMPLED_ROWS for name in parameters)
        if hasattr(result, "sampled_sequences") or takes_rows or (is_object and needs_sampling):
            tokens = [tokens[row] for row in rows]
        takes_sequences = not is_object or next(iter(parameters), "") in STEP_SEQUENCES
        values: list[Any] = [[item.seq for item in batch] if takes_sequences else result, tokens]
        rest = list(result[1:]) if isinstance(result, tuple) else []
        for name, parameter in list(parameters.items())[2:]:
            if name in SAMPLED_ROWS:
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

    def abort_name(self) -> str | None:
        return first_of(self.scheduler, ABORTS)


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
