"""What a runner computes before the first request, so that none waits for the compiler: here on the CPU."""

import pytest
import torch

from nanovllm.engine.model_input import PADDING_SLOT
from nanovllm.worker.model_runner import ModelRunner
from nanovllm.worker.warmup import LONG_CONTEXT, prefill_warmup_shapes
from tests.support.model_probe import make_runner
from tests.support.tiny_models import tiny_model

LIMITS = {"max_num_batched_tokens": 700, "max_model_len": 600, "max_num_seqs": 3, "kv_cache_block_size": 16}


def make(architecture: str, num_blocks: int) -> ModelRunner:
    return make_runner(
        tiny_model(architecture, max_position_embeddings=600),
        device="cpu",
        dtype="float32",
        attention_backend="torch",
        num_kv_cache_blocks=num_blocks,
        **LIMITS,
    )


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "qwen3_moe"])
def test_the_kinds_of_prefill_run_over_a_cache_that_nobody_has_written(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They leave it alone, and each gives a token for each sequence, whatever the cache held."""
    runner = make(architecture, num_blocks=40)
    runner.kv_cache.fill_(torch.nan)
    met: list[tuple[int, int]] = []
    launch = runner._launch

    def launch_and_look(model_input):
        tokens = launch(model_input)
        assert len(tokens) == len(model_input.context_lens)
        assert (model_input.slot_mapping == PADDING_SLOT).all()
        met.append((len(model_input.input_ids), int(model_input.positions[0])))
        return tokens

    monkeypatch.setattr(runner, "_launch", launch_and_look)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    runner._compile_kinds_of_prefill()
    assert runner.kv_cache.isnan().all()
    powers = [2**power for power in reversed(range(10))]
    assert met == [*((power, cached) for power in powers for cached in (0, 1)), (1, LONG_CONTEXT)]


def test_they_are_those_for_which_there_is_room() -> None:
    """One block of 16 tokens: 32 are 20 and 12, of which the first has none."""
    kinds = list(prefill_warmup_shapes(700, 20, 40, num_blocks=1, block_size=16))
    assert [(len(kind.input_ids), int(kind.positions[0])) for kind in kinds] == [
        (16, 0), (8, 0), (8, 1), (4, 0), (4, 1), (2, 0), (2, 1), (1, 0), (1, 1)
    ]  # fmt: skip
