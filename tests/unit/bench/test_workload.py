"""`nanovllm bench`: the workload that it draws."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nanovllm.bench.workload import MAX_TOKEN_ID, draw_requests

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
