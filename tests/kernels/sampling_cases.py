"""Cases of sampling against reference.sampling: the same tokens. D56, D57, D58

It is one file, so that all that is known of the kernel is declared in one place.
"""

from dataclasses import dataclass
from functools import partial

import torch
from hypothesis import strategies as st

from benchmarks.arithmetic import Work
from benchmarks.kernels.inputs import randn
from benchmarks.measuring import Measured
from nanovllm.layers.philox import exponential_from_words, token_words
from nanovllm.layers.sampler import argmax
from reference.philox import WORD, philox
from reference.sampling import sampling as reference_sampling
from tests.support.kernels.accuracy import counted
from tests.support.kernels.guards import Guards
from tests.support.kernels.registry import EVERY_TARGET, Compilation, Kernel, Limits, Refusals, Steps, lazy, meta

sampling = lazy("sampling.sampling")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Qwen3, Llama 3, Qwen2.5 and Llama 2, and sizes that are no multiple of anything
VOCAB_SIZES = (151_936, 128_256, 152_064, 32_000, 151_937, 97, 1)

POSITIONS = (0, 1, 2**20, 2**31, 2**32 - 1)
SEEDS = (0, 1, 2**32 - 1, 2**32, 0x0123456789ABCDEF, 2**63, 2**64 - 1)


@dataclass(frozen=True)
class Case:
    """Rows of logits, scale * randn, of which every third is greedy. row_padding: columns between two rows."""

    vocab_size: int
    num_rows: int = 6
    dtype: torch.dtype = torch.float32
    scale: float = 3.0
    temperature: float = 1.0
    row_padding: int = 5
    tile_size: int = 64
    seed: int = 0


CASES = {
    "one token": Case(1),
    "fewer tokens than a Philox call has words": Case(3),
    "exactly a tile": Case(64),
    "one more than a tile": Case(65, num_rows=3),
    "four tiles, the last one ragged": Case(121, tile_size=32),
    "one Philox call a tile": Case(11, num_rows=3, tile_size=4),
    "one tile": Case(97, tile_size=128),
    "even chances": Case(97, scale=0.0),
    "cold": Case(97, temperature=0.1),
    "hot": Case(97, temperature=30.0),
    "one row": Case(97, num_rows=1),
    "two rows": Case(40, num_rows=2),
    "no rows": Case(97, num_rows=0),
    "float16": Case(97, dtype=torch.float16),
    "bfloat16": Case(97, dtype=torch.bfloat16),  # cast up when loaded, so right in the interpreter too
}


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
    guards: Guards, logits: torch.Tensor, rows: dict[str, torch.Tensor], *, row_padding: int = 0, **options: int
) -> list[int]:
    """The launcher's tokens of all columns but the last row_padding; nothing else may have been written."""
    guarded = {name: guards.read(tensor) for name, tensor in rows.items()}
    logits = guards.read(logits)[:, : logits.shape[1] - row_padding]
    with guards:
        token_ids = sampling(logits, **guarded, **options)
    guards.assert_intact()
    return token_ids.tolist()


def check(case: Case, device: str) -> None:
    """Raise AssertionError unless every row has reference.sampling's token."""
    rows = make_rows(case.num_rows, case.temperature, case.seed)
    shape = (case.num_rows, case.vocab_size + case.row_padding)
    wide = case.scale * torch.randn(shape, generator=torch.Generator().manual_seed(case.seed))
    wide[:, case.vocab_size :] = 1e4  # a token that is read from beyond the vocabulary would win
    wide = wide.to(case.dtype)
    expected = expected_tokens(wide[:, : case.vocab_size], rows)
    options = {"tile_size": case.tile_size, "row_padding": case.row_padding}
    assert sample(Guards(device), wide, rows, **options) == expected
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
        assert sample(Guards(device), logits, rows, tile_size=4) == [token for _, token in rows_and_tokens]


