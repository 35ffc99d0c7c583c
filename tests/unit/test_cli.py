"""The `nanovllm` command: what it prints, and what it refuses. Mostly in-process: main(argv) is the command."""

import io
import json
import os
import shutil
import subprocess
import sys
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams, bundled_model_path, cli
from nanovllm.bench.workload import draw_requests
from nanovllm.cli_errors import USER_ERROR
from nanovllm.commands import demo
from nanovllm.commands import options as command_options
from nanovllm.commands.options import given, sampling_params
from tests.support.limits import HANG_SECONDS
from tests.support.programs import run_python
from tests.support.source_tree import ROOT

PROMPT, _ = PROMPTS = ["In the beginning", "And it came to pass"]
LIMITS = ["--max-tokens", "8", "--max-model-len", "64", "--device", "cpu"]
SMALL = [*LIMITS, "--greedy"]


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """What the library generates for each of PROMPTS with the options SMALL."""
    with LLM(str(bundled_model_path()), max_model_len=64, device="cpu") as llm:
        outputs = llm.generate(PROMPTS, SamplingParams.greedy(max_tokens=8), use_tqdm=False)
    return {prompt: output["text"] for prompt, output in zip(PROMPTS, outputs, strict=True)}


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The line on stderr with which `arguments` are refused; fails unless it is the last one and the code is 2."""
    assert cli.main(arguments) == USER_ERROR
    *notes, line = capsys.readouterr().err.splitlines()
    assert line.startswith("nanovllm: error: ")
    assert all(note.startswith(("no --model given", "attention backend:")) for note in notes)
    return line


def params_of(*options: str) -> SamplingParams:
    return sampling_params(cli._parser().parse_args(["generate", *options, PROMPT]))


# --- what it prints ---


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], "generate continue one prompt or many demo"),
        (["generate", "--help"], "most sequences that run at a time (default: 512)"),  # Config's default
        (["--version"], "nanovllm 0.1.0"),
    ],
)
def test_help_and_version(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(arguments)
    assert words in " ".join(capsys.readouterr().out.split())


def test_one_prompt_is_streamed_to_stdout_and_the_choices_are_logged_to_stderr(texts, capsys) -> None:
    assert cli.main(["generate", *SMALL, "--attention-backend", "torch", PROMPT]) == 0
    captured = capsys.readouterr()
    assert captured.out == texts[PROMPT] + "\n"
    assert "no --model given: using the bundled one" in captured.err
    assert "attention backend: torch (" in captured.err


def test_many_prompts_are_printed_with_their_texts(texts, capsys) -> None:
    assert cli.main(["generate", *SMALL, *PROMPTS]) == 0
    assert capsys.readouterr().out == "".join(f"\n>>> {prompt}\n{text}\n" for prompt, text in texts.items())


def test_json_prints_one_object_a_line_for_each_line_of_stdin(texts, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n\n".join(PROMPTS) + "\n"))
    assert cli.main(["generate", *SMALL, "--json", "-"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["prompt"], row["text"]) for row in rows] == list(texts.items())


def test_chat_applies_the_models_template(texts, capsys, monkeypatch) -> None:
    """A template that is the message itself makes a chat of PROMPT the same as PROMPT."""
    original = command_options.open_llm

    def open_with_template(arguments: Any) -> LLM:
        llm = original(arguments)
        llm.tokenizer.chat_template = "{{ messages[0]['content'] }}"
        return llm

    monkeypatch.setattr(command_options, "open_llm", open_with_template)
    assert cli.main(["generate", *SMALL, "--chat", PROMPT]) == 0
    assert capsys.readouterr().out == texts[PROMPT] + "\n"


def test_bench_counts_the_tokens_it_generated(capsys) -> None:
    options = ["--num-seqs", "3", "--input-len", "4", "8", "--output-len", "2", "5", "--max-model-len", "64"]
    assert cli.main(["bench", *options, "--device", "cpu"]) == 0
    vocab_size = json.loads((bundled_model_path() / "config.json").read_text())["vocab_size"]
    prompts, params = draw_requests(3, (4, 8), (2, 5), vocab_size, seed=0)
    num_prompt_tokens, num_generated = sum(map(len, prompts)), sum(p.max_tokens for p in params)
    printed = capsys.readouterr().out
    assert f"3 requests, {num_prompt_tokens} prompt tokens, {num_generated} generated" in printed
    assert "shorter than was drawn" not in printed


def test_demo_ends_with_every_output_equal_to_transformers(capsys) -> None:
    assert cli.main(["demo"]) == 0
    total = len(demo.DEMO_PROMPTS)
    last = f"{total} of {total} outputs are token for token those of transformers' own generate on the same weights"
    assert capsys.readouterr().out.splitlines()[-1] == last


def test_demo_notices_an_output_that_differs_from_transformers(capsys, monkeypatch) -> None:
    monkeypatch.setattr(demo, "DEMO_PROMPTS", (PROMPT,))
    wrong: Any = {"text": "", "token_ids": [0], "finish_reason": "length", "num_cached_tokens": 0, "seq_id": 0}
    assert not demo._compare(bundled_model_path(), [wrong])
    assert capsys.readouterr().out.splitlines()[-1].startswith("0 of 1 outputs")


# --- options ---


def test_async_scheduling_can_be_left_to_the_default() -> None:
    for option, expected in (([], None), (["--async-scheduling"], True), (["--no-async-scheduling"], False)):
        arguments = cli._parser().parse_args(["generate", *option, PROMPT])
        assert given(arguments, ["async_scheduling"]).get("async_scheduling") is expected


@pytest.mark.parametrize("option", ["0", "-0.0", "0e5"])
def test_temperature_0_is_greedy_and_says_what_has_no_effect(option: str, capsys) -> None:
    """D94: users of other engines type 0 for the most likely token at every step."""
    assert params_of(f"--temperature={option}", "--stop", "x") == SamplingParams.greedy(stop="x")
    assert capsys.readouterr().err == "--temperature 0: taking the most likely token at every step, as --greedy\n"
    assert params_of("--temperature", option, "--top-p", "0.9", "--seed", "3").is_greedy
    assert capsys.readouterr().err.endswith("as --greedy; --top-p, --seed without effect\n")
    assert params_of("--greedy", "--temperature", option) == SamplingParams.greedy()
    assert capsys.readouterr().err == "", "the two options agree"


# --- what it refuses ---


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (["--tensor-parallel-size", "9"], "--tensor-parallel-size must be an integer from 1 to 8"),
        (["--greedy", "--top-k", "5", "--min-p", "0.1"], "leave out --top-k, --min-p"),
        (["--temperature", "0", "--top-p", "7"], "--top-p must be a number in (0, 1]"),
        (["--model", "/nothing-here"], "/nothing-here"),
        ([*SMALL, os.fsdecode(b"\xff")], "must be valid Unicode"),  # arrives with a lone surrogate
        ([*SMALL, "--chat", os.fsdecode(b"\xff")], "must be valid Unicode"),
    ],
)
def test_a_wrong_value_is_refused_by_its_rule(options: list[str], rule: str, capsys) -> None:
    assert rule in refusal(capsys, "generate", *options, PROMPT)


@pytest.mark.parametrize("options", [[], ["--chat"]])
def test_a_model_without_a_tokenizer_is_refused(options: list[str], tmp_path, capsys) -> None:
    """D92, D93: the command line cannot take token ids, so the message does not ask for them."""
    for file in bundled_model_path().iterdir():
        if not file.name.startswith("tokenizer"):
            shutil.copy(file, tmp_path)
    assert cli.main(["generate", *LIMITS, *options, "--model", str(tmp_path), PROMPT]) == USER_ERROR
    line = capsys.readouterr().err.splitlines()[-1]
    assert "--model must have a tokenizer to read prompts" in line
    assert line.endswith("; add tokenizer.json")


def test_bench_refuses_a_prompt_that_the_model_cannot_take(capsys) -> None:
    """D93: the message names bench's own option, and a maximum that works."""
    options = ["--max-model-len", "64", "--device", "cpu", "--num-seqs", "1", "--output-len", "1", "1"]
    line = refusal(capsys, "bench", *options, "--input-len", "64", "64")
    assert "--input-len's maximum must be an integer from 1 to 63, got 64; a prompt leaves room" in line
    assert "lower" not in refusal(capsys, "bench", *options, "--input-len", "0", "0")
    assert cli.main(["bench", *options, "--input-len", "63", "63"]) == 0
    assert cli.main(["bench", *options, "--input-len", "60", "60", "--output-len", "9", "9"]) == 0
    assert "outputs shorter than was drawn: 1, since a sequence has 64 tokens" in capsys.readouterr().out


