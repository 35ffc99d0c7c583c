"""Steps: what schedule() returns, as rows of one type, and what postprocess() is given, in the shapes of forks."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from tests.conformance.components.adapters import names, submission
from tests.conformance.components.loading import NotRecognised


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

    @property
    def first_stored(self) -> int:
        """The first position whose key the step stores; what lies before is in a shared block."""
        return max(self.start, getattr(self.seq, "num_tokens_with_kv", 0) if self.is_prefill else 0)


def have_placeholders(batch: list[Scheduled]) -> bool:
    """Whether the next step may be scheduled before the tokens of this one are known."""
    return bool(batch) and all(names.first_value(item.seq, names.PLACEHOLDERS) for item in batch)


def read(adapter: Any, result: Any) -> list[Scheduled]:
    """The sequences of a step in each of the shapes that schedule() returns."""
    sequences, count = names.first_value(result, names.BATCH_SEQUENCES), names.first_value(result, names.PREFILL_COUNTS)
    if isinstance(result, tuple):
        if len(result) in (2, 4 if adapter.swapped_name else 2) and isinstance(result[1], bool):
            return [_scheduled(adapter, seq, result[1]) for seq in result[0]]
        if len(result) == 2 and all(isinstance(part, list) for part in result):
            return [_scheduled(adapter, seq, part is result[0]) for part in result for seq in part]
    elif isinstance(result, list):
        return [_scheduled(adapter, seq, None) for seq in result]
    elif hasattr(result, "is_prefill") and sequences is not None:
        return [_scheduled(adapter, seq, result.is_prefill) for seq in sequences]
    elif sequences is not None:
        return [_scheduled(adapter, seq, None if count is None else i < count) for i, seq in enumerate(sequences)]
    raise NotRecognised(f"schedule() returns {names.describe(result)}; no table of adapters/ knows that")


def _scheduled(adapter: Any, seq: Any, is_prefill: bool | None) -> Scheduled:
    """is_prefill: None if the sequence itself has to say it."""
    count_name = adapter.once("count_name", _count_name)
    if is_prefill is None:
        is_prefill = names.flag(seq, "is_prefill")
    if is_prefill is None:
        if count_name is None:
            raise NotRecognised("nothing says which sequences of a step are in prefill")
        is_prefill = seq.num_cached_tokens < max(seq.num_prompt_tokens, len(seq) - 1)
    if count_name is not None:
        return Scheduled(seq, seq.num_cached_tokens, getattr(seq, count_name), bool(is_prefill))
    start = seq.num_cached_tokens if is_prefill else len(seq) - 1
    return Scheduled(seq, start, len(seq) - start, bool(is_prefill))


def _count_name(trial: Any) -> str | None:
    """Which of COUNTS the scheduler sets. A Sequence may have one that nothing sets: of a branch merged in part."""
    seq = submission.add(trial, [1], 1.0, 1, False)
    try:
        trial.scheduler.schedule()
    except Exception:
        return names.first_of(seq, names.COUNTS)
    return next((name for name in names.COUNTS if getattr(seq, name, 0)), None)


def takes_sequences(parameters: Iterable[str], result: Any) -> bool:
    """Whether the first argument is the sequences of a step, and not what schedule() returned."""
    return isinstance(result, tuple | list) or next(iter(parameters), "") in names.STEP_SEQUENCES


def postprocess(adapter: Any, result: Any, batch: list[Scheduled], tokens: list[int]) -> None:
    """tokens: one for each sequence of the batch, also for those that get none in this step."""
    parameters = adapter.postprocess_parameters
    rows = [row for row, item in enumerate(batch) if item.end == len(item.seq)]
    needs_sampling = not isinstance(result, tuple | list) and all(hasattr(item.seq, "needs_sampling") for item in batch)
    if needs_sampling or hasattr(result, "sampled_sequences") or names.SAMPLED_ROWS in parameters:
        tokens = [tokens[row] for row in rows]
    is_given_sequences = takes_sequences(parameters, result)
    values: list[Any] = [[item.seq for item in batch] if is_given_sequences else result, tokens]
    rest = list(result[1:]) if isinstance(result, tuple) else []
    for name, parameter in list(parameters.items())[2:]:
        if name == names.SAMPLED_ROWS:
            values.append(rows)
        elif name == "is_prefill" and is_given_sequences and not rest:
            values.append(getattr(result, "is_prefill", batch[0].is_prefill))
        elif rest:
            values.append(rest.pop(0))
        elif parameter.default is not parameter.empty or parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
            break
        else:
            raise NotRecognised(f"postprocess takes {list(parameters)}, and no table knows {name!r}")
    adapter.scheduler.postprocess(*values)
