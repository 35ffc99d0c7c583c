"""The sampler against reference.sampling and Hugging Face's filters, and that each row is sampled by itself."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.layers import sampler as sampler_module
from nanovllm.layers.sampler import Sampler, allowed_mask, argmax
from reference.sampling import sampling
from tests.support.parallel_ranks import run_together, threaded_ranks
from tests.support.sampler_draws import make_rows, make_sampler, rows_on_device, sample

TOP_K, TOP_P, MIN_P = [0, 1, 2, 7, 10**6], [1.0, 0.95, 0.5, 0.01], [0.0, 0.02, 0.5, 1.0]
FILTERS = list(itertools.product(TOP_K, TOP_P, MIN_P))


def reference_sample(logits: torch.Tensor, rows: SimpleNamespace) -> list[int]:
    return [
        sampling(
            logits[row],
            float(rows.temperature[row]),
            int(rows.top_k[row]) or None,
            float(rows.top_p[row]),
            float(rows.min_p[row]),
            int(rows.seed[row]),
            int(rows.position[row]),
        )
        for row in range(len(logits))
    ]


def mixed_rows(num_rows: int) -> SimpleNamespace:
    """Every combination of filters, in a random order, with random seeds, positions and temperatures."""
    rng = np.random.default_rng(0)
    top_k, top_p, min_p = zip(*(FILTERS[i] for i in rng.permutation(num_rows) % len(FILTERS)), strict=True)
    return make_rows(
        num_rows,
        temperature=rng.choice([0.1, 0.7, 1.0, 3.0], num_rows),
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=rng.integers(0, 2**64, num_rows, dtype=np.uint64),
        position=rng.integers(0, 10**5, num_rows),
    )


def random_logits(num_rows: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed))


# --- against the oracles ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab_size", [1, 5, 97])
def test_equals_the_reference_for_every_combination_of_filters(vocab_size: int, dtype: torch.dtype) -> None:
    """bfloat16 rounds many logits to ties, so the rules for ties are compared too. Logits are left as they are."""
    num_rows = 3 * len(FILTERS)
    logits, rows = random_logits(num_rows, vocab_size).to(dtype), mixed_rows(num_rows)
    before = logits.clone()
    assert sample(logits, rows) == reference_sample(logits, rows)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("vocab_size", [151_936, 151_937])
def test_equals_the_reference_for_a_huge_vocabulary(vocab_size: int) -> None:
    logits, rows = random_logits(4, vocab_size), make_rows(4, top_k=[0, 0, 50, 1], top_p=[1, 0.9, 0.9, 1], seed=7)
    assert sample(logits, rows) == reference_sample(logits, rows)


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [f for f in FILTERS if f[0] != 1])
def test_allowed_tokens_are_those_of_hugging_face(top_k: int, top_p: float, min_p: float) -> None:
    """Logits without ties, so that what happens at a tie cannot differ."""
    from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = random_logits(20, 60, seed=1)
    expected = TopKLogitsWarper(top_k)(None, logits) if top_k else logits
    expected = TopPLogitsWarper(top_p)(None, expected) if top_p < 1 else expected
    expected = MinPLogitsWarper(min_p)(None, expected)
    rows = rows_on_device(make_rows(20, top_k=top_k, top_p=top_p, min_p=min_p), "cpu")
    assert torch.equal(allowed_mask(logits, rows.top_k, rows.top_p, rows.min_p), expected > -torch.inf)


# --- several ranks ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("size", "vocab_size"), [(2, 94), (4, 52), (8, 8)])
def test_ranks_choose_what_one_would(size: int, vocab_size: int, dtype: torch.dtype) -> None:
    """D37: for every combination of filters, ties included; parts may begin within the four tokens of a Philox call."""
    num_rows = 3 * len(FILTERS)
    logits, rows = random_logits(num_rows, vocab_size).to(dtype), mixed_rows(num_rows)
    logits[-3:], logits[-2, -1], logits[-1, -1] = -torch.inf, torch.nan, 0.0
    expected, on_device = sample(logits, rows), rows_on_device(rows, "cpu")

    def work(tp: TensorParallel) -> list[int]:
        return Sampler(tp=tp)(logits.chunk(size, dim=1)[tp.rank], on_device).tolist()

    first, *others = run_together(work, threaded_ranks(size))
    assert first == expected
    unfiltered = sorted(set(range(num_rows)) - set(on_device.filtered_rows.tolist()))
    assert unfiltered, "what all ranks have is compared for some rows"
    for other in others:
        assert [other[row] for row in unfiltered] == [expected[row] for row in unfiltered]


# --- greedy rows ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_greedy_takes_the_lowest_id_of_a_tie(dtype: torch.dtype) -> None:
    """Whatever seed, position and temperature."""
    logits = torch.zeros(3, 5000, dtype=dtype)
    logits[0, [4999, 17, 2048]] = 2.0
    logits[1, 4999] = 2.0
    for temperature, number in ((1.0, 0), (9.0, 5), (0.1, 7)):
        rows = make_rows(3, top_k=1, seed=[1, 2, number], position=number, temperature=temperature)
        assert sample(logits, rows) == [17, 4999, 0]


def test_argmax_of_a_column_that_is_not_contiguous() -> None:
    scores = torch.tensor([[1.0, 5.0], [7.0, 5.0], [7.0, 2.0]]).T
    assert argmax(scores).tolist() == [1, 0]


# --- each row for itself ---


def test_row_gives_the_same_token_in_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """D57, D58: alone, in a batch, in the batch reversed, and whatever the slices. No rows give no tokens."""
    logits, rows = random_logits(240, 50), mixed_rows(240)

    def sample_rows(index: slice | np.ndarray) -> list[int]:
        return sample(logits[index], SimpleNamespace(**{name: values[index] for name, values in vars(rows).items()}))

    expected = sample(logits, rows)
    assert [sample_rows(slice(row, row + 1))[0] for row in range(240)] == expected
    assert sample_rows(np.arange(240)[::-1].copy()) == expected[::-1]
    assert sample_rows(slice(0, 0)) == []
    monkeypatch.setattr(sampler_module, "MAX_LOGITS_PER_SLICE", {"cpu": 149})  # two rows a slice
    assert sample(logits, rows) == expected


@pytest.mark.parametrize(("limit", "rows_of_slices"), [(250, [2, 2, 1, 2]), (99, [1] * 7)])
def test_noise_is_computed_only_for_rows_that_draw_and_in_slices(
    monkeypatch: pytest.MonkeyPatch, limit: int, rows_of_slices: list[int]
) -> None:
    """Five plain rows, two filtered, of 100 logits each."""
    calls = []
    token_words = sampler_module.token_words

    def spy(seed_low: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
        calls.append(len(seed_low))
        return token_words(seed_low, *args)

    monkeypatch.setattr(sampler_module, "token_words", spy)
    monkeypatch.setattr(sampler_module, "MAX_LOGITS_PER_SLICE", {"cpu": limit})
    sample(torch.zeros(12, 100), make_rows(12, top_k=[1, 0, 5, 0, 1, 0, 1, 5, 0, 1, 1, 0]))
    assert calls == rows_of_slices


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.parametrize("vocab_size", [97, 151_937])
def test_gpu_draws_the_tokens_that_the_cpu_draws(vocab_size: int) -> None:
    logits, rows = random_logits(240, vocab_size), mixed_rows(240)
    assert sample(logits.cuda(), rows) == sample(logits, rows)


@pytest.mark.gpu
@pytest.mark.parametrize("fields", [{}, {"top_k": 1}, {"top_k": 1000, "top_p": 0.9, "min_p": 0.01}], ids=str)
def test_gpu_memory_stays_within_the_stated_bound(fields: dict[str, float]) -> None:
    """D42: 512 rows of 151,936 logits; temporaries of one slice and a little for the allocator's rounding."""
    logits = torch.randn(512, 151_936, device="cuda", dtype=torch.bfloat16)
    rows, sampler = rows_on_device(make_rows(512, **fields), "cuda"), make_sampler("cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sampler(logits, rows)
    bound = sampler_module.MAX_LOGITS_PER_SLICE["cuda"] * sampler_module.MAX_BYTES_PER_LOGIT
    assert torch.cuda.max_memory_allocated() - before < bound + 2**22
