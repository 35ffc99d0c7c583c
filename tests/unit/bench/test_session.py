"""session: what is served, what counts, and the figures of a row."""

import pytest

from nanovllm.bench.drive import RequestTimes
from nanovllm.bench.limits import Ceilings, Limit
from nanovllm.bench.session import Percentiles, Plan, Repetition, Target, make_row, measure
from nanovllm.bench.workload import Scenario
from nanovllm.models.registry import load_model_config
from tests.support.scripted_engine import ScriptedEngine
from tests.support.tiny_models import tiny_model

SCENARIOS = {"many": Scenario(4, (5, 9), (2, 3), num_shared=2), "one": Scenario(1, (9, 9), (1, 1), counts_input=True)}


def test_a_session_serves_fresh_prompts_in_every_repetition_and_counts_no_warm_up(capsys) -> None:
    engine, model = ScriptedEngine(), load_model_config(tiny_model("llama"))
    plan = Plan(SCENARIOS, rates=[1e4, 1e5], num_repetitions=2, seed=3)
    rows = measure(Target(engine, model, "float32", Ceilings(1e9, 1e9), has_gpu=False), plan)
    assert [(row.scenario, row.rate) for row in rows] == [
        (name, rate) for name in SCENARIOS for rate in (None, 1e4, 1e5)
    ]
    assert all(len(row.repetitions) == 2 for row in rows)
    assert len(engine.added) == plan.num_requests == (4 + 1) * (1 + 2 * 3)
    assert len({tuple(prompt) for prompt, _, _ in engine.added}) == plan.num_requests
    seeds = [repetition.seed for row in rows for repetition in row.repetitions]
    assert len(set(seeds)) == len(rows) * 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("Measuring: 35/35 in ")

    tokens = [(len(prompt), params.max_tokens) for prompt, params, _ in engine.added]
    first = rows[0].repetitions[0]  # the warm-up was requests 0 to 3
    assert (first.num_input_tokens, first.num_output_tokens) == tuple(map(sum, zip(*tokens[4:8], strict=True)))
    assert [row.limit_tokens_per_second is None for row in rows] == [False, True, True] * 2
    assert [row.time_per_output_token is None for row in rows] == [False] * 3 + [True] * 3
    assert {row.gpu_idle for row in rows} == {None}


def test_the_gpu_is_profiled_once_a_scenario(monkeypatch) -> None:
    from nanovllm.bench import gpu_idle

    profiled = []
    monkeypatch.setattr(gpu_idle, "gpu_idle_share", lambda llm, scenario, seeds: profiled.append(scenario) or 0.25)
    target = Target(ScriptedEngine(), load_model_config(tiny_model("llama")), "float32", Ceilings(1e9, 1e9), True)
    rows = measure(target, Plan(SCENARIOS, rates=[1e5], num_repetitions=1, seed=0))
    assert profiled == list(SCENARIOS.values())
    assert [row.gpu_idle for row in rows] == [0.25, None] * 2


def test_a_row_has_medians_over_repetitions_and_percentiles_over_all_requests() -> None:
    """Runs of 10, 20 and 40 generated tokens in 2 s each: 5, 10 and 20 a second, at 1/2, 1/4 and 1/4 of the limit."""
    scenario = Scenario(2, (1, 1), (2, 2))
    runs = [
        (
            Repetition(seed, 2.0, num_input_tokens=7, num_output_tokens=tokens, limit=Limit(0.25, best, "x", "y")),
            [RequestTimes(0.0, first, first + 3.0, num_tokens=4)],
        )
        for seed, tokens, best, first in [(0, 10, 0.75, 0.2), (1, 20, 0.25, 0.3), (2, 40, 0.25, 0.4)]
    ]
    row = make_row("name", scenario, None, runs, gpu_idle=0.1)
    assert (row.scenario, row.rate, row.num_seqs, row.counted, row.gpu_idle) == ("name", None, 2, "out", 0.1)
    assert row.tokens_per_second == 10.0
    assert row.fraction == 0.25
    assert row.limit_tokens_per_second == 40.0  # of 10, 40 and 80
    assert row.time_to_first_token == Percentiles(pytest.approx(0.3), pytest.approx(0.398))
    assert row.time_per_output_token == Percentiles(pytest.approx(1.0), pytest.approx(1.0))
    of_prompts = make_row("name", Scenario(2, (1, 1), (2, 2), counts_input=True), None, runs, None)
    assert (of_prompts.counted, of_prompts.tokens_per_second) == ("in", 3.5)
