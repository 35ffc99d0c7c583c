"""Shapes that real forks have and that were once misread: each is clean, and a fault in it is found."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.conformance.components.contracts import AHEAD, CONTRACTS
from tests.conformance.components.document import SEED
from tests.conformance.components.examine import NOT_APPLICABLE
from tests.conformance.components.running import names, plant, run_checks, verdicts_of
from tests.conformance.components.targets.faults import (
    ASYNC,
    BLOCKS,
    FAULTS,
    PARAMS,
    RUNNER,
    SCHEDULER,
    SEQUENCE,
    Fault,
)
from tests.support.source_tree import ROOT

CONFIG = "config.py"
COUNT = "num_scheduled_tokens"
AHEAD_CONTRACTS = [name for name, contract in CONTRACTS.items() if contract.group == AHEAD]
_INIT_COUNT = f"self.{COUNT} = 0\n"
_WHOLE_PROMPTS = (
    SCHEDULER,
    "if not self.block_manager.can_allocate(seq):",
    "if budget < len(seq) or not self.block_manager.can_allocate(seq):",
)
# A block that holds a cached prefix leaves the list of free ones for another, and is taken when that is empty.
_TAKE = (
    BLOCKS,
    "block_id = self.free_block_ids.popleft()",
    "block_id = (self.free_block_ids or self.cached).popleft()",
)
_CACHED = (
    BLOCKS,
    "        self.free_block_ids = deque(range(num_blocks))\n",
    "        self.free_block_ids = deque(range(num_blocks))\n        self.cached = deque()\n",
    BLOCKS,
    "self.free_block_ids.append(block_id)",
    "(self.cached if block.prefix else self.free_block_ids).append(block_id)",
    BLOCKS,
    "self.free_block_ids.remove(block_id)",
    "self.cached.remove(block_id)",
    BLOCKS,
    "return len(self.free_block_ids) >= seq.num_blocks - len(shared)",
    "return len(self.free_block_ids) + len(self.cached) >= seq.num_blocks - len(shared)",
    BLOCKS,
    "return len(self.free_block_ids) >= seq.num_blocks - len(seq.block_table)",
    "return len(self.free_block_ids) + len(self.cached) >= seq.num_blocks - len(seq.block_table)",
)
# How long a chunk is follows from another option, unless it is given.
_CHUNKS = (
    CONFIG,
    "    prefills_in_a_row: int = 4",
    "    chunk_size: int = 0\n    prefills_in_a_row: int = 4",
    CONFIG,
    "        if self.kvcache_block_size % 256:",
    "        self.chunk_size = self.chunk_size or self.max_num_batched_tokens\n"
    "        if self.kvcache_block_size % 256:",
    SCHEDULER,
    "budget = self.max_num_batched_tokens",
    "budget = self.chunk_size",
    SCHEDULER,
    "        self.eos = config.eos\n",
    "        self.eos = config.eos\n        self.chunk_size = config.chunk_size\n",
)
# Prefill and decode are prepared by one method, and no sequence says in which of them it is.
_UNIFIED = (
    SEQUENCE,
    "tokens = self.token_ids if self.is_prefill else self.last_token",
    "tokens = self.token_ids",
    RUNNER,
    "            cu_seqlens_k.append(cu_seqlens_k[-1] + end)\n",
    "            cu_seqlens_k.append(cu_seqlens_k[-1] + end)\n            lengths.append(end)\n",
    RUNNER,
    "slots, cu_seqlens_q, cu_seqlens_k = [], [], [], [0], [0]",
    "slots, lengths, cu_seqlens_q, cu_seqlens_k = [], [], [], [], [0], [0]",
    RUNNER,
    "            cu_seqlens_q=self.tensor(cu_seqlens_q),\n",
    "            cu_seqlens_q=self.tensor(cu_seqlens_q),\n            context_lens=self.tensor(lengths),\n",
)
# Upstream's block manager of 2025: a block is entered when it is allocated, and its old entry stays.
_ENTERS_EARLY = (
    BLOCKS,
    "            seq.block_table.append(self._take_free_block())\n\n    def deallocate",
    """\
            block = self.blocks[self._take_free_block()]
            index, parent = len(seq.block_table), -1
            seq.block_table.append(block.block_id)
            if len(seq.block(index)) == self.block_size:
                for before in range(index + 1):
                    parent = self.compute_hash(seq.block(before), parent)
                block.hash, block.token_ids, block.prefix = parent, seq.block(index), seq.prefix(index + 1)
                self.hash_to_block_id[parent] = block.block_id

    def deallocate""",
    BLOCKS,
    "if self.hash_to_block_id.get(block.hash) == block_id:",
    "if False:",
    BLOCKS,
    "self.blocks[block_id].prefix != seq.prefix(index + 1)",
    "self.blocks[block_id].token_ids != seq.block(index)",
)
_ROWS = """\
def postprocess(self, seqs: list[Sequence], token_ids: list[int], seq_need_compute_logits: list[int]):
        given = dict(zip(seq_need_compute_logits, token_ids, strict=True))
        token_ids, is_prefill = [given.get(row, -1) for row in range(len(seqs))], True
