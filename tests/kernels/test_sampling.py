"""sampling against reference.sampling: interpreted on the CPU, compiled without a GPU, run on a GPU."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.layers.philox import exponential_from_words, token_words
from nanovllm.layers.sampler import argmax
from tests.kernels import sampling_cases as cases
from tests.support.kernels.accuracy import counted
from tests.support.kernels.compiling import CAPABILITIES, assert_fits, compile_launches
from tests.support.kernels.interpreting import run_interpreted

pytest.importorskip("triton")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Qwen3, Llama 3, Qwen2.5 and Llama 2, and sizes that are no multiple of anything
VOCAB_SIZES = [151_936, 128_256, 152_064, 32_000, 151_937, 97, 1]


def test_interpreted():
    """D56, D57, D58"""
    run_interpreted(cases.__name__)


@CAPABILITIES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [151_936, 151_937, 1])
def test_compiled(capability, dtype, vocab_size):
    from nanovllm.kernels.sampling import sampling

    logits = torch.empty(256, vocab_size, dtype=dtype, device="meta")
    rows = {name: tensor.to("meta") for name, tensor in cases.make_rows(256, 1.0, 0).items()}
    tiles, tokens = compile_launches(lambda: sampling(logits, **rows), capability)
    assert_fits(tiles, max_registers=64, max_shared_bytes=16 * 1024)  # 64 of 65,536: 8 blocks of 128 threads an SM
    assert_fits(tokens, max_registers=128, max_shared_bytes=16 * 1024)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.empty(3, 0)}, "logits must be .num_rows, vocab_size., not empty"),
        ({"logits": torch.empty(30)}, "logits must be .num_rows, vocab_size."),
        ({"logits": torch.empty(3, 10, dtype=torch.float64)}, "bfloat16, float16 or float32, got torch.float64"),
        ({"logits": torch.empty(10, 3).T}, "last dimension must be contiguous"),
        ({"temperature": torch.ones(3, dtype=torch.float64)}, "temperature must be contiguous, of shape .3. and torch"),
        ({"position": torch.ones(2, dtype=torch.int64)}, "position must be contiguous, of shape .3."),
        ({"seed_high": torch.ones(6, dtype=torch.int64)[::2]}, "seed_high must be contiguous"),
        ({"is_greedy": torch.ones(3)}, "is_greedy must be .* torch.bool, got .* torch.float32"),
    ],
)
def test_what_the_contract_excludes_is_refused(change, message):
    from nanovllm.kernels.sampling import sampling

    with pytest.raises(ValueError, match=message):
        sampling(**{"logits": torch.zeros(3, 10), **cases.make_rows(3, 1.0, 0), **change})


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.parametrize("name", cases.CHECKS)
def test_on_a_gpu(name):
    """D56, D57, D58"""
    cases.CHECKS[name]("cuda")


def scores_of_torch(logits: torch.Tensor, rows: dict[str, torch.Tensor]) -> torch.Tensor:
    """[R, V] float64, reference.sampling's scores out of torch's operations, for whole vocabularies."""
    words = token_words(rows["seed_low"], rows["seed_high"], rows["position"], logits.shape[1])
    return logits.float() / rows["temperature"][:, None] - exponential_from_words(words).log()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0])
def test_whole_vocabularies_on_a_gpu(scale, vocab_size, dtype):
    from nanovllm.kernels.sampling import sampling

    rows = {name: tensor.cuda() for name, tensor in cases.make_rows(40, 1.0, seed=vocab_size).items()}
    logits = (scale * torch.randn(40, vocab_size + 1, device="cuda")).to(dtype)[:, :vocab_size]
    expected = torch.where(rows["is_greedy"], argmax(logits), argmax(scores_of_torch(logits, rows)))
    assert torch.equal(sampling(logits, **rows), expected)
    counted("sampling", logits[:, 0])


@pytest.mark.gpu
@given(
    num_rows=st.integers(1, 20),
    vocab_size=st.integers(1, 9000),
    dtype=st.sampled_from(DTYPES),
    temperature=st.sampled_from([1e-3, 0.5, 1.0, 10.0]),
    log2_tile_size=st.integers(7, 12),
    seed=st.integers(0, 2**16),
)
def test_random_shapes_on_a_gpu(num_rows, vocab_size, dtype, temperature, log2_tile_size, seed):
    case = cases.Case(
        vocab_size,
        num_rows,
        dtype,
        temperature=temperature,
        tile_size=2**log2_tile_size,
        seed=seed,
        row_padding=seed % 9,
    )
    cases.check(case, "cuda")


@pytest.mark.gpu
def test_tile_maxima_are_as_exact_as_the_second_launch_assumes():
    """score_error: every tile's largest score, against float64's, for logits of every size."""
    from nanovllm.kernels import sampling as module
    from tests.kernels.sampling_probes import tile_maxima

    rows = {name: tensor.cuda() for name, tensor in cases.make_rows(64, 1.0, seed=1).items()}
    rows["is_greedy"][:] = False
    logits = torch.randn(64, 151_936, device="cuda") * torch.logspace(-3, 6, 64, device="cuda")[:, None]
    actual = tile_maxima(logits, rows, module.TILE_SIZE)
    expected = torch.nn.functional.pad(
        scores_of_torch(logits, rows), (0, -151_936 % module.TILE_SIZE), value=-torch.inf
    )
    expected = expected.unflatten(1, (-1, module.TILE_SIZE)).amax(dim=2)
    assert ((actual - expected).abs() <= 2.0**-5 + expected.abs() * 2.0**-20).all()


@pytest.mark.gpu
def test_rows_beyond_2_31_elements_on_a_gpu():
    """D52: rows that stand 2**30 elements apart, so the third begins at 2**31."""
    from nanovllm.kernels.sampling import sampling

    rows = {name: tensor.cuda() for name, tensor in cases.make_rows(4, 1.0, seed=1).items()}
    storage = torch.empty(3 * 2**30 + 5000, dtype=torch.float16, device="cuda")
    logits = storage.as_strided((4, 5000), (2**30, 1)).normal_()
    assert torch.equal(sampling(logits, **rows), sampling(logits.clone(), **rows))
    assert sampling(logits, **rows).unique().numel() == 4


@pytest.mark.gpu
def test_fifty_runs_give_the_same_tokens():
    from nanovllm.kernels.sampling import sampling

    rows = {name: tensor.cuda() for name, tensor in cases.make_rows(64, 1.0, seed=1).items()}
    logits = torch.randn(64, 151_936, device="cuda", dtype=torch.bfloat16)
    expected = sampling(logits, **rows)
    assert all(torch.equal(sampling(logits, **rows), expected) for _ in range(50))


@pytest.mark.gpu
def test_recorded_in_a_graph_it_follows_its_arguments():
    """D58: a replay reads seeds, positions and logits anew, and nothing waits for the device."""
    from nanovllm.kernels.sampling import sampling

    rows = {name: tensor.cuda() for name, tensor in cases.make_rows(16, 1.0, seed=1).items()}
    logits = torch.randn(16, 5000, device="cuda")
    sampling(logits, **rows)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = sampling(logits, **rows)
    for step in range(3):
        logits.normal_()
        rows["position"] += 1
        rows["is_greedy"].copy_(torch.from_numpy(np.arange(16) % 2 == step % 2))
        graph.replay()
        assert torch.equal(recorded, sampling(logits, **rows))
