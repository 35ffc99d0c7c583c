"""LLM.generate, add_request, step and abort on the bundled model: which outputs come back.

tests/conformance/engines has what users of any engine expect: the order of outputs, seeds, where a text ends.
"""

from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams, bundled_model_path
from nanovllm.models.registry import load_model_config
from tests.e2e.conftest import GREEDY, PROMPTS, bundled_llm, run_to_end, tokens
from tests.support.tiny_models import copy_model


def test_a_prompt_may_be_text_or_token_ids(llm: LLM) -> None:
    token_ids = llm.tokenizer.encode(PROMPTS[0])
    assert tokens(llm, token_ids) == tokens(llm, [token_ids]) == tokens(llm, PROMPTS[0])
    assert tokens(llm, []) == []


def test_without_a_seed_the_engines_seed_and_the_arrival_number_decide() -> None:
    def drawn(seed: int) -> list[list[int]]:
        with bundled_llm(seed=seed) as llm:
            return tokens(llm, [PROMPTS[0]] * 6, SamplingParams(temperature=5.0, max_tokens=20))

    first = drawn(1)
    assert len(set(map(tuple, first))) == 6
    assert first == drawn(1) != drawn(2)


def test_cached_prompt_tokens_are_reported(llm: LLM) -> None:
    """D14: the second time, all but one token of the prompt come from the cache, whole blocks only."""
    prompt = list(range(40, 40 + 48))
    first, second = (llm.generate([prompt], GREEDY, use_tqdm=False)[0] for _ in range(2))
    assert (first["num_cached_tokens"], second["num_cached_tokens"]) == (0, 47)
    assert first["token_ids"] == second["token_ids"]


def test_the_ids_that_end_a_text_are_those_of_the_files_and_of_the_tokenizer(tmp_path: Path) -> None:
    """D70, D91: generation_config.json comes before config.json."""
    ids = {"config": {"eos_token_id": 5}, "generation_config": {"eos_token_id": [6, 7]}}
    model = copy_model(bundled_model_path(), tmp_path / "model", **ids)
    with bundled_llm(model=model) as llm:
        assert llm.scheduler.eos_token_ids == {6, 7, llm.tokenizer.eos_token_id}


def test_the_model_limits_max_model_len() -> None:
    """D11."""
    with bundled_llm(max_model_len=10**6) as long:
        supported = load_model_config(bundled_model_path()).max_supported_len
        assert long.config.max_model_len == long.scheduler.max_model_len == supported < 10**6


def test_steps_report_their_tokens_and_the_outputs_that_ended(llm: LLM) -> None:
    ids = [llm.add_request(prompt, SamplingParams.greedy(max_tokens=3)) for prompt in PROMPTS]
    steps = []
    while not llm.is_finished():
        steps.append(llm.step())
    num_prompt_tokens = sum(len(llm.tokenizer.encode(prompt)) for prompt in PROMPTS)
    assert sum(step.num_prefill_tokens for step in steps) <= num_prompt_tokens  # less what the cache had
    assert [step.num_decode_tokens for step in steps] == [0, 3, 3]
    assert [step.num_prefill_tokens > 0 for step in steps] == [True, False, False]
    assert [output["seq_id"] for output in steps[-1].finished] == ids


@pytest.mark.parametrize("seq_id", [None, "0", [0], -1, 0.0, True])
def test_abort_of_what_is_no_id_is_refused(seq_id: Any, llm: LLM) -> None:
    """vLLM's ids are strings, and its abort takes a list: False would say that the request had ended."""
    with pytest.raises(
        ValueError, match=r"^seq_id must be an integer of at least 0, got .*; give the id that add_request"
    ):
        llm.abort(seq_id)


def test_abort_of_a_request_that_waits_runs_or_is_unknown(llm: LLM) -> None:
    """D19: the output of an aborted request comes in the next step; a step without requests is legal."""
    assert llm.step().finished == ()
    ids = [llm.add_request(prompt, SamplingParams.greedy(max_tokens=50)) for prompt in PROMPTS]
    assert llm.abort(ids[2])  # waiting
    outputs = {output["seq_id"]: output for _ in range(2) for output in llm.step().finished}
    assert llm.abort(ids[0])  # running
    assert not llm.abort(ids[0])
    assert not llm.abort(10**9)
    outputs.update(run_to_end(llm))
    assert [outputs[seq_id]["finish_reason"] for seq_id in ids] == ["abort", "length", "abort"]
    assert [len(outputs[seq_id]["token_ids"]) for seq_id in ids] == [2, 50, 0]
    seq_id = llm.add_request(PROMPTS[0], GREEDY)
    assert llm.abort(seq_id)
    assert not llm.is_finished(), "its output is still to be returned"
    assert run_to_end(llm).keys() == {seq_id}