"""
_STEP = """\
from dataclasses import dataclass


@dataclass(slots=True)
class Step:
    rows: list

    @property
    def sequences(self):
        return [seq for seq, _ in self.rows]


class Scheduler:
"""
_OUTPUT = """\
def postprocess(self, step, token_ids: list[int], is_prefill: bool | None = None, seconds: float = 0.0):
        seqs, is_prefill = step.sequences, True
"""
_RETURN = "return (batch, True) if batch else (self._schedule_decode(), False)"
_POSTPROCESS = "def postprocess(self, seqs: list[Sequence], token_ids: list[int], is_prefill: bool):\n"
_BATCH = (
    RUNNER,
    "def prepare_prefill(self, seqs: list[Sequence]):\n",
    "def prepare_batch(self, step):\n        seqs = step.sequences\n",
)
_DERIVED = (
    SCHEDULER,
    "class Scheduler:\n",
    _STEP,
    SCHEDULER,
    _RETURN,
    "return Step([(seq, True) for seq in batch or self._schedule_decode()])",
    SCHEDULER,
    _POSTPROCESS,
    _OUTPUT,
)


def shape(folder: Path, fault: Fault, **renamed: str) -> Path:
    """A copy of the right target, without a scheduler that runs ahead, with names changed wherever they stand."""
    (path,) = plant({"": fault}, folder)
    (path / "smallvllm" / ASYNC).unlink()
    for file in path.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        for old, new in renamed.items():
            text = text.replace(old, new)
        file.write_text(text, encoding="utf-8")
    return path


def shapes(tmp_path: Path) -> dict[str, Path]:
    return {
        "tokens of a step under another name": shape(tmp_path / "1", Fault(""), num_scheduled_tokens="num_new_tokens"),
        "a count that nothing sets": shape(
            tmp_path / "2",
            Fault("", *_WHOLE_PROMPTS, SEQUENCE, _INIT_COUNT, f"{_INIT_COUNT}        self.num_scheduled = 0\n"),
            num_scheduled_tokens="todo",
            num_scheduled="num_scheduled_tokens",
        ),
        "cached blocks in a list of their own": shape(
            tmp_path / "3", Fault("", *_CACHED, *_TAKE), **{"self.cached": "self.cached_block_ids"}
        ),
        "an option that is derived of another": shape(tmp_path / "4", Fault("", *_CHUNKS)),
        "one preparation for all rows, and the sampled ones by number": shape(
            tmp_path / "5",
            Fault(
                "",
                *_UNIFIED,
                SCHEDULER,
                _RETURN,
                "return batch or self._schedule_decode()",
                SCHEDULER,
                _POSTPROCESS,
                _ROWS,
            ),
            **{"self.is_prefill": "self.prefills", "seq.is_prefill": "seq.prefills"},
            prepare_prefill="prepare_model_input",
            prepare_decode="prepare_other",
        ),
        "a step whose sequences are derived": shape(
            tmp_path / "6", Fault("", *_UNIFIED, *_BATCH, *_DERIVED), prepare_decode="prepare_other"
        ),
        "such a step, and a preparation of its sequences": shape(
            tmp_path / "7",
            Fault("", *_UNIFIED, *_DERIVED),
            prepare_prefill="prepare_model_input",
            prepare_decode="prepare_other",
        ),
    }


def test_shapes_of_forks_are_checked_whole_and_clean(tmp_path: Path) -> None:
    paths = shapes(tmp_path)
    found = dict(zip(paths, verdicts_of(*paths.values(), scenarios=60, seed=SEED), strict=True))
    assert {name: names(verdicts, "broken") for name, verdicts in found.items()} == {name: [] for name in paths}
    assert {tuple(names(verdicts, NOT_APPLICABLE)) for verdicts in found.values()} == {tuple(AHEAD_CONTRACTS)}


def test_faults_in_these_shapes_are_found(tmp_path: Path) -> None:
    """Cached blocks that nothing takes again; a worker that gets one token and reads all; a token after each chunk."""
    lost = shape(tmp_path / "1", Fault("", *_CACHED), **{"self.cached": "self.cached_block_ids"})
    last = shape(tmp_path / "2", Fault("", *_UNIFIED[3:], *_BATCH, *_DERIVED), prepare_decode="prepare_other")
    chunks = Fault("", *_CHUNKS, *_texts(FAULTS["C20 takes a token after each chunk"]))
    paths = (lost, last, shape(tmp_path / "3", chunks))
    blocks, pickled, chunked = verdicts_of(*paths, scenarios=60, seed=SEED)
    assert "C04" in names(blocks, "broken")
    assert "IndexError" in blocks["C04"]["message"]
    assert names(pickled, "broken") == ["C30"]
    assert names(chunked, "broken") == ["C20"]


def test_wrong_hit_on_a_block_that_the_same_step_fills_is_one(tmp_path: Path) -> None:
    """And no slot that is overwritten: the block is entered under an old hash, which nothing forgets."""
    path = shape(tmp_path, Fault("", *_ENTERS_EARLY))
    script = f"""
