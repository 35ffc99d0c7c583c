"""Definitions and Solutions of FlashInfer-Trace given to --kernel, right and wrong ones, and files that are neither.

The definitions have the names, axes and dtypes of the published ones, at small sizes, and references over ours.
test_adapters.py has the other signatures of attention. It is one file, so that each definition stands beside what is
wrong in its wrong version.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.test_kernels import KERNELS, NEEDS_INTERPRETER
from tests.support.kernels import own_kernels, sized_cases
from tests.support.kernels.interpreting import INTERPRETER, failure_of
from tests.support.kernels.trace_solutions import TraceFunction, load
from tests.support.tiny_models import tiny_model
from tools.flashinfer_trace.__main__ import main

BF16, F32, I32, I64 = "bfloat16", "float32", "int32", "int64"

DECODE = """
from tests.kernels.test_adapters import paged_decode

def run(q, k_cache, v_cache, kv_indptr, kv_indices, kv_last_page_len, sm_scale):
    return paged_decode(q, k_cache, v_cache, kv_indptr, kv_indices, kv_last_page_len, sm_scale)
"""
NORM = """
import torch

def run(hidden_states, weight):
    x = hidden_states.float()
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight.float()).bfloat16()
"""
ADD_NORM = (
    NORM.replace("run(", "norm(")
    + """
def run(hidden_states, residual, weight):
    return norm(hidden_states + residual, weight)
"""
)
ROPE = """
from nanovllm.layers.torch_ops import apply_rotary_embedding as turn

def run(q, k, cos_sin_cache, positions):
    cos, sin = cos_sin_cache[positions].chunk(2, dim=-1)
    return turn(q, cos, sin), turn(k, cos, sin)
"""
ROPE_TABLES = """
import torch

def turn(x, cos, sin):
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat([-second, first], dim=-1) * sin).bfloat16()

def run(q, k, cos, sin):
    return turn(q, cos.float(), sin.float()), turn(k, cos.float(), sin.float())
"""
SAMPLING = """
import torch

def run(probs, top_k, top_p):
    p, order = probs.sort(dim=1, descending=True)
    p = p * (torch.arange(p.shape[1]) < top_k[:, None])
    p = p / p.sum(dim=1, keepdim=True)
    p = p * (p.cumsum(dim=1) - p < top_p[:, None])
    return order.gather(1, torch.multinomial(p, 1)).flatten()
"""
MOE = """
import torch
from nanovllm.layers.torch_ops import apply_experts

def run(hidden_states, gating_output, w1, w2, topk_weights, topk_ids):
    up, gate = w1.chunk(2, dim=1)
    return apply_experts(hidden_states, topk_ids, topk_weights.bfloat16(), torch.cat([gate, up], dim=1), w2)
