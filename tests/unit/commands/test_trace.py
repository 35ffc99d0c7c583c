"""nanovllm trace: the page it writes, the line it prints, and the outputs it refuses before anything is computed."""

import re

import pytest

from nanovllm import cli
from nanovllm.cli_errors import USER_ERROR

PROMPTS = ["In the beginning God created", "The LORD is my shepherd", "In the beginning God created the heaven"]
SMALL = ["--greedy", "--max-tokens", "24", "--device", "cpu", "--attention-backend", "torch"]
POOL = ["--kv-cache-block-size", "8", "--num-kv-cache-blocks", "10", "--max-num-seqs", "2"]


def test_a_run_is_written_as_a_page_and_summed_up(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["trace", *SMALL, *POOL, *PROMPTS]) == 0
    facts, written = capsys.readouterr().out.splitlines()
    numbers = re.fullmatch(r"requests: 3, steps: (\d+), preemptions: (\d+), tokens .* prefix cache: (\d+)", facts)
    assert numbers
    assert int(numbers[1]) > 24, "the third prompt waits for a seat"
    assert int(numbers[3]) >= 8, "it begins with the first prompt's block"
    assert written == "written: trace.html; open it in a browser"
    page = (tmp_path / "trace.html").read_text(encoding="utf-8")
    assert f"<dt>preemptions</dt><dd>{numbers[2]}</dd>" in page
    assert all(f" {prompt}</li>" in page for prompt in PROMPTS)


def test_a_disk_that_is_full_is_named_with_the_output(capsys) -> None:
    assert cli.main(["trace", *SMALL, "--output", "/dev/full", PROMPTS[0]]) == USER_ERROR
    line = capsys.readouterr().err.splitlines()[-1]
    assert "--output must be a file that can be written, got '/dev/full': No space left on device; choose" in line


@pytest.mark.parametrize(
    ("output", "rule"),
    [
        ("", "--output must be a file, got the directory ''"),
        (".", "--output must be a file, got the directory '.'"),
        ("missing/trace.html", "in a directory that exists, got 'missing/trace.html'; make 'missing' first"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_model_loads(
    output: str, rule: str, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["trace", "--output", output, *PROMPTS]) == USER_ERROR
    (line,) = capsys.readouterr().err.splitlines()
    assert rule in line
