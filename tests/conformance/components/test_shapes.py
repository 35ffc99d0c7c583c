"""Shapes of forks: those that a table of adapters.py declares are checked, the others are not applicable."""

from pathlib import Path

import pytest

from tests.conformance.components.contracts import CONTRACTS
from tests.conformance.components.document import SEED
from tests.conformance.components.examine import NOT_APPLICABLE
from tests.conformance.components.loading import NotRecognised, find_package
from tests.conformance.components.running import names, plant, verdicts_of
from tests.conformance.components.targets.faults import RUNNER, SCHEDULER, Fault

_RETURN = "return (batch, True) if batch else (self._schedule_decode(), False)"
_OUTPUT = """\
from types import SimpleNamespace

        seqs = batch or self._schedule_decode()
        return SimpleNamespace(scheduled_seqs=seqs, num_prefills=len(batch), num_tokens=0)"""
_LISTS = "decoding = [] if batch else self._schedule_decode()\n        return batch, decoding"
_POSTPROCESS = "def postprocess(self, seqs: list[Sequence], token_ids: list[int], is_prefill: bool):\n"
# Clean, though they are not upstream's.
KNOWN = {
    "an object with the number of prefills": Fault(
        "",
        (
            (SCHEDULER, _RETURN, _OUTPUT),
            (
                SCHEDULER,
                _POSTPROCESS,
                "def postprocess(self, output, token_ids: list[int]):\n"
                "        seqs, is_prefill = output.scheduled_seqs, output.num_prefills > 0\n",
            ),
        ),
    ),
    "a Config that refuses to be made here": Fault(
        "", (("config.py", "if not os.path.isdir(self.model):", "if True:"),)
    ),
    "a package that is not installed": Fault(
        "",
        ((RUNNER, "import torch.distributed as dist\n", "import torch.distributed as dist\nimport made_up_kernels\n"),),
    ),
}
UNKNOWN = {
    "a tuple of four": (
        Fault("", ((SCHEDULER, _RETURN, "return batch or self._schedule_decode(), bool(batch), [], []"),)),
        "a tuple of 4",
    ),
    "queues of another name": (
        Fault(
            "",
            (
                (
                    SCHEDULER,
                    "self.num_prefills = 0\n\n",
                    "self.num_prefills = 0\n        self.__dict__['lane'] = self.__dict__.pop('waiting')\n\n",
                ),
            ),
        ),
        "none of the queues",
    ),
    "a scheduler with an argument that nothing gives": (
        Fault(
            "", ((SCHEDULER, "def __init__(self, config: Config):", "def __init__(self, config: Config, connector):"),)
        ),
        "Scheduler needs 'connector'",
    ),
    "a scheduler that moves blocks to the CPU": (
        Fault(
            "", ((SCHEDULER, "self.num_prefills = 0\n\n", "self.num_prefills = 0\n        self.swapped = deque()\n\n"),)
        ),
        "moves blocks to the CPU",
    ),
}


def test_known_shapes_are_checked_whole(tmp_path: Path) -> None:
    found = verdicts_of(*plant(KNOWN, tmp_path), scenarios=60, seed=SEED)
    assert [names(verdicts, "holds") for verdicts in found] == [list(CONTRACTS)] * len(KNOWN)


def test_unknown_shapes_are_not_applicable_and_never_passed(tmp_path: Path) -> None:
    paths = plant({name: fault for name, (fault, _) in UNKNOWN.items()}, tmp_path)
    found = verdicts_of(*paths, scenarios=20, seed=SEED)
    drawn = {name for name, contract in CONTRACTS.items() if not contract.script}
    for (name, (_, reason)), verdicts in zip(UNKNOWN.items(), found, strict=True):
        assert {verdicts[contract]["verdict"] for contract in drawn} == {NOT_APPLICABLE}, name
        assert all(reason in verdicts[contract]["reason"] for contract in drawn), verdicts["C01"]["reason"]


def test_package_is_found_by_its_scheduler(tmp_path: Path) -> None:
    for folder in ("src/tiny", "tests/other", ".venv/nanovllm", "deep/down/there"):
        (tmp_path / folder / "engine").mkdir(parents=True)
        (tmp_path / folder / "engine" / "scheduler.py").touch()
    assert find_package(tmp_path) == tmp_path / "src" / "tiny"


def test_folder_without_a_scheduler_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotRecognised, match=r"has no PACKAGE/engine/scheduler\.py"):
        find_package(tmp_path)