"""

Q = "batch_size num_qo_heads head_dim"
CACHE_SHAPE = "num_pages page_size num_kv_heads head_dim"
WEIGHTS = {
    "w1": ("num_experts gemm1_out_size hidden_size", BF16),
    "w2": ("num_experts hidden_size intermediate_size", BF16),
}
# name -> (our launcher, constants, inputs, outputs, reference, what is wrong in it and what instead)
DEFINITIONS: dict[str, tuple[str, dict[str, int], dict[str, Any], dict[str, Any], str, tuple[str, str]]] = {
    "gqa_paged_decode_h4_kv2_d16_ps16": (
        "paged_attention", {"num_qo_heads": 4, "num_kv_heads": 2, "head_dim": 16, "page_size": 16},
        {"q": (Q, BF16), "k_cache": (CACHE_SHAPE, BF16), "v_cache": (CACHE_SHAPE, BF16),
         "kv_indptr": ("len_indptr", I32), "kv_indices": ("num_kv_indices", I32),
         "kv_last_page_len": ("batch_size", I32), "sm_scale": (None, F32)},
        {"output": (Q, BF16), "lse": ("batch_size num_qo_heads", F32)},
        DECODE, ("paged_decode(q,", "paged_decode(2 * q,"),
    ),
    "rmsnorm_h48": (
        "rms_norm", {"hidden_size": 48},
        {"hidden_states": ("batch_size hidden_size", BF16), "weight": ("hidden_size", BF16)},
        {"output": ("batch_size hidden_size", BF16)}, NORM, (".mean(-1,", ".sum(-1,"),
    ),
    "fused_add_rmsnorm_h48": (
        "add_rms_norm", {"hidden_size": 48},
        {"hidden_states": ("batch_size hidden_size", BF16), "residual": ("batch_size hidden_size", BF16),
         "weight": ("hidden_size", BF16)},
        {"output": ("batch_size hidden_size", BF16)}, ADD_NORM, ("hidden_states + residual", "hidden_states"),
    ),
    "rope_with_cos_sin_cache_neox_style_d16": (
        "rotary_embedding", {"head_size": 16, "rotary_dim": 16},
        {"q": ("num_tokens num_qo_heads head_size", BF16), "k": ("num_tokens num_kv_heads head_size", BF16),
         "cos_sin_cache": ("max_seq_len rotary_dim", F32), "positions": ("num_tokens", I64)},
        {"q_out": ("num_tokens num_qo_heads head_size", BF16), "k_out": ("num_tokens num_kv_heads head_size", BF16)},
        ROPE, ("chunk(2, dim=-1)", "chunk(2, dim=-1)[::-1]"),
    ),
    "rope_h4_d16": (
        "rotary_embedding", {"num_q_heads": 4, "head_dim": 16},
        {"q": ("batch_size num_q_heads seq_len head_dim", BF16), "k": ("batch_size num_k_heads seq_len head_dim", BF16),
         "cos": ("seq_len head_dim", BF16), "sin": ("seq_len head_dim", BF16)},
        {"q_embed": ("batch_size num_q_heads seq_len head_dim", BF16),
         "k_embed": ("batch_size num_k_heads seq_len head_dim", BF16)},
        ROPE_TABLES, ("[-second, first]", "[second, first]"),
    ),
    "top_k_top_p_sampling_from_probs_v40": (
        "sampling", {"vocab_size": 40},
        {"probs": ("batch_size vocab_size", F32), "top_k": ("batch_size", I32), "top_p": ("batch_size", F32)},
        {"samples": ("batch_size", I64)}, SAMPLING,
        ("torch.multinomial(p, 1)", "torch.multinomial((p > 0).float(), 1)"),
    ),
    "moe_bf16_topk2_e6_h32_i16": (
        "grouped_gemm",
        {"num_experts": 6, "hidden_size": 32, "intermediate_size": 16, "gemm1_out_size": 32, "top_k": 2},
        {"hidden_states": ("seq_len hidden_size", BF16), "gating_output": ("seq_len num_experts", F32),
         **WEIGHTS, "topk_weights": ("seq_len top_k", F32), "topk_ids": ("seq_len top_k", I32)},
        {"output": ("seq_len hidden_size", BF16)}, MOE, ("[gate, up]", "[up, gate]"),
    ),
}  # fmt: skip


def definition(name: str, is_wrong: bool = False) -> dict[str, Any]:
    _, constants, inputs, outputs, reference, (old, new) = DEFINITIONS[name]
    assert old in reference
    dimensions = [axis for shape, _ in [*inputs.values(), *outputs.values()] if shape for axis in shape.split()]
    axes = {
        axis: {"type": "const", "value": constants[axis]} if axis in constants else {"type": "var"}
        for axis in dimensions
    }

    def specs(tensors: dict[str, Any]) -> dict[str, Any]:
        return {key: {"shape": shape and shape.split(), "dtype": dtype} for key, (shape, dtype) in tensors.items()}

    return {
        "name": name,
        "op_type": name.partition("_")[0],
        "axes": axes,
        "inputs": specs(inputs),
        "outputs": specs(outputs),
        "reference": reference.replace(old, new) if is_wrong else reference,
    }


def solution(name: str, code: str, **spec: Any) -> dict[str, Any]:
    spec = {"language": "python", "target_hardware": ["cpu"], "entry_point": "main.py::run", **spec}
    source = {"path": "main.py", "content": code}
    return {"name": "mine", "definition": name, "author": "tests", "spec": spec, "sources": [source]}


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _ours_again() -> Iterator[None]:
    yield
    own_kernels.install([])


def sized_failure(launcher: str, path: Path) -> str:
    """What the case of the definition's sizes says, in the interpreting process; "" if it passes."""
    own_kernels.install([f"{launcher}={path}"])
    (kernel,) = (one for one in KERNELS.values() if sized_cases.NAME in one.cases)
    outcome = INTERPRETER.run(kernel.module, sized_cases.NAME)
    assert not outcome.not_judged, outcome.not_judged
    return outcome.failure


