"""torch's settings around a call change no token, and are as before afterwards."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from nanovllm import LLM, SamplingParams, bundled_model_path
from tests.e2e.conftest import BUNDLED_OPTIONS
from tests.support.tiny_models import tiny_model

PARAMS = [
    SamplingParams.greedy(max_tokens=8),
    SamplingParams(seed=4, max_tokens=8),
    SamplingParams(seed=5, top_k=20, top_p=0.9, min_p=0.01, max_tokens=8),
]
PROMPTS = [[5, 6, 7], [9, 8] * 20, [3] * 5]


class Zeros(TorchFunctionMode):
    """Makes every float tensor that a torch function returns zero."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        is_float = isinstance(result, torch.Tensor) and result.is_floating_point()
        return torch.zeros_like(result) if is_float else result


@contextmanager
def setting(set_value: Callable[[Any], Any], value: Any, before: Any) -> Iterator[None]:
    set_value(value)
    try:
        yield
    finally:
        set_value(before)


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "grad disabled": lambda: setting(torch.set_grad_enabled, False, True),
    "deterministic": lambda: setting(torch.use_deterministic_algorithms, True, False),
    "float64": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "float16": lambda: setting(torch.set_default_dtype, torch.float16, torch.float32),
    "meta": lambda: torch.device("meta"),
    "default device": lambda: setting(torch.set_default_device, "meta", None),
    "function mode": Zeros,
    "flush_denormal": lambda: setting(torch.set_flush_denormal, True, False),
}
GPU_STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cuda", dtype=torch.float16),
    "inference_mode": torch.inference_mode,
    "float64": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "meta": lambda: torch.device("meta"),
    "default device": lambda: setting(torch.set_default_device, "cuda", None),
    "another stream": lambda: torch.cuda.stream(torch.cuda.Stream()),
}


def torch_state() -> tuple[Any, ...]:
    return (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch._C._len_torch_function_stack(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
    )


def generate(llm: LLM) -> list[list[int]]:
    return [output["token_ids"] for output in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]


def generate_new(model: Path, options: dict[str, Any]) -> list[list[int]]:
    with LLM(str(model), **options) as llm:
        return generate(llm)


@pytest.mark.parametrize("state", STATES)
def test_the_state_around_a_call_changes_no_token(llm: LLM, state: str) -> None:
    """D87."""
    expected = generate(llm)
    with STATES[state]():
        before = torch_state()
        assert generate(llm) == expected
        assert torch_state() == before


@pytest.mark.parametrize("state", STATES)
def test_the_state_around_a_start_changes_no_token(llm: LLM, state: str) -> None:
    """D87: nor does its end matter to the engine that was started in it."""
    expected = generate(llm)
    with STATES[state]():
        before = torch_state()
        own = LLM(str(bundled_model_path()), **BUNDLED_OPTIONS)
        assert torch_state() == before
        assert generate(own) == expected
    with own:
        assert generate(own) == expected


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "qwen3_moe"])
def test_no_architecture_takes_torchs_default_dtype_or_device(model_type: str) -> None:
    """D87."""
    model = tiny_model(model_type)
    expected = generate_new(model, BUNDLED_OPTIONS)
    for state in ("float64", "default device", "autocast"):
        with STATES[state]():
            assert generate_new(model, BUNDLED_OPTIONS) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("enforce_eager", [True, False])
@pytest.mark.parametrize("state", GPU_STATES)
def test_the_state_around_changes_no_token_on_a_gpu(state: str, enforce_eager: bool) -> None:
    """D87."""
    options = {
        "device": "cuda", "max_model_len": 512, "max_num_seqs": 4, "num_kv_cache_blocks": 16,
        "enforce_eager": enforce_eager,
    }  # fmt: skip
    expected = generate_new(bundled_model_path(), options)
    with GPU_STATES[state]():
        before = torch_state()
        own = LLM(str(bundled_model_path()), **options)
        assert generate(own) == expected
        assert torch_state() == before
    with own:
        assert generate(own) == expected
