"""--temperature 0 and models without a tokenizer at the command line."""

import shutil

import pytest

from nanovllm import SamplingParams, bundled_model_path, cli
from nanovllm.cli_errors import USER_ERROR

PROMPT = "In the beginning"
LIMITS = ["--max-tokens", "8", "--max-model-len", "64", "--device", "cpu"]


@pytest.mark.parametrize("option", ["0", "0.0", "-0.0", "0e5"])
def test_temperature_0_is_greedy_and_says_so(option, capsys):
    """D94: what users of other engines type for the most likely token at every step."""
    assert cli.main(["generate", *LIMITS, "--greedy", PROMPT]) == 0
    expected = capsys.readouterr().out
    assert cli.main(["generate", *LIMITS, f"--temperature={option}", PROMPT]) == 0
    captured = capsys.readouterr()
    assert captured.out == expected
    assert "--temperature 0: taking the most likely token at every step, as --greedy\n" in captured.err


def test_temperature_0_says_which_options_have_no_effect(capsys):
    """D94"""
    options = ["--temperature", "0", "--top-p", "0.9", "--seed", "3", "--max-tokens", "5", "--stop", "x"]
    params = cli._sampling_params(cli._parser().parse_args(["generate", *options, PROMPT]))
    assert params == SamplingParams.greedy(max_tokens=5, stop="x")
    assert capsys.readouterr().err.endswith("as --greedy; --top-p, --seed without effect\n")


def test_greedy_with_temperature_0_is_no_clash(capsys):
    """D94"""
    params = cli._sampling_params(cli._parser().parse_args(["generate", "--greedy", "--temperature", "0", PROMPT]))
    assert params == SamplingParams.greedy()
    assert capsys.readouterr().err == ""


def test_a_model_without_a_tokenizer_is_refused(tmp_path, capsys):
    """D92, D93: the command line cannot take token ids, so the message does not ask for them."""
    for file in bundled_model_path().iterdir():
        if not file.name.startswith("tokenizer"):
            shutil.copy(file, tmp_path)
    for options in ([], ["--chat"]):
        assert cli.main(["generate", *LIMITS, *options, "--model", str(tmp_path), PROMPT]) == USER_ERROR
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("nanovllm: error: --model must have a tokenizer to read prompts")
        assert line.endswith("; add tokenizer.json")
