"""`python -m reference NAME` and `python reference/NAME.py` run the examples of a reference and show what they give."""

import sys
from pathlib import Path

import pytest

import reference
from reference.__main__ import main
from tests.support.programs import run_python
from tests.support.source_tree import ROOT


def shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *names: str) -> tuple[int, str]:
    """Exit code and output."""
    monkeypatch.setattr(sys, "argv", ["reference", *names])
    return main(), capsys.readouterr().out


def test_every_example_of_every_file_is_shown_in_reading_order(capsys, monkeypatch) -> None:
    code, output = shown(capsys, monkeypatch)
    titles = [line.removeprefix("--- ").partition(":")[0] for line in output.splitlines() if line.startswith("--- ")]
    assert (code, titles) == (0, reference.reading_order())
    sources = [(ROOT / "reference" / f"{name}.py").read_text(encoding="utf-8") for name in titles]
    assert output.count(">>> ") == sum(source.count(">>> ") for source in sources)


def test_every_file_shows_its_examples_when_it_is_run_as_a_script() -> None:
    """All end alike; the next test runs one of them."""
    last = 'if __name__ == "__main__":\n    __import__("reference").show_examples(__file__)\n'
    files = [ROOT / "reference" / f"{name}.py" for name in reference.reading_order()]
    assert [file.name for file in files if not file.read_text(encoding="utf-8").endswith(last)] == []


@pytest.mark.parametrize("arguments", [["reference", "reference/packing.py"], ["reference/packing.py"]], ids=str)
def test_it_runs_from_any_folder(tmp_path: Path, arguments: list[str]) -> None:
    result = run_python("-E", *(ROOT / argument for argument in arguments), cwd=tmp_path)  # -E: not by PYTHONPATH
    assert result.returncode == 0, result.stderr
    assert "\n(tensor([7, 8, 9, 5, 3, 4]), tensor([0, 3, 4, 6], dtype=torch.int32))\n" in result.stdout


def test_an_example_that_gives_something_else_is_shown_as_a_failure(capsys, monkeypatch) -> None:
    from reference.slot_mapping import slot_mapping

    assert slot_mapping.__doc__
    monkeypatch.setattr(slot_mapping, "__doc__", slot_mapping.__doc__.replace("tensor([28, ", "tensor([27, "))
    code, output = shown(capsys, monkeypatch, "slot_mapping")
    assert code == 1
    assert "Expected:\n    tensor([27, 29, 31,  8, 10])\nGot:\n    tensor([28, 29, 31,  8, 10])" in output


def test_an_unknown_name_is_refused_with_those_that_exist(capsys, monkeypatch) -> None:
    with pytest.raises(SystemExit, match="2"):
        shown(capsys, monkeypatch, "pack")
    assert "NAME must be one of attention, packing, " in capsys.readouterr().err
