"""Packed weights: the same products as the matrices that they were made of, and which of them are packed."""

import pytest
import torch
from torch.nn import functional

from nanovllm import LLM, SamplingParams
from nanovllm.layers import packed_weights
from nanovllm.layers.packed_weights import can_pack, pack_weights
from nanovllm.layers.torch_ops import TORCH_OPS, linear
from tests.support.tiny_models import tiny_model

needs_packing = pytest.mark.skipif(not can_pack(torch.empty(1000, 1000)), reason="needs oneDNN on x86")
# oneDNN has bfloat16 on CPUs with AVX-512 only.
DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if can_pack(torch.empty(1000, 1000, dtype=dtype))] or [
    torch.float32
]
GREEDY = SamplingParams.greedy(max_tokens=12, ignore_eos=True)


@needs_packing
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 3, 8, 70])
@pytest.mark.parametrize("has_bias", [False, True])
def test_products_are_those_of_the_matrix(dtype: torch.dtype, num_tokens: int, has_bias: bool) -> None:
    """Against float64, within twice the error that torch's own product of that dtype may have: k roundings."""
    weight = torch.randn(300, 200).to(dtype)
    x, bias = torch.randn(num_tokens, 200).to(dtype), torch.randn(300).to(dtype) if has_bias else None
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    exact = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    magnitude = functional.linear(
        x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs()
    )
    eps = torch.finfo(torch.float32).eps * 200 + (torch.finfo(dtype).eps if dtype != torch.float32 else 0)
    with torch.inference_mode():
        output = linear(x, packed, bias)
    assert output.dtype == dtype
    assert output.shape == exact.shape
    assert bool(((output.double() - exact).abs() <= 2 * eps * magnitude).all())


@needs_packing
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3_moe"])
def test_an_engine_with_packed_weights_generates_the_same(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tied, so that the embedding's matrix is used in both forms; qwen2 has biases, qwen3_moe a router."""
    options = {"device": "cpu", "num_kv_cache_blocks": 2, "max_model_len": 128}
    texts, num_packed = [], []
    for min_size in (packed_weights.MIN_SIZE, 0):
        monkeypatch.setattr(packed_weights, "MIN_SIZE", min_size)
        with LLM(str(tiny_model(architecture, tied=True)), **options) as llm:
            weights = list(llm._core.executor._runner.model.parameters())
            num_packed.append(sum(weight.is_mkldnn for weight in weights))
            texts.append([output["token_ids"] for output in llm.generate(["Hello", "A"], GREEDY, use_tqdm=False)])
    assert num_packed[0] == 0
    assert num_packed[1] > 4
    assert texts[0] == texts[1]


@pytest.mark.parametrize(("shape", "dtype"), [((10, 10), torch.float32), ((1000, 1000), torch.float64)])
def test_small_matrices_and_other_dtypes_stay_as_they_are(shape: tuple[int, int], dtype: torch.dtype) -> None:
    assert not can_pack(torch.empty(shape, dtype=dtype))
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    weight = model[0].weight
    pack_weights(model, TORCH_OPS)  # no layer of ours
    assert model[0].weight is weight
