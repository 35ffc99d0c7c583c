"""Shapes of forks: those that a table of adapters.py declares are checked, the others are not applicable."""

from itertools import chain
from pathlib import Path

import pytest

from tests.conformance.components.contracts import AHEAD, CONTRACTS
from tests.conformance.components.document import SEED
from tests.conformance.components.examine import NOT_APPLICABLE
from tests.conformance.components.loading import NotRecognised, find_package
from tests.conformance.components.running import names, plant, verdicts_of
from tests.conformance.components.targets.faults import ASYNC, BLOCKS, RUNNER, SCHEDULER, Fault

_RETURN = "return (batch, True) if batch else (self._schedule_decode(), False)"
_OUTPUT = """\
from types import SimpleNamespace

        seqs = batch or self._schedule_decode()
        return SimpleNamespace(scheduled_seqs=seqs, num_prefills=len(batch), num_tokens=0)"""
_POSTPROCESS = "def postprocess(self, seqs: list[Sequence], token_ids: list[int], is_prefill: bool):\n"
_SWAP = """\
    def swap_out(self, seq: Sequence) -> list[tuple[int, int]]:
        pairs = [(block_id, self.free_places.popleft()) for block_id in seq.block_table]
        kept = seq.num_cached_tokens
        self.deallocate(seq)
        seq.num_cached_tokens = kept
        seq.places = [place for _, place in pairs]
        return pairs

    def swap_in(self, seq: Sequence) -> list[tuple[int, int]]:
        seq.block_table = [self._take_free_block() for _ in seq.places]
        self.free_places += seq.places
        return list(zip(seq.places, seq.block_table, strict=True))

    def can_append("""
_SCHEDULE = """\
    def schedule(self):
        self.swap_out_pairs, swap_in_pairs = [], []
        while self.swapped and len(self.running) < self.max_num_seqs:
            if len(self.block_manager.free_block_ids) < self.swapped[0].num_blocks:
                break
            self.running.append(self.swapped.popleft())
            swap_in_pairs += self.block_manager.swap_in(self.running[-1])
        seqs, is_prefill = self.choose()
        swap_out_pairs = self.swap_out_pairs
        return seqs, is_prefill, swap_in_pairs, swap_out_pairs

    def choose("""
_SWAPPING = (
    (BLOCKS, "    def can_append(", _SWAP),
    (
        BLOCKS,
        "        self.hash_to_block_id: dict",
        "        self.free_places = deque(range(64))\n        self.hash_to_block_id: dict",
    ),
    (SCHEDULER, "    def schedule(", _SCHEDULE),
    (
        SCHEDULER,
        "        self.num_prefills = 0\n\n",
        "        self.num_prefills = 0\n        self.swapped = deque()\n\n",
    ),
    (SCHEDULER, "return not seq.is_prefill\n", "return not seq.is_prefill and seq not in self.swapped\n"),
    (SCHEDULER, "while budget and self.waiting", "while budget and not self.swapped and self.waiting"),
    (SCHEDULER, "        seq.is_prefill = True\n        self.block_manager.deallocate(seq)\n", ""),
    (
        SCHEDULER,
        "self.waiting.appendleft(seq)",
        "self.swap_out_pairs += self.block_manager.swap_out(seq)\n        self.swapped.appendleft(seq)",
    ),
    (
        SCHEDULER,
        "queue = self.running if seq in self.running else self.waiting",
        "queue = next(q for q in (self.running, self.waiting, self.swapped) if seq in q)",
    ),
    (SCHEDULER, "[*self.running, *self.waiting]", "[*self.running, *self.waiting, *self.swapped]"),
)
_LOST = ("return list(zip(seq.places, seq.block_table", "return list(zip(seq.places[::-1], seq.block_table")
# Clean, though they are not upstream's.
KNOWN = {
    "blocks that are moved to the CPU": Fault("", *chain(*_SWAPPING)),
    "an object with the number of prefills": Fault(
        "",
        SCHEDULER,
        _RETURN,
        _OUTPUT,
        SCHEDULER,
        _POSTPROCESS,
        (
            "def postprocess(self, output, token_ids: list[int]):\n"
            "        seqs, is_prefill = output.scheduled_seqs, output.num_prefills > 0\n"
        ),
    ),
    "inputs that one method prepares": Fault(
        "",
        RUNNER,
        "def prepare_prefill(",
        (
            "def prepare_inputs(self, seqs):\n"
            "        return (self.prefill_inputs if seqs[0].is_prefill else self.decode_inputs)(seqs)\n\n"
            "    def prefill_inputs("
        ),
        RUNNER,
        "def prepare_decode(",
        "def decode_inputs(",
    ),
    "a Config that refuses to be made here": Fault("", "config.py", "if not os.path.isdir(self.model):", "if True:"),
    "a package that is not installed": Fault(
        "", RUNNER, "import torch.distributed as dist\n", "import torch.distributed as dist\nimport made_up_kernels\n"
    ),
}
# Schedulers that run ahead of the model; of the second it is not known how it counts the tokens in flight.
_OBJECT = "output = super().schedule()\n        seqs, is_prefill = output.scheduled_seqs, output.is_prefill"
AHEAD_SHAPES = {
    "an object with is_prefill, and postprocess of three": Fault(
        "",
        SCHEDULER,
        _RETURN,
        _OUTPUT.replace("num_prefills=len(batch)", "is_prefill=bool(batch)"),
        ASYNC,
        "seqs, is_prefill = super().schedule()",
        _OBJECT,
        ASYNC,
        "return seqs, is_prefill",
        "return output",
    ),
    "placeholders of another name": Fault(
        "",
        ASYNC,
        "if not is_prefill:\n            for seq in seqs:\n",
        "for seq in []:\n            for seq in seqs:\n",
    ),
}
UNKNOWN = {
    "a tuple of four": (
        Fault("", SCHEDULER, _RETURN, "return batch or self._schedule_decode(), bool(batch), [], []"),
        "a tuple of 4",
    ),
    "queues of another name": (
        Fault(
            "",
            SCHEDULER,
            "self.num_prefills = 0\n\n",
            "self.num_prefills = 0\n        self.__dict__['lane'] = self.__dict__.pop('waiting')\n\n",
        ),
        "none of the queues",
    ),
    "a scheduler with an argument that nothing gives": (
        Fault("", SCHEDULER, "def __init__(self, config: Config):", "def __init__(self, config: Config, connector):"),
        "Scheduler needs 'connector'",
    ),
    "a scheduler that moves blocks to the CPU": (
        Fault("", SCHEDULER, "self.num_prefills = 0\n\n", "self.num_prefills = 0\n        self.swapped = deque()\n\n"),
        "the block manager no swap_",
    ),
}


