"""LLM.generate, generate_stream, add_request and step on the bundled model: what comes back, and in which order."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nanovllm import LLM, SamplingParams, bundled_model_path
from nanovllm.models.registry import load_model_config
from tests.e2e.conftest import BUNDLED_OPTIONS

GREEDY = SamplingParams.greedy(max_tokens=12)
PROMPTS = ["In the beginning", "The LORD is my shepherd", "And God said"]


def test_outputs_are_dicts_in_the_order_of_the_prompts(llm: LLM) -> None:
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    alone = [llm.generate(prompt, GREEDY, use_tqdm=False)[0] for prompt in PROMPTS]
    assert [output["token_ids"] for output in outputs] == [output["token_ids"] for output in alone]
    for output in outputs:
        assert output["text"] == llm.tokenizer.decode(output["token_ids"], skip_special_tokens=True)
        assert output["finish_reason"] == "length"
        assert len(output["token_ids"]) == 12


def test_a_str_is_one_prompt(llm: LLM) -> None:
    """D68."""
    assert len(llm.generate("And God said", GREEDY, use_tqdm=False)) == 1


def test_token_ids_are_the_prompt_they_encode(llm: LLM) -> None:
    token_ids = llm.tokenizer.encode(PROMPTS[0])
    as_text = llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)[0]["text"]
    assert llm.generate([token_ids], GREEDY, use_tqdm=False)[0]["text"] == as_text
    assert llm.generate(token_ids, GREEDY, use_tqdm=False)[0]["text"] == as_text


def test_no_prompts_no_outputs(llm: LLM) -> None:
    assert llm.generate([], use_tqdm=False) == []


@pytest.mark.parametrize("counts", [(3, 1, 7), (3, 7, 1), (7, 1, 3)])
def test_each_prompt_has_its_own_params(llm: LLM, counts: tuple[int, ...]) -> None:
    """And whoever ends last is waited for."""
    params = [SamplingParams.greedy(max_tokens=count) for count in counts]
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert tuple(len(output["token_ids"]) for output in outputs) == counts


def test_the_same_seed_gives_the_same_text_in_any_company(llm: LLM) -> None:
    """D58. Hot, since the bundled model is so sure of its text that other noise would change nothing."""
    params = SamplingParams(seed=11, temperature=5.0, max_tokens=20)
    alone = llm.generate(PROMPTS[1], params, use_tqdm=False)[0]["token_ids"]
    crowd = llm.generate([*PROMPTS, *PROMPTS], params, use_tqdm=False)
    assert crowd[1]["token_ids"] == crowd[4]["token_ids"] == alone


def test_requests_without_a_seed_differ(llm: LLM) -> None:
    outputs = llm.generate([PROMPTS[0]] * 6, SamplingParams(temperature=5.0, max_tokens=20), use_tqdm=False)
    assert len({tuple(output["token_ids"]) for output in outputs}) == 6


def test_the_engine_seed_and_the_arrival_number_decide_the_rest() -> None:
    def texts(seed: int) -> list[str]:
        with LLM(str(bundled_model_path()), seed=seed, **BUNDLED_OPTIONS) as llm:
            return [o["text"] for o in llm.generate(PROMPTS, SamplingParams(temperature=3.0), use_tqdm=False)]

    assert texts(1) == texts(1) != texts(2)


def test_cached_prompt_tokens_are_reported(llm: LLM) -> None:
    """D14: the second time, all but one token of the prompt come from the cache, whole blocks only."""
    prompt = list(range(40, 40 + 48))
    first, second = (llm.generate([prompt], GREEDY, use_tqdm=False)[0] for _ in range(2))
    assert (first["num_cached_tokens"], second["num_cached_tokens"]) == (0, 47)
    assert first["token_ids"] == second["token_ids"]


def test_end_of_sequence_stops_and_stays_out_of_the_text(llm: LLM) -> None:
    """D70: the model's end-of-sequence token is the last token, and no part of the text."""
    eos = llm.tokenizer.eos_token_id
    prompt = [*llm.tokenizer.encode("In the beginning")]
    free = llm.generate([prompt], SamplingParams.greedy(max_tokens=30, ignore_eos=True), use_tqdm=False)[0]["token_ids"]
    stopping = SamplingParams.greedy(max_tokens=30, stop_token_ids=[free[4]])
    output = llm.generate([prompt], stopping, use_tqdm=False)[0]
    end = free.index(free[4]) + 1
    assert (output["token_ids"], output["finish_reason"]) == (free[:end], "stop")
    assert output["text"] == llm.tokenizer.decode(free[: end - 1])
    assert eos in llm.scheduler.eos_token_ids


