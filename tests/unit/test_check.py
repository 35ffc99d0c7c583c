"""tools/check.py: which tests run first for which file. tools/check_machine.py: what is missing is one line."""

import pytest
import torch

from tests.support.source_tree import ROOT, python_files
from tools import check_machine
from tools.check import main, stages


def test_the_tests_named_after_a_file_come_first() -> None:
    first, second, third, campaigns = stages(["nanovllm/engine/scheduler.py"])
    assert "tests/unit/engine/test_scheduler.py" in first
    assert "tests/unit/engine/test_scheduler_async.py" in first
    assert "tests/unit/engine/test_throughput.py" in second  # it imports the scheduler
    assert "tests/unit/engine/test_block_manager.py" in third
    assert campaigns == ["tests/e2e"]


def test_a_kernels_own_cases_come_first() -> None:
    first, *_ = stages(["nanovllm/kernels/rms_norm.py"])
    assert first == ["tests/kernels/test_kernels.py", "-k", "rms_norm"]


@pytest.mark.parametrize(
    ("file", "test"),
    [("commands/generate.py", "tests/unit/test_cli.py"), ("models/llama.py", "tests/unit/test_model_config.py")],
)
def test_what_runs_every_file_of_a_folder_comes_before_the_campaigns(file: str, test: str) -> None:
    *_, found, campaigns = [stage for stage in stages([f"nanovllm/{file}"]) if test in stage or "tests/e2e" in stage]
    assert test in found
    assert "tests/e2e" in campaigns


def test_every_file_has_a_stage_whose_tests_exist() -> None:
    for file in (path.relative_to(ROOT).as_posix() for path in python_files("nanovllm")):
        paths = [argument for stage in stages([file]) for argument in stage if argument.startswith("tests/")]
        assert paths, file
        assert [path for path in paths if not (ROOT / path).exists()] == [], file
        assert len(set(paths)) == len(paths), file


@pytest.mark.parametrize("file", ["nanovllm/engine/no_such_file.py", "tests/conftest.py", "README.md"])
def test_another_file_is_refused_by_name(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main([file])
    assert error.value.code == 2
    assert f"relative to the project's root, got {file!r}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["pytest", "no_such_module", "nor_this"], "has no no-such-module, nor-this here; "),
        (["--gpu", "torch"], "finds no NVIDIA GPU here; "),
    ],
)
def test_what_is_missing_is_one_line(arguments, reason, capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check_machine.main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line
    assert line.endswith("name the python that does: make TARGET PYTHON=...")
    assert check_machine.main(["torch", "pytest"]) == 0
    assert capsys.readouterr().err == ""