def test_debug_shows_the_traceback(capsys) -> None:
    assert cli.main(["generate", "--debug", "--max-tokens", "0", PROMPT]) == USER_ERROR
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first == "Traceback (most recent call last):"
    assert last == "nanovllm: error: --max-tokens must be an integer of at least 1, got 0"


@pytest.mark.parametrize("module", ["numpy", "torch"])
def test_ctrl_c_while_modules_are_imported_shows_no_traceback(module: str, tmp_path) -> None:
    """From a disk that is slow, the imports take many seconds. A file in place of the module is the Ctrl-C."""
    (tmp_path / f"{module}.py").write_text("raise KeyboardInterrupt")
    result = run_python("-m", "nanovllm", "generate", PROMPT, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert (result.returncode, result.stdout) == (cli.INTERRUPTED, "")
    note = "no --model given: using the bundled one, which knows passages of the King James Bible\n"
    assert result.stderr.removeprefix(note) == "\nnanovllm: interrupted\n"


def test_a_reader_that_closes_its_end_is_no_error() -> None:
    """As `nanovllm generate ... | head -0`: the pipe is closed before the first text is written."""
    command = [sys.executable, "-m", "nanovllm", "generate", *SMALL, "--json", *PROMPTS]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read()
        code = process.wait(timeout=HANG_SECONDS)
    assert code == cli.BROKEN_PIPE
    assert "Traceback" not in errors
    assert "Exception ignored" not in errors
