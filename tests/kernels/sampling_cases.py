"""Cases of sampling against reference.sampling: the same tokens. D56, D57, D58

It is one file, so that all that is known of the kernel is declared in one place.
"""

from typing import Any

import torch
from hypothesis import strategies as st

from benchmarks.kernels.sampling import measured
from nanovllm.layers.philox import exponential_from_words, token_words
from nanovllm.layers.sampler import argmax
from reference.philox import WORD, philox
from reference.sampling import sampling as reference_sampling
from tests.support.kernels.accuracy import counted
from tests.support.kernels.guards import Guards
from tests.support.kernels.registry import DTYPES, Compilation, Kernel, Limits, Refused, Steps, case, each, lazy, meta

sampling = lazy("sampling.sampling")
# Qwen3, Llama 3, Qwen2.5 and Llama 2, and sizes that are no multiple of anything
VOCAB_SIZES = (151_936, 128_256, 152_064, 32_000, 151_937, 97, 1)

POSITIONS = (0, 1, 2**20, 2**31, 2**32 - 1)
SEEDS = (0, 1, 2**32 - 1, 2**32, 0x0123456789ABCDEF, 2**63, 2**64 - 1)


def make_rows(num_rows: int, temperature: float, seed: int) -> dict[str, torch.Tensor]:
    """The launcher's arguments beside the logits, among them the extremes of seeds and positions."""
    generator = torch.Generator().manual_seed(seed)
    seeds = torch.randint(0, 2**32, (2, num_rows), generator=generator)
    position = torch.randint(0, 2**17, (num_rows,), generator=generator)
    for row in range(min(num_rows, len(SEEDS))):
        seeds[0, row], seeds[1, row] = SEEDS[row] & WORD, SEEDS[row] >> 32
        position[row] = POSITIONS[row % len(POSITIONS)]
    return {
        "temperature": temperature * torch.linspace(0.5, 2, num_rows),
        "seed_low": seeds[0].contiguous(),
        "seed_high": seeds[1].contiguous(),
        "position": position,
        "is_greedy": torch.arange(num_rows) % 3 == 2,
    }


def expected_tokens(logits: torch.Tensor, rows: dict[str, torch.Tensor]) -> list[int]:
    """reference.sampling of each row."""
    return [
        reference_sampling(
            row,
            float(rows["temperature"][index]),
            top_k=1 if rows["is_greedy"][index] else None,
            seed=int(rows["seed_low"][index]) | int(rows["seed_high"][index]) << 32,
            position=int(rows["position"][index]),
        )
        for index, row in enumerate(logits)
    ]


def sample(
    device: str, logits: torch.Tensor, rows: dict[str, torch.Tensor], *, row_padding: int = 0, **options: Any
) -> list[int]:
    """The launcher's tokens of all columns but the last row_padding; nothing else may have been written."""
    guards = Guards(device)
    guarded = {name: guards.read(tensor) for name, tensor in rows.items()}
    logits = guards.read(logits)[:, : logits.shape[1] - row_padding]
    with guards:
        token_ids = sampling(logits, **guarded, **options)
    return token_ids.tolist()


@case
def check(
    device: str,
    vocab_size: int,
    num_rows: int = 6,
    dtype: torch.dtype = torch.float32,
    scale: float = 3.0,
    temperature: float = 1.0,
    row_padding: int = 5,
    tile_size: int = 64,
    seed: int = 0,
) -> None:
    """Rows of logits, scale * randn, of which every third is greedy, have reference.sampling's tokens.

    row_padding: columns between two rows.
    """
    rows = make_rows(num_rows, temperature, seed)
    shape = (num_rows, vocab_size + row_padding)
    wide = scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    wide[:, vocab_size:] = 1e4  # a token that is read from beyond the vocabulary would win
    wide = wide.to(dtype)
    expected = expected_tokens(wide[:, :vocab_size], rows)
    assert sample(device, wide, rows, tile_size=tile_size, row_padding=row_padding) == expected
    counted("sampling", wide[:, 0].to(device))  # a token a row, chosen from logits of this dtype


