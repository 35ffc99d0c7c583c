"""The checks of a prepared step: the integers that the model would get, on each rank, one contract each."""

import pickle
from itertools import accumulate
from typing import Any

from tests.conformance.components.adapters.preparing import UNKNOWN_STEPS, Prepared, UnknownStep
from tests.conformance.components.adapters.steps import Scheduled
from tests.conformance.components.loading import NotRecognised

INPUT_CONTRACTS = ("C30", "C33", "C34", "C35", "C36", "C37", "C38", "C39", "C40")
NOT_STORED = -1  # in a slot mapping: the key and value are there already


def skip_inputs(target: Any, reason: str) -> None:
    for contract in INPUT_CONTRACTS:
        target.skip(contract, reason)


def check_inputs(target: Any, result: Any, batch: list[Scheduled]) -> None:
    """What the model of this rank gets, and what those of the other ranks get."""
    copy, copies = _check_pickle(target, result, batch)
    if "C33" in target.not_applicable:
        return
    try:
        prepared = target.prepare(result, batch)
    except UnknownStep as reason:
        return target.skip(UNKNOWN_STEPS, str(reason))
    except NotRecognised as error:
        return skip_inputs(target, str(error))
    except AttributeError as error:
        return skip_inputs(target, f"the preparation needs more of ModelRunner than the adapter gives it: {error}")
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        return target.broken("C33", f"the preparation of the step raises {what}")
    _check_integers(target, batch, prepared)
    target.check("C30")
    try:
        copied = target.prepare(copy, copies, is_worker=True)
    except NotRecognised as error:
        return target.skip("C30", str(error))
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        return target.broken("C30", f"the step cannot be prepared from the pickled sequences: {what}")
    if copied != prepared._replace(temperatures=None):
        target.broken("C30", "the step that a worker prepares from the pickled sequences is another one")


def _check_pickle(target: Any, result: Any, batch: list[Scheduled]) -> tuple[Any, list[Scheduled]]:
    """What the workers get: the sequences, and what schedule() returned if that is an object."""
    sequences = [item.seq for item in batch]
    tokens = [list(getattr(seq, "token_ids", [])) for seq in sequences]
    target.check("C29")
    sent = None if isinstance(result, tuple | list) else result
    copy, copies = target.guarded(lambda: pickle.loads(pickle.dumps((sent, sequences))), "pickle")
    if tokens != [list(getattr(seq, "token_ids", [])) for seq in sequences]:
        target.broken("C29", "token_ids of the sequence have changed")
    copies = [item._replace(seq=seq) for item, seq in zip(batch, copies, strict=True)]
    return result if sent is None else copy, copies


def _check_integers(target: Any, batch: list[Scheduled], got: Prepared) -> None:
    def same(contract: str, what: str, found: Any, right: Any) -> None:
        target.check(contract)
        if found != right:
            target.broken(contract, f"{what} is {found}, and must be {right}")

    cache = target.cache
    tokens, positions, slots, stored = [], [], [], []
    for item in batch:
        span = range(item.start, item.end)
        request = target.request_of(item.seq)
        for position in span:
            is_in_flight = position >= len(request.known) and len(tokens) < len(got.input_ids)
            tokens.append(got.input_ids[len(tokens)] if is_in_flight else request.tokens[position])
        positions += span
        slots += [cache.slot(item.seq.block_table, position) for position in span]
        stored += [position >= item.first_stored for position in span]
    same("C33", "input_ids", got.input_ids, tokens)
    same("C34", "positions", got.positions, positions)
    expected = [
        NOT_STORED if slot == NOT_STORED and not is_stored else right
        for slot, right, is_stored in zip(got.slots, slots, stored, strict=False)
    ]
    same("C35", "slot_mapping", got.slots, expected if len(expected) == len(slots) else slots)
    prefill = [item for item in batch if item.is_prefill or got.is_unified]
    decode = [item for item in batch if not item.is_prefill or (got.is_unified and got.context_lens)]
    if prefill:
        same("C36", "cu_seqlens_q", got.cu_seqlens_q, [0, *accumulate(item.count for item in prefill)])
        same("C37", "cu_seqlens_k", got.cu_seqlens_k, [0, *accumulate(item.end for item in prefill)])
        if any(item.start for item in prefill):
            _check_tables(target, "prefill", prefill, got.prefill_tables)
    if decode:
        ends = [item.end if got.is_unified else len(target.request_of(item.seq).tokens) for item in decode]
        same("C38", "context_lens", got.context_lens, ends)
        if not got.is_unified:
            _check_tables(target, "decode", decode, got.decode_tables)
    if got.temperatures is None:
        target.skip("C40", "ModelRunner has no prepare_sample that returns temperatures")
        return
    requests = [target.request_of(item.seq) for item in batch]
    temperatures = [request.temperature for request in requests]
    sampled = [r.temperature for r, item in zip(requests, batch, strict=True) if item.end == len(r.tokens)]
    same("C40", "temperatures", got.temperatures, sampled if len(got.temperatures) == len(sampled) else temperatures)


def _check_tables(target: Any, kind: str, batch: list[Scheduled], tables: list[list[int]] | None) -> None:
    target.expect("C39", tables is not None, f"a {kind} step reads cached keys, and has no block tables")
    if tables is None:
        return
    size = target.setup.block_size
    for row, item in zip(tables, batch, strict=False):
        needed, table = -(-item.end // size), list(item.seq.block_table)
        if row[:needed] != table[:needed]:
            target.broken("C39", f"a row of block_tables is {row}, and the block table {table}")
    if len(tables) != len(batch):
        target.broken("C39", f"{len(tables)} rows of block_tables for {len(batch)} sequences")
