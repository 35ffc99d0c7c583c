"""`nanovllm bench`: the workload that it draws."""

import math
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nanovllm.bench.workload import MAX_TOKEN_ID, SCENARIOS, Scenario, draw_requests, draw_scenario, poisson_arrivals
from tests.support.statistics import check_counts, fresh_seed

lengths = st.tuples(st.integers(1, 9), st.integers(0, 9)).map(lambda pair: (pair[0], sum(pair)))


@example(num_seqs=5, input_len=(9, 9), output_len=(1, 1), vocab_size=1, seed=0)  # the least wrong id is 1
@given(
    num_seqs=st.integers(1, 5),
    input_len=lengths,
    output_len=lengths,
    vocab_size=st.integers(1, 20) | st.just(2 * MAX_TOKEN_ID),
    seed=st.integers(0, 9),
)
def test_drawn_requests_stay_within_their_ranges_and_the_vocabulary(
    num_seqs: int, input_len: tuple[int, int], output_len: tuple[int, int], vocab_size: int, seed: int
) -> None:
    prompts, params = draw_requests(num_seqs, input_len, output_len, vocab_size, seed)
    assert len(prompts) == len(params) == num_seqs
    for prompt, param in zip(prompts, params, strict=True):
        assert input_len[0] <= len(prompt) <= input_len[1]
        assert output_len[0] <= param.max_tokens <= output_len[1]
        assert [token_id for token_id in prompt if not 0 <= token_id < vocab_size] == []


def test_the_workload_is_that_of_nano_vllms_bench() -> None:
    """142,827 prompt tokens and 133,966 output tokens: what nano-vllm's bench.py draws with seed 0."""
    prompts, params = draw_requests(256, (100, 1024), (100, 1024), vocab_size=151936, seed=0)
    assert (sum(map(len, prompts)), sum(p.max_tokens for p in params)) == (142_827, 133_966)


@pytest.mark.parametrize(
    ("num_seqs", "input_len", "output_len"), [(0, (1, 1), (1, 1)), (1, (9, 3), (1, 1)), (1, (1, 1), (0, 4))]
)
def test_an_empty_range_is_refused(num_seqs: int, input_len: tuple[int, int], output_len: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="must be an integer"):
        draw_requests(num_seqs, input_len, output_len, vocab_size=9, seed=0)


@pytest.mark.parametrize("name", SCENARIOS)
def test_prompts_of_a_scenario_share_its_prefix_alone_and_differ_from_seed_to_seed(name: str) -> None:
    """Otherwise the prefix cache would hold blocks of a prompt, and a run would measure less work than the last."""
    scenario = replace(SCENARIOS[name], num_seqs=3)
    drawn = [draw_scenario(scenario, 512, seed)[0] for seed in range(2)]
    prompts = [prompt for run in drawn for prompt in run]
    for run in drawn:
        assert len({tuple(prompt[: scenario.num_shared]) for prompt in run}) == 1
        assert max(map(max, run)) < 512
    beginnings = {tuple(prompt[scenario.num_shared :][:20]) for prompt in prompts}
    assert len(beginnings) == 6
    assert drawn[0][0][:20] != drawn[1][0][:20]
    low, high = scenario.input_len
    assert all(low <= len(prompt) - scenario.num_shared <= high for prompt in prompts)


def test_a_scenario_is_scaled_in_requests_and_lengths() -> None:
    scenario = Scenario(256, (100, 1024), (16, 1024), num_shared=2000)
    assert scenario.scaled(0.1) == Scenario(26, (10, 102), (2, 102), num_shared=200)
    assert scenario.scaled(1e-9) == Scenario(1, (1, 1), (2, 2), num_shared=1)
    assert scenario.scaled(2).max_len == 2 * scenario.max_len == 8096
    assert SCENARIOS["single"].scaled(0.5).num_shared == 0


def test_arrivals_are_ascending_and_their_seed_decides_them() -> None:
    arrivals = poisson_arrivals(100, 3.0, seed=5)
    assert arrivals == sorted(arrivals) == poisson_arrivals(100, 3.0, seed=5) != poisson_arrivals(100, 3.0, seed=6)
    assert arrivals[0] > 0


def test_gaps_between_arrivals_are_exponential() -> None:
    """The quartiles of the exponential distribution of mean 1 / rate divide the gaps evenly."""
    rate, number = 7.0, 4000
    arrivals = poisson_arrivals(number, rate, seed=fresh_seed("Poisson arrivals"))
    gaps = [after - before for before, after in zip([0.0, *arrivals], arrivals, strict=False)]
    quartiles = [-math.log(1 - share) / rate for share in (0.25, 0.5, 0.75)]
    cells = [sum(gap > quartile for quartile in quartiles) for gap in gaps]
    check_counts([cells.count(cell) for cell in range(4)], number, [0.25] * 4, "gaps between arrivals")
