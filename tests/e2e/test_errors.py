"""What a user can get wrong: a clear error at the door, and the engine goes on."""

import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanovllm import LLM, SamplingParams, bundled_model_path
from nanovllm.engine.scheduler import ScheduledBatch
from tests.e2e.conftest import BUNDLED_OPTIONS

GREEDY = SamplingParams.greedy(max_tokens=4)
GOOD = [5, 6, 7]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "at least one token"),
        ("", "at least one token"),
        ((1, 2), "list"),
        (np.array([1, 2]), "list"),
        (7.5, "float"),
        (None, "NoneType"),
        ([1, 2.0], "2.0"),
        ([1, True], "True"),
        ([-1], "-1"),
        ([512], "from 0 to 511"),
    ],
)
def test_a_bad_prompt_is_refused_by_index_and_nothing_is_queued(llm: LLM, prompt: Any, words: str) -> None:
    """D12."""
    with pytest.raises(ValueError, match=r"prompt 1: ") as caught:
        llm.generate([GOOD, prompt], GREEDY, use_tqdm=False)
    assert words in str(caught.value)
    assert llm.is_finished()
    with pytest.raises(ValueError, match="prompt 0: "):
        llm.add_request(prompt, GREEDY)


@pytest.mark.parametrize("prompts", [None, 5, ("a", "b"), {"a": 1}])
def test_prompts_of_another_type_are_refused(llm: LLM, prompts: Any) -> None:
    with pytest.raises(ValueError, match="prompts must be"):
        llm.generate(prompts, GREEDY, use_tqdm=False)


@pytest.mark.parametrize("params", [[GREEDY], [GREEDY] * 3, [], [GREEDY, None], {"max_tokens": 3}])
def test_params_that_do_not_match_the_prompts_are_refused(llm: LLM, params: Any) -> None:
    """D68."""
    with pytest.raises(ValueError, match="sampling_params"):
        llm.generate([GOOD, GOOD], params, use_tqdm=False)


def test_a_request_that_can_never_fit_is_refused_and_others_go_on(llm: LLM) -> None:
    """D10: with the numbers; D11: a prompt of max_model_len."""
    running = llm.add_request(GOOD, GREEDY)
    with LLM(str(bundled_model_path()), **{**BUNDLED_OPTIONS, "num_kv_cache_blocks": 4}) as small:
        going = small.add_request(GOOD, GREEDY)
        with pytest.raises(ValueError, match=r"^prompt 1: .*4 blocks of 16 tokens.*60 prompt tokens and max_tok"):
            small.generate([GOOD, [5] * 60], SamplingParams.greedy(max_tokens=10))
        assert small.generate([[5] * 55], SamplingParams.greedy(max_tokens=10), use_tqdm=False)
        assert [output["seq_id"] for output in small.step().finished] == [going]
    with pytest.raises(ValueError, match="max_model_len=512"):
        llm.add_request([5] * 512)
    while not llm.is_finished():
        finished = llm.step().finished
    assert [output["seq_id"] for output in finished] == [running]


@pytest.mark.parametrize(("caller", "reason"), [("generate", "length"), ("step", "abort")])
def test_an_exception_in_a_step_leaves_the_engine_usable(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, caller: str, reason: str
) -> None:
    """D18: the requests of its caller end, the others and the next call get their own outputs."""
    expected = llm.generate([GOOD], GREEDY, use_tqdm=False)[0]["token_ids"]
    waiting_params = SamplingParams.greedy(max_tokens=6)
    execute = llm._core.executor.execute

    def fail(batch: Any) -> list[int]:
        raise torch.OutOfMemoryError("planted")

    failing = llm.add_request([9, 9], waiting_params)
    monkeypatch.setattr(llm._core.executor, "execute", fail)
    with pytest.raises(torch.OutOfMemoryError, match="planted"):
        llm.step() if caller == "step" else llm.generate([GOOD, GOOD], GREEDY, use_tqdm=False)
    monkeypatch.setattr(llm._core.executor, "execute", execute)
    later = llm.add_request(GOOD, GREEDY)
    outputs = {}
    while not llm.is_finished():
        outputs.update({output["seq_id"]: output for output in llm.step().finished})
    assert outputs[failing]["finish_reason"] == reason
    assert outputs[later]["token_ids"] == expected
    assert outputs.keys() == {failing, later}