def check_degenerate_rows(device: str) -> None:
    """NaN is -inf, +inf the largest number, the lowest id wins, and without a choice it is 0. Tiles of 4."""
    inf, nan = torch.inf, torch.nan
    rows_and_tokens = [
        ([-inf] * 9, 0),
        ([nan] * 9, 0),
        ([nan, -inf, nan, nan, nan, nan, -inf, 0.0, nan], 7),
        ([0.0] * 5 + [inf] + [1.0] * 3, 5),
        ([0.0] * 2 + [inf] + [1.0] * 3 + [inf] * 3, 2),
        ([-inf] * 8 + [-3e38], 8),
    ]
    for is_greedy in (True, False):
        rows = make_rows(len(rows_and_tokens), 1.0, seed=0) | {"is_greedy": torch.full((6,), is_greedy)}
        logits = torch.tensor([row for row, _ in rows_and_tokens])
        assert sample(device, logits, rows, tile_size=4) == [token for _, token in rows_and_tokens]


def check_ties(device: str) -> None:
    """Greedy: the lowest id of a tie, within a tile and across tiles, -0.0 and 0.0 among them."""
    logits = torch.full((3, 40), -1.0)
    logits[0, [5, 6, 39]] = 2.0
    logits[1, [17, 35]] = 2.0
    logits[2, 20], logits[2, 21], logits[2, 3] = 0.0, -0.0, -0.0
    rows = make_rows(3, 1.0, seed=0) | {"is_greedy": torch.ones(3, dtype=torch.bool)}
    assert sample(device, logits, rows, tile_size=8) == [5, 17, 3]


def check_temperatures(device: str) -> None:
    """1e-10 is the argmax though the quotients overflow; infinity draws evenly among the finite logits."""
    logits = torch.tensor([[20.0, -torch.inf, 21.0, -3.0]]).repeat(14, 1)
    rows = make_rows(14, 1.0, seed=0) | {"is_greedy": torch.zeros(14, dtype=torch.bool)}
    rows["temperature"] = torch.where(torch.arange(14) < 2, 1e-10, torch.inf)
    tokens = sample(device, logits, rows, tile_size=4)
    assert set(tokens[:2]) == {2}
    assert set(tokens[2:]) == {0, 2, 3}


