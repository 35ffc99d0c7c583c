"""Each remedy that an error names is followed, and works: in Python, and in options at the command line; D93.

Those of single options and of prompts: test_config.py, test_sampling_params.py, engine/test_input_processor.py.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams, bundled_model_path, cli
from nanovllm.cli_errors import USER_ERROR
from nanovllm.model_path import local_model_dir
from nanovllm.torchrun_env import read_torchrun_env
from nanovllm.worker.kv_cache import num_blocks_on_cpu, num_blocks_that_fit
from nanovllm.worker.model_runner import ModelRunner
from tests.support.scheduling import add_prompt, make_scheduler

MODEL = str(bundled_model_path())
SMALL: dict[str, Any] = {"max_model_len": 64, "device": "cpu", "max_num_seqs": 4}


def message(function: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  each caller looks into the message
        function(*arguments, **options)
    return str(caught.value)


def number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, text
    return int(found[1])


# --- the scheduler ---


@pytest.mark.parametrize(
    ("num_tokens", "max_tokens", "remedy"),
    [
        (5, 5, r"lower max_tokens to (?P<max>\d+)"),
        (8, 100, r"lower max_tokens to (?P<max>\d+)"),
        (8, 2, r"lower max_tokens to (?P<max>\d+)"),
        (9, 3, r"shorten the prompt to (?P<prompt>\d+) tokens and set max_tokens to (?P<max>1)"),
    ],
)
def test_of_a_request_that_the_cache_refuses(num_tokens: int, max_tokens: int, remedy: str) -> None:
    limits = {"block_size": 2, "max_model_len": 1000}
    text = message(add_prompt, make_scheduler(num_blocks=4, **limits), num_tokens, max_tokens=max_tokens)
    found = re.search(rf"; {remedy}, or set num_kv_cache_blocks to at least (?P<blocks>\d+)$", text)
    assert found is not None, text
    given = {name: int(value) for name, value in found.groupdict().items()}
    add_prompt(make_scheduler(num_blocks=4, **limits), given.get("prompt", num_tokens), max_tokens=given["max"])
    add_prompt(make_scheduler(num_blocks=given["blocks"], **limits), num_tokens, max_tokens=max_tokens)


def test_of_a_prompt_in_a_whole_engine() -> None:
    """max_model_len is what was asked for, or what the model supports: the engine tells the scheduler both."""
    with LLM(MODEL, **SMALL) as llm:
        needed = number(r"set max_model_len to at least (\d+)$", message(llm.add_request, [5] * 70))
        text = message(llm.add_request, [5] * 5000)
    longest = number(r"shorten it: this model takes at most (\d+) tokens, prompt and output together$", text)
    with LLM(MODEL, **{**SMALL, "max_model_len": needed}) as llm:
        assert llm.add_request([5] * 70) == 0
    with LLM(MODEL, **{**SMALL, "max_model_len": 10**6}) as llm:
        assert llm.add_request([5] * (longest - 1)) == 0


# --- memory ---


def test_of_gpu_memory_utilization() -> None:
    sizes = {"total": 1000, "used": 700, "step_bytes": 50, "bytes_per_block": 33}
    text = message(num_blocks_that_fit, utilization=0.7, **sizes)
    found = re.search(r"set it to at least ([0-9.]+), free the GPU", text)
    assert found is not None
    assert num_blocks_that_fit(utilization=float(found[1]), **sizes) == 1
    assert num_blocks_that_fit(utilization=1.0, **{**sizes, "used": 0}) > 0, "free the GPU"
    lower_budget = {**sizes, "used": 900, "step_bytes": 10}
    assert num_blocks_that_fit(utilization=1.0, **lower_budget) > 0, "lower max_num_batched_tokens"


def test_of_memory_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """D43: with the figures."""
    assert message(num_blocks_on_cpu, 39, 10, 4, 4) == (
        "a KV block of 10 bytes must fit in 25% of the available memory, got 39 bytes; "
        "free memory, or set num_kv_cache_blocks to use more of it"
    )
    monkeypatch.setattr(ModelRunner, "_num_blocks_that_fit", None)  # not asked then
    with LLM(MODEL, **SMALL, num_kv_cache_blocks=1) as llm:
        assert llm.generate([[5]], SamplingParams(max_tokens=1), use_tqdm=False)


@pytest.mark.parametrize("num_blocks", [2**31 - 1, 10**8])
def test_of_a_cache_beyond_memory(num_blocks: int) -> None:
    """torch says so with a RuntimeError, or Linux lends what there is not and kills the process later."""
    text = message(LLM, MODEL, **SMALL, num_kv_cache_blocks=num_blocks)
    assert f"num_kv_cache_blocks must fit in the memory of cpu, got {num_blocks}" in text
    assert text.endswith("lower it, or leave it out to size the cache from free memory")
    with LLM(MODEL, **SMALL) as llm:
        assert llm.config.num_kv_cache_blocks is None
    with LLM(MODEL, **SMALL, num_kv_cache_blocks=2) as llm:
        assert len(llm.scheduler.block_manager.blocks) == 2


# --- where the model is, and how the program was started ---


def test_of_a_file_given_as_a_model(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text("{}")
    assert message(local_model_dir, str(file)).endswith("; give the directory it is in")
    assert local_model_dir(str(file.parent)) == tmp_path


@pytest.mark.parametrize("values", [{"RANK": "x"}, {"RANK": "2"}, {"LOCAL_RANK": "3"}, {"RANK": "-1"}])
def test_of_variables_that_torchrun_would_set_otherwise(values: dict[str, str], monkeypatch) -> None:
    """All values are shown. int() would say that its literal is invalid."""
    given = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "x"}
    for name, value in {**given, "MASTER_PORT": "1", **values}.items():
        monkeypatch.setenv(name, value)
    text = message(read_torchrun_env)
    ((name, value),) = values.items()
    assert f"{name}={value!r}" in text
    assert text.endswith("; start the program with torchrun, or unset RANK")
    monkeypatch.delenv("RANK")
    assert read_torchrun_env() is None


# --- at the command line ---


@pytest.mark.parametrize(
    ("refused", "words", "followed"),
    [
        ("--top-k 0", "leave it out for no limit", ""),
        ("--seed -1", "leave it out to derive it", ""),
        ("--temperature -1", "use --greedy for the most likely token", "--greedy"),
        ("--num-kv-cache-blocks 0", "leave it out to size it from memory", ""),
        ("--max-num-batched-tokens 2", "lower --max-num-seqs", "--max-num-batched-tokens 2 --max-num-seqs 2"),
        ("--kv-cache-block-size 8", "-backend torch powers", "--kv-cache-block-size 8 --attention-backend torch"),
        ("--greedy --top-k 5", "leave out --top-k", "--greedy"),
        ("--chat", "leave out --chat", ""),
        ("--device cuda", "use 'auto' or 'cpu'", "--device auto"),
        ("--attention-backend triton", "use --attention-backend torch", "--attention-backend torch"),
        ("--max-model-len 2", "set --max-model-len to at least 4", "--max-model-len 4"),
        ("--num-kv-cache-blocks 1 --max-tokens 999", "max-tokens to 254", "--num-kv-cache-blocks 1 --max-tokens 254"),
    ],
)
def test_at_the_command_line(refused: str, words: str, followed: str, capsys, monkeypatch) -> None:
    """Each names options only, never Python."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ends = ["--max-tokens", "2"] if "--max-tokens" not in refused else []
    assert cli.main(["generate", *ends, *refused.split(), "In the"]) == USER_ERROR
    line = capsys.readouterr().err.splitlines()[-1]
    assert words in line
    assert not re.search(r"\b[a-z]+_[a-z_]+\b|SamplingParams|None|errors=", line), line
    assert cli.main(["generate", *ends, *followed.split(), "In the"]) == 0
