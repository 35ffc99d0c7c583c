"""What a user or a step can get wrong: one clear error, and the engine goes on."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams, bundled_model_path
from nanovllm.engine.scheduler import ScheduledBatch
from tests.e2e.conftest import bundled_llm, change_json, run_to_end, tokens

GREEDY = SamplingParams.greedy(max_tokens=4)
GOOD = [5, 6, 7]
CLOSED = r"^this engine is closed: make a new one$"


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ([GOOD, []], GREEDY, r"^prompt 1: .*at least one token"),
        ([GOOD, [512]], GREEDY, r"^prompt 1: .*from 0 to 511"),
        ((GOOD, GOOD), GREEDY, "^prompts must be"),
        ([GOOD, GOOD], [GREEDY], "^sampling_params must be .*one for each of the 2 prompts"),
    ],
)
def test_a_bad_call_is_refused_and_nothing_is_queued(llm: LLM, prompts: Any, params: Any, message: str) -> None:
    """D12, D68."""
    for call in (llm.generate, llm.generate_stream):
        with pytest.raises(ValueError, match=message):
            call(prompts, params)
    assert llm.is_finished()
    with pytest.raises(ValueError, match=r"^prompt 0: .*at least one token"):
        llm.add_request([], GREEDY)


def test_a_request_that_can_never_fit_is_refused_and_others_go_on(llm: LLM) -> None:
    """D10: with the numbers; D11: a prompt of max_model_len."""
    running = llm.add_request(GOOD, GREEDY)
    with bundled_llm(num_kv_cache_blocks=4) as small:
        going = small.add_request(GOOD, GREEDY)
        with pytest.raises(ValueError, match=r"^prompt 1: .*4 blocks of 16 tokens.*60 prompt tokens and max_tok"):
            small.generate([GOOD, [5] * 60], SamplingParams.greedy(max_tokens=10))
        assert small.generate([[5] * 55], SamplingParams.greedy(max_tokens=10), use_tqdm=False)
        assert [output["seq_id"] for output in small.step().finished] == [going]
    with pytest.raises(ValueError, match="max_model_len=512"):
        llm.add_request([5] * 512)
    assert run_to_end(llm).keys() == {running}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("planted"), KeyboardInterrupt()])
@pytest.mark.parametrize(("caller", "reason"), [("generate", "length"), ("step", "abort")])
def test_a_step_that_fails_ends_the_requests_of_its_caller_and_the_next_call_works(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, error: BaseException, caller: str, reason: str
) -> None:
    """D18: a request of add_request ends if step() fails, and goes on if a step of generate() does."""
    expected = tokens(llm, [GOOD], GREEDY)
    execute, batches = llm._core.executor.execute, []

    def fail_in_the_third_step(batch: Any) -> Any:
        batches.append(batch)
        if len(batches) == 3:
            raise error
        return execute(batch)

    failing = llm.add_request([9, 9], SamplingParams.greedy(max_tokens=6))
    with monkeypatch.context() as planted:
        planted.setattr(llm._core.executor, "execute", fail_in_the_third_step)
        with pytest.raises(type(error)):
            run_to_end(llm) if caller == "step" else llm.generate([GOOD, GOOD], GREEDY, use_tqdm=False)
    later = llm.add_request(GOOD, GREEDY)
    outputs = run_to_end(llm)
    assert outputs.keys() == {failing, later}
    assert outputs[failing]["finish_reason"] == reason
    assert [outputs[later]["token_ids"]] == tokens(llm, [GOOD], GREEDY) == expected


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


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_num_seq": 4}, TypeError, "did you mean 'max_num_seqs'"),
        ({"tensor_parallel_size": 3}, ValueError, "num_attention_heads=4, got 3; 2 would fit"),
        ({"device": "cuda:99"}, ValueError, "device"),
        ({"attention_backend": "triton"}, ValueError, "triton"),
    ],
)
def test_an_option_that_cannot_be_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    """D69."""
    with pytest.raises(error, match=message):
        bundled_llm(**options)


def test_a_wrong_model_is_refused_and_torch_is_left_as_it_was(model: Path) -> None:
    """D44, D60, D63: a file, a hub id that is not on this machine, another architecture, broken and missing weights."""
    before = torch.get_default_dtype(), torch.get_default_device()
    for path, message in ((model / "config.json", "got the file"), (Path("nobody/nothing"), "nobody/nothing")):
        with pytest.raises(ValueError, match=message):
            LLM(str(path))
    change_json(model / "config.json", {"model_type": "mamba"})
    with pytest.raises(ValueError, match=r"qwen3.*mamba"):
        LLM(str(model))
    shutil.copy(bundled_model_path() / "config.json", model)
    (model / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="safetensors"):
        LLM(str(model), device="cpu", dtype="bfloat16")
    (model / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="safetensors"):
        LLM(str(model), device="cpu")
    assert (torch.get_default_dtype(), torch.get_default_device()) == before


def test_without_a_tokenizer_token_ids_work_and_text_is_refused(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    """D91: the ids that end a text are those of the files then."""
    for path in model.glob("tokenizer*"):
        path.unlink()
    change_json(model / "config.json", {"eos_token_id": 5})
    (model / "generation_config.json").unlink()
    with bundled_llm(model) as llm:
        assert "no tokenizer" in caplog.text
        assert llm.scheduler.eos_token_ids == {5}
        (output,) = llm.generate([GOOD], GREEDY, use_tqdm=False)
        assert (output["text"], len(output["token_ids"])) == ("", 4)
        with pytest.raises(ValueError, match="needs a tokenizer"):
            llm.generate("And", GREEDY)
        with pytest.raises(ValueError, match="stop strings need a tokenizer"):
            llm.generate([GOOD], SamplingParams(stop="a"))
