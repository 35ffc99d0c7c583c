"""The `nanovllm` command: what it prints, and how it says no. Mostly in-process: main(argv) is the command."""

import io
import json
import os
import subprocess
import sys

import pytest

from nanovllm import LLM, SamplingParams, bundled_model_path, cli, demo
from nanovllm.bench import draw_requests
from nanovllm.cli_errors import BUG, USER_ERROR
from tests.support.limits import HANG_SECONDS
from tests.support.source_tree import ROOT

PROMPT, _ = PROMPTS = ["In the beginning", "And it came to pass"]
SMALL = ["--max-tokens", "8", "--greedy", "--max-model-len", "64", "--device", "cpu"]


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """What the library generates for each of PROMPTS with the options SMALL."""
    with LLM(str(bundled_model_path()), max_model_len=64, device="cpu") as llm:
        outputs = llm.generate(PROMPTS, SamplingParams.greedy(max_tokens=8), use_tqdm=False)
    return {prompt: output["text"] for prompt, output in zip(PROMPTS, outputs, strict=True)}


def run_module(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nanovllm", *arguments]
    return subprocess.run(command, cwd=ROOT, input=stdin, capture_output=True, text=True, timeout=HANG_SECONDS)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The line on stderr with which `arguments` are refused; fails unless it is the last one and the code is 2."""
    assert cli.main(arguments) == USER_ERROR
    *notes, line = capsys.readouterr().err.splitlines()
    assert line.startswith("nanovllm: error: ")
    assert all(note.startswith(("no --model given", "attention backend:")) for note in notes)
    return line


# --- what it prints ---


@pytest.mark.parametrize("command", ["generate", "demo", "bench"])
def test_help_lists_the_command(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    assert f"\n    {command} " in capsys.readouterr().out


@pytest.mark.parametrize("command", ["generate", "demo", "bench"])
def test_each_command_has_help(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    assert f"usage: nanovllm {command}" in capsys.readouterr().out


def test_help_states_the_default_that_config_has(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["generate", "--help"])
    assert "most sequences that run at a time (default: 512)" in " ".join(capsys.readouterr().out.split())


def test_module_runs_as_the_command():
    result = run_module("--version")
    assert (result.returncode, result.stdout) == (0, "nanovllm 0.1.0\n")


def test_one_prompt_is_streamed_to_stdout(texts, capsys):
    assert cli.main(["generate", *SMALL, PROMPT]) == 0
    assert capsys.readouterr().out == texts[PROMPT] + "\n"


def test_without_model_it_says_that_the_bundled_one_is_used(capsys):
    assert cli.main(["generate", *SMALL, PROMPT]) == 0
    assert "no --model given: using the bundled one" in capsys.readouterr().err


def test_it_says_which_attention_backend_it_took_and_why(capsys):
    assert cli.main(["generate", *SMALL, "--attention-backend", "torch", PROMPT]) == 0
    assert "attention backend: torch (" in capsys.readouterr().err


def test_many_prompts_are_printed_with_their_texts(texts, capsys):
    assert cli.main(["generate", *SMALL, *PROMPTS]) == 0
    assert capsys.readouterr().out == "".join(f"\n>>> {prompt}\n{text}\n" for prompt, text in texts.items())


def test_json_is_one_object_a_line(texts, capsys):
    assert cli.main(["generate", *SMALL, "--json", *PROMPTS]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["prompt"]: row["text"] for row in rows} == texts


def test_dash_reads_one_prompt_a_line_from_stdin(texts, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n\n".join(PROMPTS) + "\n"))
    assert cli.main(["generate", *SMALL, "--json", "-"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in rows] == list(texts.values())


def test_stop_ends_the_text_before_it(texts, capsys):
    text = texts[PROMPT]
    stop = text[len(text) // 2 :][:3]
    assert cli.main(["generate", *SMALL, "--stop", stop, PROMPT]) == 0
    assert capsys.readouterr().out == text[: text.index(stop)] + "\n"


def test_chat_applies_the_models_template(texts, capsys, monkeypatch):
    """A template that is the message itself makes a chat of PROMPT the same as PROMPT."""
    original = cli._open_llm

    def open_with_template(arguments):
        llm = original(arguments)
        llm.tokenizer.chat_template = "{{ messages[0]['content'] }}"
        return llm

    monkeypatch.setattr(cli, "_open_llm", open_with_template)
    assert cli.main(["generate", *SMALL, "--chat", PROMPT]) == 0
    assert capsys.readouterr().out == texts[PROMPT] + "\n"


def test_bench_counts_the_tokens_it_generated(capsys):
    options = ["--num-seqs", "3", "--input-len", "4", "8", "--output-len", "2", "5", "--max-model-len", "64"]
    assert cli.main(["bench", *options, "--device", "cpu"]) == 0
    vocab_size = json.loads((bundled_model_path() / "config.json").read_text())["vocab_size"]
    prompts, params = draw_requests(3, (4, 8), (2, 5), vocab_size, seed=0)
    expected = (
        f"3 requests, {sum(map(len, prompts))} prompt tokens, {sum(p.max_tokens for p in params)} generated tokens"
    )
    assert expected in capsys.readouterr().out


def test_bench_draws_the_workload_of_nano_vllms_bench():
    """142,827 prompt tokens and 133,966 output tokens: what nano-vllm's bench.py draws with seed 0."""
    prompts, params = draw_requests(256, (100, 1024), (100, 1024), vocab_size=151936, seed=0)
    assert (sum(map(len, prompts)), sum(p.max_tokens for p in params)) == (142_827, 133_966)


def test_demo_ends_with_every_output_equal_to_transformers(capsys):
    assert cli.main(["demo"]) == 0
    total = len(demo.DEMO_PROMPTS)
    last = f"{total} of {total} outputs are token for token those of transformers' own generate on the same weights"
    assert capsys.readouterr().out.splitlines()[-1] == last


def test_demo_notices_an_output_that_differs_from_transformers(capsys, monkeypatch):
    monkeypatch.setattr(demo, "DEMO_PROMPTS", (PROMPT,))
    wrong = {"text": "", "token_ids": [0], "finish_reason": "length", "num_cached_tokens": 0, "seq_id": 0}
    assert not demo._compare(bundled_model_path(), [wrong])
    assert capsys.readouterr().out.splitlines()[-1].startswith("0 of 1 outputs")


@pytest.mark.parametrize(
    ("option", "expected"), [([], None), (["--async-scheduling"], True), (["--no-async-scheduling"], False)]
)
def test_going_one_step_ahead_can_be_asked_for_and_forbidden(option: list[str], expected: bool | None) -> None:
    arguments = cli._parser().parse_args(["generate", *option, PROMPT])
    assert cli._given(arguments, ["async_scheduling"]).get("async_scheduling") is expected


# --- how it says no ---


def test_no_command_is_refused():
    with pytest.raises(SystemExit, match="2"):
        cli.main([])


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (["--max-model-len", "0"], "--max-model-len must be an integer of at least 2"),
        (["--temperature", "-1"], "--temperature must be a number above 1e-10"),
        (["--top-p", "7"], "--top-p must be a number in (0, 1]"),
        (["--max-tokens", "-3"], "--max-tokens must be an integer of at least 1"),
        (["--tensor-parallel-size", "9"], "--tensor-parallel-size must be an integer from 1 to 8"),
        (["--seed", "-1"], "--seed must be an integer from 0"),
        (["--greedy", "--temperature", "1"], "leave out --temperature"),
        (["--greedy", "--top-k", "5", "--min-p", "0.1"], "leave out --top-k, --min-p"),
        (["--temperature", "0", "--top-p", "7"], "--top-p must be a number in (0, 1]"),
    ],
)
def test_absurd_option_is_refused_by_its_rule(options, rule, capsys):
    assert rule in refusal(capsys, "generate", *options, PROMPT)