# --- definitions ---


@NEEDS_INTERPRETER
@pytest.mark.parametrize("name", DEFINITIONS)
def test_a_right_reference_passes_and_a_wrong_one_fails_at_its_own_sizes(name: str, tmp_path: Path) -> None:
    launcher = DEFINITIONS[name][0]
    assert not sized_failure(launcher, write(tmp_path / "right.json", definition(name)))
    failure = sized_failure(launcher, write(tmp_path / "wrong.json", definition(name, is_wrong=True)))
    assert "differs from its reference" in failure or "top_k" in failure


@pytest.mark.parametrize(("filter", "message"), [("< top_k[", "top_k 1, "), ("< top_p[", "top_p 0.7: ")])
def test_a_token_that_a_filter_drops_must_not_be_drawn(filter: str, message: str, tmp_path: Path) -> None:
    content = definition("top_k_top_p_sampling_from_probs_v40")
    content["reference"] = content["reference"].replace(filter, f"< 99 * {filter[2:]}")
    own_kernels.install([f"sampling={write(tmp_path / 'wrong.json', content)}"])
    failure = failure_of(KERNELS["sampling"].cases[sized_cases.NAME], "cpu")
    assert "was drawn, which is dropped" in failure
    assert message in failure


def test_other_sizes_and_dtypes_than_the_definition_has_are_not_judged(tmp_path: Path) -> None:
    function = load(write(tmp_path / "norm.json", definition("rmsnorm_h48")))
    with pytest.raises(NotImplementedError, match="its definition has hidden_size = 48"):
        function(torch.ones(3, 32).bfloat16(), torch.ones(32).bfloat16())
    with pytest.raises(NotImplementedError, match="its definition has hidden_states in bfloat16"):
        function(torch.ones(3, 48), torch.ones(48))


# Of the exported definitions, those that a launcher of ours can be replaced by.
OWN = {
    **{name: name for name in ("rms_norm", "add_rms_norm", "silu_and_mul", "store_kvcache", "varlen_attention")},
    "paged_attention_decode": "paged_attention",
    "paged_attention_prefill": "varlen_attention",
}


@NEEDS_INTERPRETER
def test_the_definitions_that_we_export_are_judged(tmp_path: Path) -> None:
    main([str(tmp_path / "new"), "--model", str(tiny_model("llama"))])
    for name, launcher in OWN.items():
        path, *_ = sorted(tmp_path.rglob(f"definitions/**/{name}_*.json"))
        assert not sized_failure(launcher, path), path


# --- solutions ---

TRITON = """
import torch
import triton
import triton.language as tl

@triton.jit
def norm_kernel(x_ptr, weight_ptr, y_ptr, SIZE: tl.constexpr, TILE: tl.constexpr):
    index = tl.arange(0, TILE)
    mask = index < SIZE
    x = tl.load(x_ptr + tl.program_id(0) * SIZE + index, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + index, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x) / SIZE + 1e-6)
    tl.store(y_ptr + tl.program_id(0) * SIZE + index, (x * scale * weight).to(tl.bfloat16), mask=mask)

def run(hidden_states, weight, output):
    size = hidden_states.shape[1]
    norm_kernel[(len(hidden_states),)](hidden_states, weight, output, SIZE=size, TILE=triton.next_power_of_2(size))
"""


