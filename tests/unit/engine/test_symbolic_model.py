"""The symbolic model as an instrument: faults change what comes out."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.model_input import ModelInput, prepare_decode, prepare_prefill
from nanovllm.engine.sequence import Sequence
from tests.support import symbolic_model
from tests.unit.engine.long_runs import MachineWithCollisions, long_run


def change_input(monkeypatch: pytest.MonkeyPatch, **changes: Callable[[ModelInput], Any]) -> None:
    """Let the named fields of ModelInput become what the functions make of it."""
    for prepare in (prepare_prefill, prepare_decode):

        def faulty(sequences: Any, prepare: Any = prepare) -> ModelInput:
            inputs = prepare(sequences)
            return replace(inputs, **{name: change(inputs) for name, change in changes.items()})

        monkeypatch.setattr(symbolic_model, prepare.__name__, faulty)


def find_without_parent(self: BlockManager, hash_value: int, token_ids: list[int], parent: int | None) -> Any:
    candidates = (self.blocks[block_id] for block_id in self.hash_to_block_ids.get(hash_value, ()))
    return next((block for block in candidates if block.token_ids == token_ids), None)


def last_tokens(seq: Sequence) -> list[int]:
    return seq.token_ids[-seq.num_scheduled_tokens :]


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "slots one too far (D01)": lambda patch: change_input(
        patch, slot_mapping=lambda x: np.where(x.slot_mapping > 0, x.slot_mapping - 1, 0)
    ),
    "the longest key length too short": lambda patch: change_input(patch, max_seqlen_k=lambda x: x.max_seqlen_k - 1),
    "a sequence left out": lambda patch: change_input(patch, sequence_order=lambda x: x.sequence_order[:-1]),
    "block tables in another order": lambda patch: change_input(
        patch, block_tables=lambda x: np.roll(x.block_tables, 1, axis=0)
    ),
    "seeds of the neighbour (D57)": lambda patch: change_input(
        patch, sampling=lambda x: replace(x.sampling, seed_low=np.roll(x.sampling.seed_low, 1))
    ),
    "pickled without the right tokens (D04)": lambda patch: patch.setattr(
        Sequence, "scheduled_token_ids", property(last_tokens)
    ),
    "hit without its parent (D09)": lambda patch: patch.setattr(BlockManager, "_find", find_without_parent),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_changes_what_comes_out(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def search() -> None:
        for seed in range(50):
            long_run(MachineWithCollisions(), random.Random(seed), is_async=False)

    FAULTS[fault](monkeypatch)
    with pytest.raises((AssertionError, RuntimeError), match=r"read what it should not|invariant broken"):
        search()