@pytest.mark.parametrize("options", [["--dtype", "int7"], ["--attention-backend", "magic"], ["--max-tokens", "ten"]])
def test_option_that_argparse_refuses_names_itself(options, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["generate", *options, PROMPT])
    assert options[0] in capsys.readouterr().err


def test_wrong_path_is_named(tmp_path, capsys):
    path = str(tmp_path / "nothing-here")
    assert path in refusal(capsys, "generate", "--model", path, PROMPT)


def test_unknown_model_type_is_named_with_what_is_supported(tmp_path, capsys):
    """D63"""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    line = refusal(capsys, "generate", "--model", str(tmp_path), PROMPT)
    assert "bert" in line
    assert "qwen3" in line


def test_empty_prompt_is_refused_by_its_index(capsys):
    """D12"""
    assert "prompt 1" in refusal(capsys, "generate", *SMALL, PROMPT, "")


@pytest.mark.parametrize("options", [[], ["--chat"]])
def test_bytes_that_are_no_text_are_refused(options, capsys, monkeypatch):
    """An argument that is not UTF-8 arrives with lone surrogates, which no tokenizer takes."""
    assert "must be valid Unicode" in refusal(capsys, "generate", *SMALL, *options, os.fsdecode(b"\xff"))


def test_dash_with_empty_stdin_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert "there was none" in refusal(capsys, "generate", *SMALL, "-")


