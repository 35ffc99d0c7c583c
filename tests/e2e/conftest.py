"""Engines shared by the tests of a folder: starting one costs more than most tests."""

from collections.abc import Iterator

import pytest

from nanovllm import LLM, bundled_model_path
from tests.support.poison import poisoned_llm

BUNDLED_OPTIONS = {
    "device": "cpu",
    "attention_backend": "torch",
    "kv_cache_block_size": 16,
    "num_kv_cache_blocks": 64,
    "max_model_len": 512,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 256,
}


@pytest.fixture(scope="session")
def bundled() -> Iterator[LLM]:
    """The bundled model on the CPU, under poison. Tests leave it without requests."""
    with poisoned_llm(bundled_model_path(), **BUNDLED_OPTIONS) as llm:
        yield llm


@pytest.fixture
def llm(bundled: LLM) -> Iterator[LLM]:
    """The shared engine; checks afterwards that nothing was left in it."""
    yield bundled
    manager = bundled.scheduler.block_manager
    assert bundled.is_finished()
    assert bundled.scheduler.is_finished
    assert manager.num_free_blocks == len(manager.blocks)
    manager.check_invariants([])
