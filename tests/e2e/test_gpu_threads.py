"""Threads of one process on one GPU: engines start, capture graphs and compute at the same time."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams, bundled_model_path
from nanovllm.demo_prompts import DEMO_PROMPTS
from tests.e2e.conftest import tokens
from tests.support.limits import HANG_SECONDS

PROMPTS = list(DEMO_PROMPTS[:6])
PARAMS = SamplingParams.greedy(max_tokens=24, ignore_eos=True)
OPTIONS: dict[str, Any] = {"device": "cuda", "max_model_len": 512, "max_num_seqs": 8, "num_kv_cache_blocks": 32}


def generated(llm: LLM, prompts: Any = PROMPTS) -> list[list[int]]:
    return tokens(llm, prompts, PARAMS)


def start_and_generate(enforce_eager: bool) -> list[list[int]]:
    with LLM(str(bundled_model_path()), **OPTIONS, enforce_eager=enforce_eager) as llm:
        return generated(llm)


@pytest.mark.gpu
def test_an_engine_captures_graphs_while_another_computes() -> None:
    """D81: three engines in turn capture graphs and free them; the other one steps all the time, with graphs too."""
    is_over = threading.Event()
    with LLM(str(bundled_model_path()), **OPTIONS) as llm, ThreadPoolExecutor(1) as threads:
        expected = generated(llm)
        is_computing = threading.Event()

        def compute() -> int:
            num_calls = 0
            while not is_over.is_set() or num_calls == 0:
                assert generated(llm) == expected
                num_calls += 1
                is_computing.set()
            return num_calls

        computing = threads.submit(compute)
        try:
            assert is_computing.wait(HANG_SECONDS) or computing.done()
            for _ in range(3):
                assert start_and_generate(enforce_eager=False) == expected
        finally:
            is_over.set()
        assert computing.result(HANG_SECONDS) > 0


@pytest.mark.gpu
def test_engines_start_and_compute_at_the_same_time_on_a_gpu() -> None:
    """D81: with and without graphs."""
    expected = start_and_generate(enforce_eager=False)
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(start_and_generate, [False, False, True, False], timeout=HANG_SECONDS))
    assert results[0] == results[1] == results[3] == expected
    assert [len(token_ids) for token_ids in results[2]] == [24] * len(PROMPTS)


@pytest.mark.gpu
def test_calls_of_several_threads_on_a_gpu() -> None:
    """D81: float32, since in bfloat16 the size of a batch shows."""
    with LLM(str(bundled_model_path()), **OPTIONS, dtype="float32") as llm, ThreadPoolExecutor(8) as threads:
        expected = [generated(llm, prompt) for prompt in PROMPTS]
        assert (
            list(threads.map(lambda prompt: generated(llm, prompt), PROMPTS * 4, timeout=HANG_SECONDS)) == expected * 4
        )


@pytest.mark.gpu
def test_a_thread_with_work_of_its_own_on_the_gpu_does_not_end_a_capture() -> None:
    """D81: it allocates and copies, as a training loop beside the engine does."""
    is_over = threading.Event()

    def work() -> int:
        num_rounds = 0
        while not is_over.is_set():
            x = torch.ones(256, 1024 + num_rounds % 64, device="cuda")
            assert float(x.sum().cpu()) > 0
            del x
            num_rounds += 1
        return num_rounds

    with ThreadPoolExecutor(1) as threads:
        working = threads.submit(work)
        try:
            start_and_generate(enforce_eager=False)
        finally:
            is_over.set()
        assert working.result(HANG_SECONDS) > 0