def test_ctrl_c_in_generate_aborts_and_the_next_call_works(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """D18."""
    expected = llm.generate([GOOD], GREEDY, use_tqdm=False)
    execute, calls = llm._core.executor.execute, []

    def interrupt(batch: Any) -> list[int]:
        calls.append(batch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return execute(batch)

    monkeypatch.setattr(llm._core.executor, "execute", interrupt)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([GOOD, [8, 8, 8]], GREEDY, use_tqdm=False)
    assert llm.is_finished()
    again = llm.generate([GOOD], GREEDY, use_tqdm=False)
    assert again[0]["token_ids"] == expected[0]["token_ids"]


def test_close_twice_and_use_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """D34."""
    with LLM(str(bundled_model_path()), **BUNDLED_OPTIONS) as llm:
        llm.add_request(GOOD)
        close, calls = llm._core.executor.close, []
        monkeypatch.setattr(llm._core.executor, "close", lambda: calls.append(close()))
    assert len(calls) == 1, "leaving the with statement closes"
    llm.close()
    llm.close()
    assert len(calls) == 1
    for use in (lambda: llm.generate("a"), llm.step, lambda: llm.add_request("a"), lambda: llm.generate_stream("a")):
        with pytest.raises(RuntimeError, match=r"^this engine is closed: make a new one$"):
            use()


def test_a_schedule_that_is_empty_while_requests_wait_is_an_error_and_no_endless_loop(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D10."""
    monkeypatch.setattr(llm.scheduler, "schedule", lambda: ScheduledBatch(False, (), (), ()))
    with pytest.raises(RuntimeError, match=r"^nothing can be scheduled although .*: please report this as a bug$"):
        llm.generate([GOOD], GREEDY, use_tqdm=False)


def test_close_gives_the_memory_back() -> None:
    """D34."""
    llm = LLM(str(bundled_model_path()), **BUNDLED_OPTIONS)
    cache = weakref.ref(llm._core.executor._runner.kv_cache.untyped_storage())
    model = weakref.ref(llm._core.executor._runner.model)
    llm.generate("And", GREEDY, use_tqdm=False)
    llm.close()
    gc.collect()
    assert model() is None
    assert cache() is None


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"max_num_seq": 4}, TypeError, "did you mean 'max_num_seqs'"),
        ({"tensor_parallel_size": 3}, ValueError, "num_attention_heads=4, got 3; 2 would fit"),
        ({"device": "cuda"}, ValueError, "device must be 'cpu'"),
        ({"attention_backend": "triton"}, ValueError, "triton"),
    ],
)
def test_an_option_that_cannot_be_is_refused(options: dict[str, Any], error: type[Exception], words: str) -> None:
    """D69."""
    if options.get("device") == "cuda" and torch.cuda.is_available():
        options = {"device": "cuda:7"}
        words = "device"
    with pytest.raises(error, match=words):
        LLM(str(bundled_model_path()), **{**BUNDLED_OPTIONS, **options})


def test_a_wrong_model_is_refused(tmp_path: Path) -> None:
    """D60 D63: no directory, a file, an empty directory, another architecture, no weights."""
    with pytest.raises(ValueError, match="existing directory or a hub id"):
        LLM(str(tmp_path / "nothing" / "here"))
    a_file = tmp_path / "file"
    a_file.write_text("x")
    with pytest.raises(ValueError, match="got the file"):
        LLM(str(a_file))
    with pytest.raises(ValueError, match=r"config\.json"):
        LLM(str(tmp_path))
    model = tmp_path / "model"
    shutil.copytree(bundled_model_path(), model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    with pytest.raises(ValueError, match=r"qwen3.*mamba"):
        LLM(str(model))
    (model / "config.json").write_text(json.dumps(config))
    (model / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="safetensors"):
        LLM(str(model), device="cpu")


def test_a_hub_id_that_cannot_be_had_says_so() -> None:
    with pytest.raises(ValueError, match="nobody/nothing"):
        LLM("nobody/nothing")


def test_a_failed_constructor_leaves_torch_as_it_was(tmp_path: Path) -> None:
    """D44."""
    model = tmp_path / "model"
    shutil.copytree(bundled_model_path(), model)
    (model / "model.safetensors").write_bytes(b"broken")
    before = torch.get_default_dtype(), torch.get_default_device()
    with pytest.raises(ValueError, match="safetensors"):
        LLM(str(model), device="cpu", dtype="bfloat16")
    assert (torch.get_default_dtype(), torch.get_default_device()) == before


def test_without_a_tokenizer_token_ids_work_and_text_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tmp_path / "model"
    shutil.copytree(bundled_model_path(), model)
    for path in model.glob("tokenizer*"):
        path.unlink()
    with LLM(str(model), **BUNDLED_OPTIONS) as llm:
        assert "no tokenizer" in caplog.text
        output = llm.generate([GOOD], GREEDY, use_tqdm=False)[0]
        assert (output["text"], len(output["token_ids"])) == ("", 4)
        with pytest.raises(ValueError, match="needs a tokenizer"):
            llm.generate("And", GREEDY)
        with pytest.raises(ValueError, match="stop strings need a tokenizer"):
            llm.generate([GOOD], SamplingParams(stop="a"))