def test_every_id_that_ends_a_text_counts(tmp_path: Path) -> None:
    """D70, D91: of generation_config.json and of the tokenizer; those of config.json, if the former file is missing."""
    model = tmp_path / "model"
    shutil.copytree(bundled_model_path(), model)
    for name, ids in (("config.json", 5), ("generation_config.json", [6, 7])):
        content = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps({**content, "eos_token_id": ids}))
    with LLM(str(model), **BUNDLED_OPTIONS) as llm:
        assert llm.scheduler.eos_token_ids == {6, 7, llm.tokenizer.eos_token_id}
    (model / "generation_config.json").unlink()
    with LLM(str(model), **BUNDLED_OPTIONS) as llm:
        assert llm.scheduler.eos_token_ids == {5, llm.tokenizer.eos_token_id}
    for path in model.glob("tokenizer*"):
        path.unlink()
    with LLM(str(model), **BUNDLED_OPTIONS) as llm:
        assert llm.scheduler.eos_token_ids == {5}


def test_ignore_eos_goes_on(llm: LLM) -> None:
    end_of_a_passage = "and I will dwell in the house of the LORD for"
    stopped = llm.generate(end_of_a_passage, SamplingParams.greedy(max_tokens=40), use_tqdm=False)[0]
    assert (stopped["text"], stopped["finish_reason"]) == (" ever.", "stop")
    assert stopped["token_ids"][-1] == llm.tokenizer.eos_token_id
    params = SamplingParams.greedy(max_tokens=40, ignore_eos=True)
    goes_on = llm.generate(end_of_a_passage, params, use_tqdm=False)[0]
    assert (len(goes_on["token_ids"]), goes_on["finish_reason"]) == (40, "length")
    assert goes_on["token_ids"][: len(stopped["token_ids"])] == stopped["token_ids"]


def test_a_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    whole = llm.generate(PROMPTS[0], SamplingParams.greedy(max_tokens=40), use_tqdm=False)[0]["text"]
    stop = whole[20:26]
    output = llm.generate(PROMPTS[0], SamplingParams.greedy(max_tokens=40, stop=stop), use_tqdm=False)[0]
    assert output["finish_reason"] == "stop"
    assert output["text"] == whole[: whole.index(stop)]


def test_a_sequence_ends_at_max_model_len(llm: LLM) -> None:
    """D11."""
    prompt = [5] * (llm.config.max_model_len - 3)
    output = llm.generate([prompt], SamplingParams.greedy(max_tokens=50, ignore_eos=True), use_tqdm=False)[0]
    assert (len(output["token_ids"]), output["finish_reason"]) == (3, "length")


def test_max_model_len_is_lowered_to_what_the_model_supports() -> None:
    """D11."""
    with LLM(str(bundled_model_path()), **{**BUNDLED_OPTIONS, "max_model_len": 10**6}) as llm:
        supported = load_model_config(bundled_model_path()).max_supported_len
        assert llm.config.max_model_len == llm.scheduler.max_model_len == supported < 10**6


def test_step_hands_out_what_came_through_add_request_alone(llm: LLM) -> None:
    """D18: a stream's request that ends in a step of somebody else is the stream's."""
    stream = llm.generate_stream(PROMPTS[0], SamplingParams.greedy(max_tokens=2))
    items = [next(stream)]
    seq_id = llm.add_request(PROMPTS[1], SamplingParams.greedy(max_tokens=2))
    outputs = [output for _ in range(4) for output in llm.step().finished]
    assert [output["seq_id"] for output in outputs] == [seq_id]
    assert sum(len(item["token_ids"]) for item in [*items, *stream]) == 2


def test_an_output_that_waits_to_be_handed_out_is_work_left(llm: LLM) -> None:
    """D19."""
    seq_id = llm.add_request(PROMPTS[0], GREEDY)
    assert llm.abort(seq_id)
    assert not llm.is_finished()
    assert [output["finish_reason"] for output in llm.step().finished] == ["abort"]
    assert llm.is_finished()


