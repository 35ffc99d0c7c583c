"""What `make test-gpu`, `make sanitize` and `make benchmarks` say where something is missing: one line."""

import re

import pytest
import torch

from tests.support.source_tree import ROOT
from tools.check_machine import main


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["pytest", "no_such_module", "nor_this"], "has no no-such-module, nor-this here; "),
        (["--gpu", "torch"], "finds no NVIDIA GPU here; "),
    ],
)
def test_what_is_missing_is_one_line(arguments, reason, capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line
    assert line.endswith("name the python that does: make TARGET PYTHON=...")
    assert main(["torch", "pytest"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("target", ["test-gpu", "sanitize", "benchmarks"])
def test_targets_for_a_gpu_take_the_python_of_venv_where_it_exists(target: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    recipe = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert recipe is not None
    assert "$(NEEDS)" in recipe[1]
    assert '"$(MACHINE_PYTHON)" -m' in recipe[1]
    assert "$(PYTHON)" not in recipe[1]
    assert "MACHINE_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))" in makefile
