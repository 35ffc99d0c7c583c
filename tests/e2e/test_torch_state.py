"""torch's settings around a call change no token, and are as before afterwards."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from nanovllm import LLM, SamplingParams, bundled_model_path
from tests.e2e.conftest import BUNDLED_OPTIONS, tokens
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


State = Callable[[], AbstractContextManager[Any]]
CPU_STATES: dict[str, State] = {
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
GPU_STATES: dict[str, State] = {
    **{name: CPU_STATES[name] for name in ("inference_mode", "float64", "meta")},
    "autocast": lambda: torch.autocast("cuda", dtype=torch.float16),
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


def assert_states_change_nothing(states: dict[str, State], model: Path, options: dict[str, Any]) -> None:
    """An engine that is made inside a state gives its tokens there and afterwards; so does one made outside of all."""
    with LLM(str(model), **options) as outside:
        expected = tokens(outside, PROMPTS, PARAMS)
        for name, state in states.items():
            with state():
                before = torch_state()
                inside = LLM(str(model), **options)
                assert torch_state() == before, name
                assert tokens(inside, PROMPTS, PARAMS) == expected, name
                assert tokens(outside, PROMPTS, PARAMS) == expected, name
                assert torch_state() == before, name
            with inside:
                assert tokens(inside, PROMPTS, PARAMS) == expected, name


def test_torch_state_changes_no_token() -> None:
    """D87."""
    assert_states_change_nothing(CPU_STATES, bundled_model_path(), BUNDLED_OPTIONS)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "qwen3_moe"])
def test_no_architecture_takes_torchs_default_dtype_or_device(model_type: str) -> None:
    """D87."""
    states = {name: CPU_STATES[name] for name in ("float64", "default device", "autocast")}
    assert_states_change_nothing(states, tiny_model(model_type), BUNDLED_OPTIONS)


@pytest.mark.gpu
@pytest.mark.parametrize("enforce_eager", [True, False])
def test_torch_state_changes_no_token_on_a_gpu(enforce_eager: bool) -> None:
    """D87."""
    options = {
        "device": "cuda", "max_model_len": 512, "max_num_seqs": 4, "num_kv_cache_blocks": 16,
        "enforce_eager": enforce_eager,
    }  # fmt: skip
    assert_states_change_nothing(GPU_STATES, bundled_model_path(), options)
