"""What a user or a step can get wrong, and the engine goes on. Contracts E16 and E17 have bad input of any engine."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanovllm import LLM, bundled_model_path
from nanovllm.engine.scheduler import ScheduledBatch
from tests.e2e.conftest import GREEDY, PROMPTS, bundled_llm, run_to_end, tokens
from tests.support.tiny_models import copy_model

GOOD = [5, 6, 7]
CLOSED = r"^this engine is closed: make a new one$"


def test_the_refused_prompt_of_a_list_is_named_and_none_is_queued(llm: LLM) -> None:
    """D10, D11: contract E16 and test_scheduler_requests have the pool, the numbers, and that others go on."""
    with pytest.raises(ValueError, match=r"^prompt 1: .*max_model_len=512"):
        llm.generate([GOOD, [5] * 512], GREEDY, use_tqdm=False)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("planted"), KeyboardInterrupt()])
@pytest.mark.parametrize(("caller", "number"), [("generate", 1), ("generate", 2), ("generate", 3), ("step", 3)])
def test_a_step_that_fails_ends_the_requests_of_its_caller_and_no_others(
    engine: LLM,
    alone: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    caller: str,
    number: int,
) -> None:
    """D18: a request of add_request ends if step() fails. If a step of generate() does, it goes on, and what that step
    was to compute of it is computed again. The step is a prefill or a decode, or one that began ahead of either.
    """
    other = engine.add_request(PROMPTS[0], GREEDY)
    for _ in range(3):
        engine.step()
    execute, calls = engine._core.executor.execute, []

    def failing_execute(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == number:
            raise error
        return execute(*args)

    with monkeypatch.context() as planted:
        planted.setattr(engine._core.executor, "execute", failing_execute)
        with pytest.raises(type(error)):
            run_to_end(engine) if caller == "step" else engine.generate(PROMPTS[1:3], GREEDY, use_tqdm=False)
    later = engine.add_request(PROMPTS[1], GREEDY)
    outputs = run_to_end(engine)
    assert outputs.keys() == {other, later}
    ended = (outputs[other]["finish_reason"], outputs[other]["token_ids"] == alone[0])
    assert ended == (("abort", False) if caller == "step" else ("length", True))
    assert [outputs[later]["token_ids"], *tokens(engine, PROMPTS[2])] == alone[1:]


@pytest.mark.parametrize("is_async", [False, True])
def test_close_twice_and_use_after_it(monkeypatch: pytest.MonkeyPatch, is_async: bool) -> None:
    """D34: leaving the with statement closes; with async_scheduling a step is in flight then."""
    with bundled_llm(async_scheduling=is_async) as llm:
        stream = llm.generate_stream([GOOD, GOOD])
        assert next(stream)["seq_id"] == 0, "an engine counts its own requests"
        sequences = [*llm.scheduler.running]
        close, calls = llm._core.executor.close, []
        monkeypatch.setattr(llm._core.executor, "close", lambda: calls.append(close()))
        assert (llm._core._ahead is not None) is is_async
    llm.close()
    assert len(calls) == 1
    assert [seq.finish_reason for seq in sequences] == ["abort", "abort"]
    stream.close()
    for use in (lambda: llm.generate("a"), llm.step, lambda: llm.add_request("a"), lambda: llm.generate_stream("a")):
        with pytest.raises(RuntimeError, match=CLOSED):
            use()


def test_an_empty_schedule_while_requests_wait_is_an_error_and_no_endless_loop(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D10."""
    monkeypatch.setattr(llm.scheduler, "schedule", lambda: ScheduledBatch(False, (), (), ()))
    with pytest.raises(RuntimeError, match=r"^nothing can be scheduled although .*: please report this as a bug$"):
        llm.generate([GOOD], GREEDY, use_tqdm=False)


def test_a_model_that_cannot_be_loaded_leaves_torch_as_it_was(tmp_path: Path) -> None:
    """D44."""
    model = copy_model(bundled_model_path(), tmp_path / "model")
    before = torch.get_default_dtype(), torch.get_default_device()
    (model / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="safetensors"):
        LLM(str(model), device="cpu", dtype="bfloat16")
    assert (torch.get_default_dtype(), torch.get_default_device()) == before


@pytest.mark.parametrize(
    ("changed", "value", "dtype", "warning"),
    [
        ("model.layers.0.mlp.down_proj.weight", torch.nan, "float32", "(1): {}; use another checkpoint"),
        ("model.layers.1.input_layernorm.weight", torch.inf, "float32", "(1): {}; use another checkpoint"),
        (
            "model.norm.weight",
            60000.0,
            "float16",
            "is finite: float16 does not hold numbers that are as large as those",
        ),
        ("model.norm.weight", 1.0, "float32", None),
    ],
)
def test_logits_none_of_which_is_finite_are_explained_once(
    changed: str, value: float, dtype: str, warning: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The sampler takes token 0 then, which ends the texts of many models: no text, and no reason."""
    model = copy_model(bundled_model_path(), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors[changed].view(-1)[0 if value != value else slice(None)] = value
    save_file(tensors, model / "model.safetensors")
    caplog.set_level(logging.WARNING, "nanovllm")
    with bundled_llm(model, dtype=dtype) as llm:
        for _ in range(2):
            llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert len(caplog.messages) == (warning is not None)
    assert all(str(warning).format(changed) in message for message in caplog.messages)
