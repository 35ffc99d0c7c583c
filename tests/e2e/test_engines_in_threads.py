"""Several engines in several threads of one process do not meet."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from nanovllm import LLM, SamplingParams, bundled_model_path
from tests.e2e.conftest import BUNDLED_OPTIONS
from tests.support.limits import HANG_SECONDS

GREEDY = SamplingParams.greedy(max_tokens=12)
PROMPTS = ["In the beginning", "The LORD is my shepherd", "And God said"]


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


def tokens(llm: LLM, prompts: list[str]) -> list[list[int]]:
    return [output["token_ids"] for output in llm.generate(prompts, GREEDY, use_tqdm=False)]


def test_engines_in_several_threads_do_not_meet(llm: LLM, threads: ThreadPoolExecutor) -> None:
    """D81: they start and compute at the same time, in different dtypes."""
    expected = tokens(llm, PROMPTS)
    barrier = threading.Barrier(4)

    def use(dtype: str) -> list[list[int]]:
        barrier.wait(HANG_SECONDS)
        with LLM(str(bundled_model_path()), **BUNDLED_OPTIONS, dtype=dtype) as own:
            runner = own._core.executor._runner
            assert {parameter.dtype for parameter in runner.model.parameters()} == {runner.dtype}
            return tokens(own, PROMPTS)

    results = [threads.submit(use, dtype) for dtype in ("float32", "float16", "float32", "bfloat16")]
    results = [result.result(HANG_SECONDS) for result in results]
    assert [results[0], results[2]] == [expected, expected]