def dataset(tmp_path: Path, code: str, **spec: Any) -> Path:
    """A Solution of rmsnorm_h48 in a dataset's folders; returns its path."""
    write(tmp_path / "definitions" / "rmsnorm" / "rmsnorm_h48.json", definition("rmsnorm_h48"))
    return write(tmp_path / "solutions" / "rmsnorm" / "mine.json", solution("rmsnorm_h48", code, **spec))


@NEEDS_INTERPRETER
def test_a_triton_solution_that_writes_its_outputs_is_judged(tmp_path: Path) -> None:
    assert not sized_failure("rms_norm", dataset(tmp_path, TRITON, language="triton"))
    wrong = dataset(tmp_path / "wrong", TRITON.replace("x * scale * weight", "x * scale"), language="triton")
    assert "rms_norm differs from its reference" in sized_failure("rms_norm", wrong)


@NEEDS_INTERPRETER
def test_a_python_solution_that_returns_its_outputs_is_judged(tmp_path: Path) -> None:
    assert not sized_failure("rms_norm", dataset(tmp_path, NORM, destination_passing_style=False))


def test_a_solution_of_several_files_imports_them(tmp_path: Path) -> None:
    content = solution(
        "rmsnorm_h48", "from .half import half\nfrom other import ONE\ndef run(x, w, y): y.copy_(half(x) + ONE)"
    )
    content["sources"] += [
        {"path": "half.py", "content": "def half(x): return x / 2"},
        {"path": "other.py", "content": "ONE = 1"},
    ]
    write(tmp_path / "rmsnorm_h48.json", definition("rmsnorm_h48"))  # beside the Solution
    function = load(write(tmp_path / "mine.json", content))
    assert isinstance(function, TraceFunction)
    assert function(torch.full((1, 48), 2.0).bfloat16(), torch.ones(48).bfloat16()).tolist() == [[2.0] * 48]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"spec": {"language": "cuda", "entry_point": "main.py::run"}},
            "a Solution in cuda; those in python and triton",
        ),
        ({"definition": "rmsnorm_h49"}, "no rmsnorm_h49.json is beside it or in definitions/"),
        ({"spec": {"language": "python", "entry_point": "main.py::go"}}, "cannot import main.py::go: AttributeError"),
        ({"sources": [{"path": "main.py", "content": "1 / 0"}]}, "main.py::run: ZeroDivisionError"),
        ({"sources": [{"path": "../main.py", "content": "pass"}]}, "must stay in the Solution, got ../main.py"),
    ],
)
def test_a_solution_that_cannot_be_run_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = dataset(tmp_path, NORM)
    write(path, json.loads(path.read_text(encoding="utf-8")) | change)
    with pytest.raises(ValueError, match=f"^--kernel rms_norm=.*{message}"):
        own_kernels.load(f"rms_norm={path}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON: "),
        ("[]", "must hold one object, a Definition or a Solution"),
        (
            '{"name": "x"}',
            r"is no Definition \(it lacks reference\) and no Solution \(it lacks definition, spec, sources\)",
        ),
        ('{"name": "x", "reference": "1 +"}', "the reference of x: SyntaxError"),
    ],
)
def test_a_file_that_is_neither_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "some.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        own_kernels.load(f"rms_norm={path}")


def test_a_definition_of_another_kernel_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "norm.json", definition("rmsnorm_h48"))
    with pytest.raises(
        ValueError, match=r"has the parameters \(hidden_states, weight\), and hidden_states, weight would"
    ):
        own_kernels.load(f"paged_attention={path}")
