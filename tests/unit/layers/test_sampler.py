"""The sampler against reference.sampling, Hugging Face's filters, and the laws of drawing."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nanovllm.layers import sampler as sampler_module
from nanovllm.layers.sampler import Sampler, allowed_mask, argmax
from reference.sampling import sampling
from tests.support.sampler_draws import rows_on_device

TOP_K, TOP_P, MIN_P = [0, 1, 2, 7, 10**6], [1.0, 0.95, 0.5, 0.01], [0.0, 0.02, 0.5, 1.0]
FILTERS = list(itertools.product(TOP_K, TOP_P, MIN_P))


def make_rows(num_rows: int, **fields) -> SimpleNamespace:
    """SamplingMetadata of num_rows; a field is one value for all rows or one a row."""
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0, "position": 0}
    dtypes = {"top_k": np.int64, "seed": np.uint64, "position": np.int64}
    values = {**defaults, **fields}
    return SimpleNamespace(
        **{
            name: np.broadcast_to(np.array(value, dtype=dtypes.get(name, np.float32)), (num_rows,)).copy()
            for name, value in values.items()
        }
    )


def sample(logits: torch.Tensor, rows: SimpleNamespace) -> list[int]:
    return Sampler()(logits, rows_on_device(rows, logits.device)).tolist()


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


def mixed_rows(num_rows: int, seed: int = 0) -> SimpleNamespace:
    """Every combination of filters, in a random order, with random seeds, positions and temperatures."""
    rng = np.random.default_rng(seed)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab_size", [1, 5, 97])
def test_equals_the_reference_for_every_combination_of_filters(vocab_size, dtype):
    """bfloat16 rounds many logits to ties, so the rules for ties are compared too."""
    num_rows = 3 * len(FILTERS)
    logits, rows = random_logits(num_rows, vocab_size).to(dtype), mixed_rows(num_rows)
    assert sample(logits, rows) == reference_sample(logits, rows)


@pytest.mark.parametrize("vocab_size", [151_936, 151_937])
def test_equals_the_reference_for_a_huge_vocabulary(vocab_size):
    logits, rows = random_logits(4, vocab_size), make_rows(4, top_k=[0, 0, 50, 1], top_p=[1, 0.9, 0.9, 1], seed=7)
    assert sample(logits, rows) == reference_sample(logits, rows)


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [f for f in FILTERS if f[0] != 1])
def test_kept_tokens_are_those_of_hugging_face(top_k, top_p, min_p):
    """Logits without ties, so that what happens at a tie cannot differ."""
    from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = random_logits(20, 60, seed=1)
    expected = TopKLogitsWarper(top_k)(None, logits) if top_k else logits
    expected = TopPLogitsWarper(top_p)(None, expected) if top_p < 1 else expected
    expected = MinPLogitsWarper(min_p)(None, expected)
    rows = rows_on_device(make_rows(20, top_k=top_k, top_p=top_p, min_p=min_p), "cpu")
    assert torch.equal(allowed_mask(logits, rows.top_k, rows.top_p, rows.min_p), expected > -torch.inf)


# --- ties and edges ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_takes_the_lowest_id_of_a_tie(dtype):
    logits = torch.zeros(3, 5000, dtype=dtype)
    logits[0, [4999, 17, 2048]] = 2.0
    logits[1, 4999] = 2.0
    assert sample(logits, make_rows(3, top_k=1, seed=[1, 2, 3])) == [17, 4999, 0]


def test_greedy_ignores_seed_position_and_temperature():
    logits = random_logits(1, 100).expand(50, 100)
    rows = make_rows(50, top_k=1, temperature=np.linspace(0.1, 9, 50), seed=np.arange(50), position=np.arange(50))
    assert sample(logits, rows) == [int(logits[0].argmax())] * 50


def test_top_k_keeps_ties_with_the_kth():
    scaled = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    allowed = allowed_mask(scaled, torch.tensor([2]), torch.tensor([1.0]), torch.tensor([0.0]))
    assert allowed.tolist() == [[False, True, True, True, False]]


def test_top_p_drops_equal_tokens_from_the_highest_id_down():
    """Four tokens of 1/4 each, exact in float32: 1/2 is reached by two, and a little more needs a third."""
    for top_p, num_kept in [(0.25, 1), (0.5, 2), (0.5000001, 3), (1.0, 4)]:
        allowed = allowed_mask(torch.zeros(1, 4), torch.tensor([0]), torch.tensor([top_p]), torch.tensor([0.0]))
        assert allowed.tolist() == [[True] * num_kept + [False] * (4 - num_kept)]


def test_top_p_near_zero_keeps_the_first_token():
    rows = make_rows(20, top_p=1e-50, seed=np.arange(20))
    assert rows.top_p[0] == 0, "1e-50 is 0 in float32"
    assert sample(torch.tensor([[0.0, 1.0, 0.5]]).expand(20, 3), rows) == [1] * 20


@pytest.mark.parametrize("fields", [{}, {"top_p": 0.99}, {"top_k": 5}, {"min_p": 0.001}])
def test_minus_infinity_never_wins(fields):
    logits = torch.zeros(400, 8)
    logits[:, [0, 3, 4, 7]] = -torch.inf
    assert set(sample(logits, make_rows(400, position=np.arange(400), **fields))) == {1, 2, 5, 6}


@pytest.mark.parametrize("fields", [{}, {"top_p": 0.9}, {"top_k": 2}, {"top_k": 1}, {"min_p": 0.5}])
@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([-torch.inf, -torch.inf, -torch.inf], 0),
        ([torch.nan, torch.nan, torch.nan], 0),
        ([torch.nan, -torch.inf, 0.0], 2),
        ([0.0, torch.inf, 1.0], 1),
        ([-torch.inf, 0.0, -torch.inf], 1),
    ],
)
def test_rows_without_a_choice_give_a_defined_token(logits, expected, fields):
    rows = make_rows(10, position=np.arange(10), **fields)
    assert sample(torch.tensor([logits]).expand(10, 3), rows) == [expected] * 10


@pytest.mark.parametrize(("margin", "winner"), [(26.0, 0), (25.0, 1)])
def test_probability_one_wins_against_the_worst_noise_there_is(monkeypatch, margin, winner):
    """D56: words 2**32 - 1 and 0 give exponentials 24 log 2 and 2**-33, so the noise
    spans log(24 log 2 * 2**33) = 25.7."""
    words = torch.tensor([[2**32 - 1, 0, 0]])
    monkeypatch.setattr(sampler_module, "token_words", lambda *args: words)
    assert sample(torch.tensor([[margin, 0.0, 0.0]]), make_rows(1)) == [winner]


@pytest.mark.parametrize("temperature", [1e-10, 1e-3, 1e300])
def test_extreme_temperatures_choose_among_the_finite_logits(temperature):
    """1e-10 is argmax; 1e300 is infinite in float32 and draws evenly."""
    logits = torch.tensor([[20.0, -torch.inf, 21.0, -3.0]]).expand(200, 4)
    with np.errstate(over="ignore"):
        rows = make_rows(200, temperature=temperature, position=np.arange(200))
    assert set(sample(logits, rows)) == ({0, 2, 3} if temperature > 1 else {2})


def test_argmax_of_a_column_that_is_not_contiguous():
    scores = torch.tensor([[1.0, 5.0], [7.0, 5.0], [7.0, 2.0]]).T
    assert argmax(scores).tolist() == [1, 0]


def test_no_rows_give_no_tokens():
    assert sample(torch.empty(0, 10), make_rows(0)) == []


def test_logits_are_unchanged():
    logits, rows = random_logits(80, 33), mixed_rows(80)
    before = logits.clone()
    sample(logits, rows)
    assert torch.equal(logits, before)


# --- each row for itself ---


def test_row_gives_the_same_token_in_every_batch(monkeypatch):
    """D57, D58: alone, in a batch, in the batch reversed, and whatever the slices."""
    logits, rows = random_logits(240, 50), mixed_rows(240)

    def take(index):
        return logits[index], SimpleNamespace(**{name: values[index] for name, values in vars(rows).items()})

    expected = sample(logits, rows)
    assert [sample(*take(slice(row, row + 1)))[0] for row in range(240)] == expected
    assert sample(*take(np.arange(240)[::-1].copy())) == expected[::-1]
    monkeypatch.setattr(sampler_module, "MAX_LOGITS_PER_SLICE", {"cpu": 149})  # two rows a slice
    assert sample(logits, rows) == expected


def test_each_row_has_its_own_temperature():
    """D57: cold rows give the argmax, hot ones between them spread."""
    logits = torch.arange(50.0).expand(400, 50)
    temperature = np.where(np.arange(400) % 2, 1e-3, 1e4)
    tokens = np.array(sample(logits, make_rows(400, temperature=temperature, position=np.arange(400))))
    assert (tokens[1::2] == 49).all()
    assert len(set(tokens[::2])) > 40  # 200 even draws from 50 leave e**-4 * 50 = 1 of them out on average


@pytest.mark.parametrize("other", [{"seed": 6}, {"seed": 5 + 2**32}, {"seed": 5 + 2**63}, {"first_position": 64}])
def test_seed_and_position_decide_the_draw(other):
    """D58: repeatable, and different for another seed (each half counts) or other positions."""

    def draws(seed: int = 5, first_position: int = 0) -> list[int]:
        return sample(torch.zeros(64, 1000), make_rows(64, seed=seed, position=first_position + np.arange(64)))

    assert draws() == draws()
    assert sum(a == b for a, b in zip(draws(), draws(**other), strict=True)) < 5  # 0.064 agree by chance


def test_noise_is_computed_only_for_rows_that_draw_and_in_slices(monkeypatch):
    calls = []
    token_words = sampler_module.token_words

    def spy(seed_low, *args):
        calls.append(len(seed_low))
        return token_words(seed_low, *args)

    monkeypatch.setattr(sampler_module, "token_words", spy)
    monkeypatch.setattr(sampler_module, "MAX_LOGITS_PER_SLICE", {"cpu": 250})
    sample(torch.zeros(12, 100), make_rows(12, top_k=[1, 0, 5, 0, 1, 0, 1, 5, 0, 1, 1, 0]))
    assert calls == [2, 2, 1, 2]  # five plain rows, two filtered, two rows a slice


# --- the distribution ---


@pytest.mark.parametrize("varying", ["position", "seed"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_draws_have_the_softmax_distribution(varying, temperature):
    """D56: chi-square with 7 degrees of freedom; the rarest token has probability 1e-4, so 40 of the draws.

    The draws are fixed; a right sampler with another seed would fail with probability 1e-6.
    """
    critical_value, num_draws = 40.52, 400_000
    probs = torch.tensor([0.4, 0.3, 0.2, 0.05, 0.04, 0.0089, 0.001, 0.0001], dtype=torch.float64)
    logits = (temperature * probs.log()).float().expand(num_draws, 8)
    fields = {"seed": 2026, "position": 11, varying: np.arange(num_draws)}
    tokens = torch.tensor(sample(logits, make_rows(num_draws, temperature=temperature, **fields)))
    counts, expected = tokens.bincount(minlength=8), num_draws * probs
    assert ((counts - expected) ** 2 / expected).sum() < critical_value


def test_filtered_draws_have_the_renormalised_distribution():
    """Chi-square with 2 degrees of freedom: top_k leaves 5, 3 and 2 tenths. False alarms 1e-6 by choice of seed."""
    critical_value, num_draws = 27.63, 50_000
    logits = torch.tensor([0.25, 0.1, 0.15, 0.09, 0.05]).log().expand(num_draws, 5)
    tokens = torch.tensor(sample(logits, make_rows(num_draws, top_k=3, seed=1, position=np.arange(num_draws))))
    counts, expected = tokens.bincount(minlength=5), num_draws * torch.tensor([0.5, 0.2, 0.3])
    assert counts[[3, 4]].sum() == 0
    assert ((counts[:3] - expected) ** 2 / expected).sum() < critical_value


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.parametrize("vocab_size", [97, 151_937])
def test_gpu_draws_the_tokens_that_the_cpu_draws(vocab_size):
    num_rows = 240
    logits, rows = random_logits(num_rows, vocab_size), mixed_rows(num_rows)
    assert sample(logits.cuda(), rows) == sample(logits, rows)


@pytest.mark.gpu
@pytest.mark.parametrize("fields", [{}, {"top_k": 1}, {"top_k": 1000, "top_p": 0.9, "min_p": 0.01}])
def test_gpu_memory_stays_within_the_stated_bound(fields):
    """D42: 512 rows of 151,936 logits; temporaries of one slice and a little for the allocator's rounding."""
    logits = torch.randn(512, 151_936, device="cuda", dtype=torch.bfloat16)
    rows = rows_on_device(make_rows(512, **fields), "cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    Sampler()(logits, rows)
    bound = sampler_module.MAX_LOGITS_PER_SLICE["cuda"] * sampler_module.MAX_BYTES_PER_LOGIT
    assert torch.cuda.max_memory_allocated() - before < bound + 2**22