def test_step_by_step(llm: LLM) -> None:
    ids = [llm.add_request(prompt, SamplingParams.greedy(max_tokens=3)) for prompt in PROMPTS]
    steps = []
    while not llm.is_finished():
        steps.append(llm.step())
    num_prompt_tokens = sum(len(llm.tokenizer.encode(prompt)) for prompt in PROMPTS)
    assert sum(step.num_prefill_tokens for step in steps) <= num_prompt_tokens  # less what the cache had
    assert [step.num_decode_tokens for step in steps] == [0, 3, 3]
    assert [step.num_prefill_tokens > 0 for step in steps] == [True, False, False]
    assert [output["seq_id"] for output in steps[-1].finished] == ids


def test_a_step_without_requests_is_legal(llm: LLM) -> None:
    """D19."""
    assert llm.step().finished == ()


def test_abort_waiting_running_and_unknown(llm: LLM) -> None:
    """D19."""
    ids = [llm.add_request(prompt, SamplingParams.greedy(max_tokens=50)) for prompt in PROMPTS]
    assert llm.abort(ids[2])  # waiting
    outputs = {output["seq_id"]: output for _ in range(2) for output in llm.step().finished}
    assert llm.abort(ids[0])  # running
    assert not llm.abort(ids[0])
    assert not llm.abort(10**9)
    while not llm.is_finished():
        outputs.update({output["seq_id"]: output for output in llm.step().finished})
    assert [outputs[seq_id]["finish_reason"] for seq_id in ids] == ["abort", "length", "abort"]
    assert [len(outputs[seq_id]["token_ids"]) for seq_id in ids] == [2, 50, 0]


def test_two_engines_in_one_process_do_not_meet(llm: LLM) -> None:
    """D21: other block size, other pool, other counters."""
    expected = [output["text"] for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]
    with LLM(str(bundled_model_path()), **{**BUNDLED_OPTIONS, "kv_cache_block_size": 1}) as other:
        streams = [llm.generate_stream(PROMPTS, GREEDY), other.generate_stream(PROMPTS, GREEDY)]
        texts = [[""] * 3, [""] * 3]
        for items in zip(*streams, strict=True):
            for item, into in zip(items, texts, strict=True):
                into[item["index"]] += item["text"]
    assert texts == [expected, expected]


def test_a_program_for_nano_vllm_runs_unchanged(tmp_path: Path) -> None:
    program = tmp_path / "example.py"
    program.write_text(
        "import sys\n"
        "from nanovllm import LLM, SamplingParams\n"
        "llm = LLM(sys.argv[1], enforce_eager=True, tensor_parallel_size=1)\n"
        "sampling_params = SamplingParams(temperature=0.6, max_tokens=8)\n"
        "outputs = llm.generate(['In the beginning', 'Blessed are'], sampling_params)\n"
        "for output in outputs:\n"
        "    print(repr(output['text']), len(output['token_ids']))\n"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, str(program), str(bundled_model_path())],
        capture_output=True,
        text=True,
        env={**__import__("os").environ, "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 2
    assert "tok/s" in result.stderr


@pytest.mark.parametrize(
    ("options", "is_shown"), [({}, True), ({"use_tqdm": True}, True), ({"use_tqdm": False}, False)]
)
def test_the_progress_bar_can_be_switched_off(
    llm: LLM, options: dict[str, bool], is_shown: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    llm.generate(PROMPTS, GREEDY, **options)
    shown = capsys.readouterr().err
    for part in ("Generating: ", " 3/3 prompts", r"\d tok/s", "decode"):
        assert bool(re.search(part, shown)) is is_shown


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_is_that_of_weights_and_cache(dtype: str) -> None:
    """The bundled model's margins are wide enough for half precision to say the same."""
    options = {**BUNDLED_OPTIONS, "dtype": dtype}
    with LLM(str(bundled_model_path()), **options) as half, LLM(str(bundled_model_path()), **BUNDLED_OPTIONS) as single:
        runner = half._core.executor._runner
        assert {str(parameter.dtype) for parameter in runner.model.parameters()} == {f"torch.{dtype}"}
        assert str(runner.kv_cache.dtype) == f"torch.{dtype}"
        outputs = [llm.generate(PROMPTS, GREEDY, use_tqdm=False) for llm in (half, single)]
    assert [output["token_ids"] for output in outputs[0]] == [output["token_ids"] for output in outputs[1]]