def check_near_ties(device: str) -> None:
    """Two tokens whose exact scores differ by less than float32 can tell: in a tile, in two, in two parts of one.

    The logit of one is the noise it lacks, rounded to float32; all others are -inf.
    """
    for num_rows, vocab_size, tile_size, tokens in ((20, 4, 4, (0, 1)), (8, 9, 4, (1, 6)), (8, 1000, 1024, (3, 700))):
        rows = make_rows(num_rows, 1.0, seed=5) | {"is_greedy": torch.zeros(num_rows, dtype=torch.bool)}
        rows["temperature"] = torch.ones(num_rows)
        logits = torch.full((num_rows, vocab_size), -torch.inf)
        for row in range(num_rows):
            key, position = (int(rows["seed_low"][row]), int(rows["seed_high"][row])), int(rows["position"][row])
            words = torch.tensor([philox(key, (token // 4, position, 0, 0))[token % 4] for token in tokens])
            u = ((words.double() + 0.5) * 2.0**-32).clamp(max=1 - 2**-24)
            first, second = -torch.log(-torch.log1p(-u))
            logits[row, tokens[0]], logits[row, tokens[1]] = (second - first).float(), 0.0
        expected = expected_tokens(logits, rows)
        assert len(set(expected)) == 2, "both win now and then"
        assert sample(device, logits, rows, tile_size=tile_size) == expected


def check_parts(device: str) -> None:
    """The better of the best of two parts of the vocabulary is the best of all; parts begin anywhere."""
    rows = make_rows(6, 1.0, seed=3)
    logits = 3 * torch.randn(6, 121, generator=torch.Generator().manual_seed(3))
    expected = expected_tokens(logits, rows)
    greedy_or_drawn = torch.where(rows["is_greedy"][:, None], logits, scores_of_torch(logits, rows))
    for first_of_second in (1, 62, 64):
        best = []
        for first_token, part in zip((0, first_of_second), logits.tensor_split((first_of_second,), dim=1), strict=True):
            scores = torch.empty(6, dtype=torch.float64, device=device)
            tokens = sample(device, part, rows, tile_size=32, first_token=first_token, scores=scores)
            chosen = greedy_or_drawn.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            torch.testing.assert_close(scores.cpu(), chosen, rtol=0, atol=1e-13)
            best.append(list(zip(scores.tolist(), tokens, strict=True)))
        assert [max(pair)[1] for pair in zip(*best, strict=True)] == expected


def check_noise(device: str) -> None:
    """Both logarithms at every power of two and its neighbours, at the ends, and at random words.

    exact_gumbel to 1e-14, a few units of float64's last place; approx_log2_arrival_times to 0.03, below score_error.
    """
    from tests.kernels.sampling_probes import store_noise

    powers = 2 ** torch.arange(32)
    ends = torch.cat([torch.arange(300), 2**32 - 1 - torch.arange(300)])
    random = torch.randint(0, 2**32, (1000,), generator=torch.Generator().manual_seed(0))
    words = torch.cat([powers, powers - 1, powers + 1, ends, random])
    exact, approximate = store_noise(words, device)
    u = ((words.double() + 0.5) * 2.0**-32).clamp(max=1 - 2**-24)
    expected = -torch.log(-torch.log1p(-u))
    torch.testing.assert_close(exact.cpu(), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(approximate.cpu().double(), expected, rtol=0, atol=0.03)


def scores_of_torch(logits: torch.Tensor, rows: dict[str, torch.Tensor]) -> torch.Tensor:
    """[R, V] float64, reference.sampling's scores out of torch's operations, for whole vocabularies."""
    words = token_words(rows["seed_low"], rows["seed_high"], rows["position"], logits.shape[1])
    return logits.float() / rows["temperature"][:, None] - exponential_from_words(words).log()


@case
def check_whole_vocabulary(device: str, vocab_size: int, scale: float, dtype: torch.dtype) -> None:
    rows = {name: tensor.to(device) for name, tensor in make_rows(40, 1.0, seed=vocab_size).items()}
    logits = (scale * torch.randn(40, vocab_size + 1, device=device)).to(dtype)[:, :vocab_size]
    expected = torch.where(rows["is_greedy"], argmax(logits), argmax(scores_of_torch(logits, rows)))
    assert torch.equal(sampling(logits, **rows), expected)
    counted("sampling", logits[:, 0])


def check_tile_maxima(device: str) -> None:
    """score_error: every tile's largest score is as exact as the second launch assumes, for logits of every size."""
    from nanovllm.kernels.sampling import TILE_SIZE
    from tests.kernels.sampling_probes import tile_maxima

    rows = {name: tensor.to(device) for name, tensor in make_rows(64, 1.0, seed=1).items()}
    rows["is_greedy"][:] = False
    logits = torch.randn(64, 151_936, device=device) * torch.logspace(-3, 6, 64, device=device)[:, None]
    scores = scores_of_torch(logits, rows)
    expected = torch.nn.functional.pad(scores, (0, -151_936 % TILE_SIZE), value=-torch.inf)
    expected = expected.unflatten(1, (-1, TILE_SIZE)).amax(dim=2)
    actual = tile_maxima(logits, rows, TILE_SIZE)
    assert ((actual - expected).abs() <= 2.0**-5 + expected.abs() * 2.0**-20).all()


def check_far_row(device: str) -> None:
    """D52: rows that stand 2**30 elements apart, so the third begins at 2**31."""
    rows = {name: tensor.to(device) for name, tensor in make_rows(4, 1.0, seed=1).items()}
    storage = torch.empty(3 * 2**30 + 5000, dtype=torch.float16, device=device)
    logits = storage.as_strided((4, 5000), (2**30, 1)).normal_()
    assert torch.equal(sampling(logits, **rows), sampling(logits.clone(), **rows))
    assert sampling(logits, **rows).unique().numel() == 4


def check_graph(device: str) -> None:
    """D58: a replay reads seeds, positions and logits anew, and nothing waits for the device."""
    rows = {name: tensor.to(device) for name, tensor in make_rows(16, 1.0, seed=1).items()}
    logits = torch.randn(16, 5000, device=device)
    sampling(logits, **rows)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = sampling(logits, **rows)
    for step in range(3):
        logits.normal_()
        rows["position"] += 1
        rows["is_greedy"].copy_(torch.arange(16) % 2 == step % 2)
        graph.replay()
        assert torch.equal(recorded, sampling(logits, **rows))


def launch(
    num_rows: int, vocab_size: int = 151_936, dtype: torch.dtype = torch.bfloat16, first_token: int | None = None
) -> None:
    """On meta tensors that are, as the engine has them, rows of one. first_token: of a rank's part of a vocabulary."""
    _, *integers = meta(4, num_rows, dtype=torch.int64)
    _, temperature = meta(2, num_rows, dtype=torch.float32)
    columns = (temperature, *integers, meta(num_rows, dtype=torch.bool))
    logits = meta(num_rows, vocab_size, dtype=dtype)
    if first_token is None:
        sampling(logits, *columns)
    else:
        sampling(logits, *columns, first_token=first_token, scores=meta(num_rows, dtype=torch.float64))


CASES = {
    "one token": check(1),
    "fewer tokens than a Philox call has words": check(3),
    "exactly a tile": check(64),
    "four tiles, the last one ragged": check(121, tile_size=32),
    "one Philox call a tile": check(11, num_rows=3, tile_size=4),
    "even chances": check(97, scale=0.0),
    "cold": check(97, temperature=0.1),
    "hot": check(97, temperature=30.0),
    "one row": check(97, num_rows=1),
    "no rows": check(97, num_rows=0),
    "float16": check(97, dtype=torch.float16),
    "bfloat16": check(97, dtype=torch.bfloat16),  # cast up when loaded, so right in the interpreter too
    "degenerate rows": check_degenerate_rows,
    "ties": check_ties,
    "temperatures": check_temperatures,
    "near ties": check_near_ties,
    "parts of a vocabulary": check_parts,
    "noise": check_noise,
}

KERNEL = Kernel(
    name="sampling",
    launched={
        "sampling_tile_kernel": Limits(64, 16 * 1024),  # 64 of 65,536 registers: 8 blocks of 128 threads an SM
        "sampling_row_kernel": Limits(128, 16 * 1024),
    },
    cases=CASES,
    on_gpu=each(check_whole_vocabulary, vocab_size=VOCAB_SIZES, scale=(0.0, 1.0, 5.0), dtype=DTYPES)
    | {"tile maxima": check_tile_maxima, "far row": check_far_row, "graph": check_graph},
    drawn=st.builds(
        check,
        st.integers(1, 9000),
        st.integers(1, 20),
        st.sampled_from(DTYPES),
        temperature=st.sampled_from([1e-3, 0.5, 1.0, 10.0]),
        row_padding=st.integers(0, 8),
        tile_size=st.sampled_from([128, 256, 512, 1024, 2048, 4096]),
        seed=st.integers(0, 2**16),
    ),
    compiled={f"{n} tokens": Compilation(lambda dtype, _, n=n: launch(256, n, dtype)) for n in (151_936, 151_937, 1)}
    | {"a part": Compilation(lambda dtype, _: launch(256, 75_968, dtype, first_token=75_968))},
    refused=Refused(
        sampling,
        lambda: {"logits": torch.zeros(3, 10), **make_rows(3, 1.0, 0)},
        (
            ({"logits": torch.empty(3, 0)}, "logits must be .num_rows, vocab_size., not empty"),
            ({"logits": torch.empty(30)}, "logits must be .num_rows, vocab_size."),
            ({"logits": torch.empty(3, 10).double()}, "bfloat16, float16 or float32, got torch.float64"),
            ({"logits": torch.empty(10, 3).T}, "last dimension must be contiguous"),
            ({"temperature": torch.ones(3).double()}, "temperature must be contiguous, of shape .3. and torch"),
            ({"position": torch.ones(2, dtype=torch.int64)}, "position must be contiguous, of shape .3."),
            ({"seed_high": torch.ones(6, dtype=torch.int64)[::2]}, "seed_high must be contiguous"),
            ({"scores": torch.ones(3)}, "scores must be contiguous, of shape .3. and torch.float64"),
            ({"is_greedy": torch.ones(3)}, "is_greedy must be .* torch.bool, got .* torch.float32"),
        ),
    ),
    steps={"": Steps(launch, max_variants=2)},  # a tile's part and a row's
    measured={"sampling": measured},
)