def test_known_shapes_are_checked_whole_and_unknown_ones_not_applicable(tmp_path: Path) -> None:
    """Those of KNOWN have no scheduler that runs ahead."""
    lost = Fault("", *chain(*((file, old, new.replace(*_LOST)) for file, old, new in _SWAPPING)))
    shapes = KNOWN | AHEAD_SHAPES | {name: fault for name, (fault, _) in UNKNOWN.items()} | {"lost": lost}
    paths = plant(shapes, tmp_path)
    for path in paths[: len(KNOWN)]:
        (path / "smallvllm" / ASYNC).unlink()
    found = dict(zip(shapes, verdicts_of(*paths, scenarios=60, seed=SEED), strict=True))

    ahead = [name for name, contract in CONTRACTS.items() if contract.group == AHEAD]
    for name in KNOWN:
        assert (names(found[name], NOT_APPLICABLE), names(found[name], "broken")) == (ahead, []), name
        assert found[name]["C42"]["reason"].startswith("Scheduler chooses no step ahead in a way that is known")

    known, unknown = (found[name] for name in AHEAD_SHAPES)
    assert names(known, "holds") == list(CONTRACTS)
    assert unknown["C41"]["verdict"] == NOT_APPLICABLE
    assert "AsyncScheduler" in unknown["C41"]["reason"]

    drawn = {name for name, contract in CONTRACTS.items() if not contract.script}
    for name, (_, reason) in UNKNOWN.items():
        assert {found[name][contract]["verdict"] for contract in drawn} == {NOT_APPLICABLE}, name
        assert all(reason in found[name][contract]["reason"] for contract in drawn), found[name]["C01"]["reason"]

    assert "C06" in names(found["lost"], "broken"), "a block that comes back to the wrong place"


def test_package_is_found_by_its_scheduler(tmp_path: Path) -> None:
    for folder in ("src/tiny", "tests/other", ".venv/nanovllm", "deep/down/there"):
        (tmp_path / folder / "engine").mkdir(parents=True)
        (tmp_path / folder / "engine" / "scheduler.py").touch()
    assert find_package(tmp_path) == tmp_path / "src" / "tiny"


def test_folder_without_a_scheduler_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotRecognised, match=r"has no PACKAGE/engine/scheduler\.py"):
        find_package(tmp_path)
