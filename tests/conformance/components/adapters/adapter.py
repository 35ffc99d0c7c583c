"""Adapter: one scheduler of the target, with its queues and blocks, behind one set of names."""

import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any

from tests.conformance.components.adapters import names, steps
from tests.conformance.components.adapters.construction import make_config, make_scheduler
from tests.conformance.components.adapters.steps import Scheduled
from tests.conformance.components.loading import NotRecognised
from tests.conformance.components.sizes import Setup


class Adapter:
    def __init__(self, found: dict[str, Any], setup: Setup) -> None:
        for role in ("Scheduler", "Sequence"):
            if role not in found:
                reason = found["reasons"].get(role, f"no class {role} in the package {found['package'].name}")
                raise NotRecognised(reason)
        self.found = found
        self.setup = setup
        self.sequence_class = found["Sequence"]
        self.config = make_config(found, setup)
        block_size = vars(self.sequence_class).get("block_size")
        if block_size is not None and not isinstance(block_size, property):  # upstream's, which LLMEngine sets
            self.sequence_class.block_size = setup.block_size
        self.scheduler = make_scheduler(found, setup, self.config)
        if None in (names.first_of(self.scheduler, queue) for queue in (names.WAITING, names.RUNNING)):
            raise NotRecognised(f"the scheduler has none of the queues {names.WAITING} or none of {names.RUNNING}")
        self.swapped_name = names.first_of(self.scheduler, names.SWAPPED)
        self.manager = names.first_value(self.scheduler, names.BLOCK_MANAGERS)
        if self.manager is None:
            raise NotRecognised(f"the scheduler has none of {names.BLOCK_MANAGERS}")
        self.runs_behind = hasattr(self.scheduler, names.NEXT_STEP) and hasattr(self.scheduler, names.COMMIT)
        self.ids = itertools.count(1)
        self.no_step = ""  # why the steps of this scheduler cannot be followed
        self.postprocess_parameters = inspect.signature(self.scheduler.postprocess).parameters

    def once(self, name: str, find: Callable[["Adapter"], Any]) -> Any:
        """What find(another scheduler of the target) returns, which is asked once a process."""
        if name not in self.found:
            self.found[name] = find(Adapter(self.found, self.setup))
        return self.found[name]

    # --- state ---

    def queue(self, queue_names: tuple[str, ...]) -> list[Any]:
        """The sequences of a queue in its order; a priority queue holds tuples with a sequence. Empty if none is."""
        queue = names.first_value(self.scheduler, queue_names) or []
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
        queue = names.first_value(self.scheduler, names.WAITING)
        return hasattr(queue, "popleft") and hasattr(queue, "appendleft")

    def is_finished(self, seq: Any) -> bool:
        value = names.flag(seq, "is_finished")
        return getattr(seq.status, "name", "") == "FINISHED" if value is None else bool(value)

    def ref_counts(self) -> list[int] | None:
        blocks = getattr(self.manager, "blocks", None)
        if not blocks or not hasattr(next(iter(blocks)), "ref_count"):
            return None
        return [block.ref_count for block in blocks]

    def free_blocks(self) -> list[int] | None:
        """Blocks that a new request may take, also those that hold a cached prefix until then."""
        empty, others = self.empty_blocks(), names.first_value(self.manager, names.EVICTABLE_BLOCKS)
        if empty is None or others is None:
            return empty
        ids = others.values() if isinstance(others, Mapping) else others
        return empty + [getattr(block, "block_id", block) for block in ids]

    def empty_blocks(self) -> list[int] | None:
        blocks = names.first_value(self.manager, names.FREE_BLOCKS)
        return None if blocks is None else list(blocks)

    # --- a step ---

    def schedule(self) -> tuple[Any, list[Scheduled]]:
        """What schedule() returned, and the sequences in it."""
        if self.no_step:
            raise NotRecognised(self.no_step)
        result = self.scheduler.schedule()
        return result, steps.read(self, result)

    def schedule_next(self, front: Any) -> tuple[Any, list[Scheduled]]:
        """The step behind `front`, which schedule_next returned or schedule did; (None, []) if there is none yet."""
        result = getattr(self.scheduler, names.NEXT_STEP)(front)
        return result, [] if result is None else steps.read(self, result)

    def commit(self, result: Any) -> tuple[Any, list[Any]]:
        """What is left of a step ahead, and of its sequences, once the tokens of the step in front are known."""
        result = getattr(self.scheduler, names.COMMIT)(result)
        return result, list(names.first_value(result, names.BATCH_SEQUENCES))

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

    @property
    def abort_name(self) -> str | None:
        return names.first_of(self.scheduler, names.ABORTS)


def _watched(function: Callable[..., Any], is_out: bool, moved: Callable[..., None]) -> Callable[..., Any]:
    def watched(*args: Any, **options: Any) -> Any:
        result = function(*args, **options)
        pairs = list(result.items()) if isinstance(result, dict) else result
        if not isinstance(pairs, list) or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
            raise NotRecognised(f"{function.__name__} returns {names.describe(result)}, and not which blocks it moves")
        moved(is_out, pairs)
        return result

    return watched