from tests.conformance.components.target import Target
target = Target({str(path)!r}, num_blocks=7)
for tokens in ([1, 1], [0] * 7, [1, 0, 0, 0, 1, 1], [1, 1, 0]):
    target.add(tokens, max_tokens=1)
target.step(2)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "Broken: C06: request 3 shares block 0, which request 2 fills in the same step" in result.stderr


def test_step_that_only_swaps_is_a_step(tmp_path: Path) -> None:
    """A schedule() moves a block to the CPU and back and chooses nothing; the next one goes on."""
    moves = "\n    def swap_out(self, seq):\n        return [(0, 0)]\n\n    swap_in = swap_out\n\n    def can_append("
    choose = """\
    def schedule(self) -> tuple[list[Sequence], bool]:
        if self.running and not self.has_swapped:
            self.has_swapped = bool(self.block_manager.swap_out(None) and self.block_manager.swap_in(None))
            return [], True
        return self.choose()

    def choose("""
    lines = "self.num_prefills = 0\n\n", "self.num_prefills = 0\n        self.has_swapped = False\n\n"
    swapping = (BLOCKS, "\n    def can_append(", moves, SCHEDULER, "    def schedule(", choose, SCHEDULER, *lines)
    nothing = [text.replace("return [(0, 0)]", "return []").replace("bool(", "not bool(") for text in swapping]
    paths = shape(tmp_path / "1", Fault("", *swapping)), shape(tmp_path / "2", Fault("", *nothing))
    swaps, idles = verdicts_of(*paths, scenarios=20, seed=SEED)
    assert names(swaps, "broken") == []
    assert "C16" in names(idles, "broken")


def test_swapping_that_no_scenario_comes_to_is_said(tmp_path: Path) -> None:
    methods = (
        "    def swap_out(self, seq: Sequence):\n        return []\n\n    swap_in = swap_out\n\n    def can_append("
    )
    queue = "self.num_prefills = 0\n        self.swapped = deque()\n\n"
    never = Fault("", BLOCKS, "    def can_append(", methods, SCHEDULER, "self.num_prefills = 0\n\n", queue)
    (found,) = json.loads(run_checks(*plant({"": never}, tmp_path), "--json", "--scenarios=5").stdout)["targets"]
    assert found["notes"] == [
        "blocks that are swapped to the CPU: no scenario has one, with the defaults of the fork's Config"
    ]


def test_script_says_nothing_where_another_contract_ends_it(tmp_path: Path) -> None:
    """And a reason of its own is not replaced by that of a contract that implies it."""
    late, ahead = FAULTS["C05 opens a block one token late"], FAULTS["C20 takes a token after each chunk"]
    both = Fault("", *_texts(FAULTS["C25 ignores max_model_len"]), *_texts(late))
    one_token = Fault("", PARAMS, "if self.max_tokens < 1:", "if False:")
    paths = [shape(tmp_path / str(number), fault) for number, fault in enumerate((both, ahead, one_token))]
    hidden, implied, ends = verdicts_of(*paths, scenarios=60, seed=SEED)
    assert hidden["C25"]["reason"].startswith("C05 is broken before")
    assert "C20" in names(implied, "broken")
    assert implied["C43"]["reason"].startswith("Scheduler chooses no step ahead")
    assert ends["C27"]["verdict"] == "holds", "it ends with the token that the step of its prompt computes"


def _texts(fault: Fault) -> list[Any]:
    return [text for change in fault.changes for text in change]