def test_chat_without_a_template_is_refused(capsys, monkeypatch):
    original = cli._open_llm

    def open_without_template(arguments):
        llm = original(arguments)
        llm.tokenizer.chat_template = None
        return llm

    monkeypatch.setattr(cli, "_open_llm", open_without_template)
    assert "chat template" in refusal(capsys, "generate", *SMALL, "--chat", PROMPT)


def test_bench_refuses_a_prompt_that_the_model_cannot_take(capsys):
    """D93: the message names bench's own option, and a maximum that works."""
    options = ["--max-model-len", "64", "--device", "cpu", "--num-seqs", "1", "--output-len", "1", "1"]
    line = refusal(capsys, "bench", *options, "--input-len", "64", "64")
    assert "--input-len's maximum must be an integer from 1 to 63, got 64; lower it" in line
    assert cli.main(["bench", *options, "--input-len", "63", "63"]) == 0


@pytest.mark.parametrize("options", [["--num-seqs", "0"], ["--input-len", "9", "3"], ["--output-len", "0", "4"]])
def test_bench_refuses_an_empty_range(options, capsys):
    assert " must be an integer" in refusal(capsys, "bench", *options)


def test_refusal_reaches_the_shell_without_a_traceback():
    result = run_module("generate", "--max-tokens", "0", PROMPT)
    message = "nanovllm: error: --max-tokens must be an integer of at least 1, got 0\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", message)


def test_debug_shows_the_traceback(capsys):
    assert cli.main(["generate", "--debug", "--max-tokens", "0", PROMPT]) == USER_ERROR
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first == "Traceback (most recent call last):"
    assert last == "nanovllm: error: --max-tokens must be an integer of at least 1, got 0"


def test_a_bug_of_nanovllm_is_shown_as_one(capsys, monkeypatch):
    """D92: only then does a traceback reach the terminal."""

    def fail(*_):
        raise KeyError("block 7")

    monkeypatch.setattr(cli, "_read_prompts", fail)
    assert cli.main(["generate", PROMPT]) == BUG
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "nanovllm: this is a bug in nanovllm (KeyError): please report it with the traceback above"


# --- how it is interrupted ---


def test_ctrl_c_is_one_line_and_code_130(capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_read_prompts", interrupt)
    assert cli.main(["generate", PROMPT]) == 130
    assert capsys.readouterr().err == "\nnanovllm: interrupted\n"


def test_reader_that_goes_away_is_no_error():
    """As `nanovllm generate ... | head -0`: the reader has closed its end before the first text comes."""
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