def check_ties(device: str) -> None:
    """Greedy: the lowest id of a tie, within a tile and across tiles, -0.0 and 0.0 among them."""
    logits = torch.full((3, 40), -1.0)
    logits[0, [5, 6, 39]] = 2.0
    logits[1, [17, 35]] = 2.0
    logits[2, 20], logits[2, 21], logits[2, 3] = 0.0, -0.0, -0.0
    rows = make_rows(3, 1.0, seed=0) | {"is_greedy": torch.ones(3, dtype=torch.bool)}
    assert sample(Guards(device), logits, rows, tile_size=8) == [5, 17, 3]


def check_temperatures(device: str) -> None:
    """1e-10 is the argmax though the quotients overflow; infinity draws evenly among the finite logits."""
    logits = torch.tensor([[20.0, -torch.inf, 21.0, -3.0]]).repeat(14, 1)
    rows = make_rows(14, 1.0, seed=0) | {"is_greedy": torch.zeros(14, dtype=torch.bool)}
    rows["temperature"] = torch.where(torch.arange(14) < 2, 1e-10, torch.inf)
    tokens = sample(Guards(device), logits, rows, tile_size=4)
    assert set(tokens[:2]) == {2}
    assert set(tokens[2:]) == {0, 2, 3}


def check_near_ties(device: str) -> None:
    """Two tokens whose exact scores differ by less than float32 can tell: in a tile, in two, in two parts of one.

    The logit of one is the noise it lacks, rounded to float32; all others are -inf.
    """
    num_rows = 20
    rows = make_rows(num_rows, 1.0, seed=5) | {"is_greedy": torch.zeros(num_rows, dtype=torch.bool)}
    rows["temperature"] = torch.ones(num_rows)
    for vocab_size, tile_size, tokens in ((4, 4, (0, 1)), (9, 4, (1, 6)), (1000, 1024, (3, 700))):
        logits = torch.full((num_rows, vocab_size), -torch.inf)
        for row in range(num_rows):
            key, position = (int(rows["seed_low"][row]), int(rows["seed_high"][row])), int(rows["position"][row])
            words = torch.tensor([philox(key, (token // 4, position, 0, 0))[token % 4] for token in tokens])
            u = ((words.double() + 0.5) * 2.0**-32).clamp(max=1 - 2**-24)
            first, second = -torch.log(-torch.log1p(-u))
            logits[row, tokens[0]], logits[row, tokens[1]] = (second - first).float(), 0.0
        expected = expected_tokens(logits, rows)
        assert len(set(expected)) == 2, "both win now and then"
        assert sample(Guards(device), logits, rows, tile_size=tile_size) == expected


def check_rows_alone(device: str) -> None:
    """D57, D58: a row's token is the same in every batch and for every tile size."""
    rows = make_rows(6, 1.0, seed=3)
    logits = torch.randn(6, 70, generator=torch.Generator().manual_seed(3))
    expected = sample(Guards(device), logits, rows, tile_size=32)
    assert sample(Guards(device), logits, rows, tile_size=128) == expected
    backwards = {name: tensor.flip(0) for name, tensor in rows.items()}
    assert sample(Guards(device), logits.flip(0), backwards, tile_size=32) == expected[::-1]
    for row in (0, 5):
        alone = {name: tensor[row : row + 1] for name, tensor in rows.items()}
        assert sample(Guards(device), logits[row : row + 1], alone, tile_size=32) == expected[row : row + 1]


def check_words(device: str) -> None:
    """philox_words are, bit for bit, reference.philox's; a kernel of two programs stores them."""
    from tests.kernels.sampling_probes import store_words

    rows = make_rows(7, 1.0, seed=0)
    actual = store_words(rows, num_tiles=2, tile_size=16, device=device)
    for row in range(7):
        key = int(rows["seed_low"][row]), int(rows["seed_high"][row])
        for token in range(32):
            counter = (token // 4, int(rows["position"][row]), 0, 0)
            assert int(actual[row, token]) == int(philox(key, counter)[token % 4])


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


def check_whole_vocabulary(vocab_size: int, scale: float, dtype: torch.dtype, device: str) -> None:
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


def launch(num_rows: int, vocab_size: int = 151_936, dtype: torch.dtype = torch.bfloat16) -> None:
    """On meta tensors that are, as the engine has them, rows of one."""
    _, *integers = meta(4, num_rows, dtype=torch.int64)
    _, temperature = meta(2, num_rows, dtype=torch.float32)
    sampling(meta(num_rows, vocab_size, dtype=dtype), temperature, *integers, meta(num_rows, dtype=torch.bool))


def measured(num_rows: int, vocab_size: int, is_greedy: bool) -> Measured:
    def make(index: int) -> tuple[torch.Tensor, ...]:
        logits = 3 * randn(index, num_rows, vocab_size)
        if is_greedy:
            logits[:, vocab_size // 3] = 100.0  # one largest: torch.argmax promises nothing for ties
        halves = torch.randint(0, 2**32, (2, num_rows), generator=torch.Generator().manual_seed(index)).cuda()
        position = torch.arange(num_rows, device="cuda") + 100 * index
        temperature = torch.linspace(0.5, 1.0, num_rows, device="cuda")
        return logits, temperature, *halves, position, torch.full((num_rows,), is_greedy, device="cuda")

    def plain(logits, temperature, seed_low, seed_high, position, greedy):
        if is_greedy:
            return logits.argmax(dim=1)
        noise = exponential_from_words(token_words(seed_low, seed_high, position, vocab_size))
        return (logits.float() / temperature[:, None] - noise.log()).argmax(dim=1)

    work = Work(num_rows * vocab_size * 2, 8 * num_rows)  # the logits, once; a token id of 8 bytes a row
    return Measured(make=make, run=sampling, expected=plain, work=work, peers={"torch": plain})


KERNEL = Kernel(
    name="sampling",
    launched={
        "sampling_tile_kernel": Limits(64, 16 * 1024),  # 64 of 65,536 registers: 8 blocks of 128 threads an SM
        "sampling_row_kernel": Limits(128, 16 * 1024),
    },
    cases={
        **{name: partial(check, case) for name, case in CASES.items()},
        "degenerate rows": check_degenerate_rows,
        "ties": check_ties,
        "temperatures": check_temperatures,
        "near ties": check_near_ties,
        "rows alone": check_rows_alone,
        "words": check_words,
        "noise": check_noise,
    },
    on_gpu={
        f"{vocab_size} tokens, {scale} x randn, {str(dtype)[6:]}": partial(
            check_whole_vocabulary, vocab_size, scale, dtype
        )
        for vocab_size in VOCAB_SIZES
        for scale in (0.0, 1.0, 5.0)
        for dtype in DTYPES
    }
    | {"tile maxima": check_tile_maxima, "far row": check_far_row, "graph": check_graph},
    drawn=st.builds(
        lambda vocab_size, num_rows, dtype, temperature, log2_size, seed: partial(
            check,
            Case(
                vocab_size,
                num_rows,
                dtype,
                temperature=temperature,
                row_padding=seed % 9,
                tile_size=2**log2_size,
                seed=seed,
            ),
        ),
        st.integers(1, 9000),
        st.integers(1, 20),
        st.sampled_from(DTYPES),
        st.sampled_from([1e-3, 0.5, 1.0, 10.0]),
        st.integers(7, 12),
        st.integers(0, 2**16),
    ),
    compiled={
        f"{size} tokens": Compilation(lambda dtype, _, size=size: launch(256, size, dtype), EVERY_TARGET)
        for size in (151_936, 151_937, 1)
    },
    refused=Refusals(
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
            ({"is_greedy": torch.ones(3)}, "is_greedy must be .* torch.bool, got .* torch.float32"),
        ),
    ),
    steps={"": Steps(launch, max_variants=2)},  # a tile's part and a row's
    measured={"sampling": measured},
)
