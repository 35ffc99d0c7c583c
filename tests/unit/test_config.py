"""Config: each rule at its edges, each message, and what it becomes."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanovllm.config import ATTENTION_BACKENDS, Config

# option -> (values that are refused, the rule as the message states it)
REFUSED: dict[str, tuple[list[Any], str]] = {
    "max_num_batched_tokens": ([511, 0, -1, 600.0, "600", None, True], "an integer of at least 512"),
    "max_num_seqs": ([0, -1, 1.5, "4", None, True], "an integer of at least 1"),
    "max_model_len": ([1, 0, -1, 64.0, None, True], "an integer of at least 2"),
    "gpu_memory_utilization": (
        [0, 0.0, -0.1, 1.01, float("nan"), float("inf"), "0.9", None, True],
        "a number in (0, 1]",
    ),
    "tensor_parallel_size": ([0, 9, -1, 2.0, None, True], "an integer from 1 to 8"),
    "enforce_eager": ([0, 1, None, "False"], "True or False"),
    "async_scheduling": ([0, 1, "False"], "True or False"),
    "kv_cache_block_size": ([0, -256, 256.0, None, True], "an integer of at least 1"),
    "num_kv_cache_blocks": ([0, -1, 4.0, "4", True, 2**31], f"an integer from 1 to {2**31 - 1}"),
    "attention_backend": (["flash", "", None, 3], "one of 'auto', 'torch', 'triton', 'flash_attn'"),
    "dtype": (["fp32", "", None, 16], "one of 'auto', 'float32', 'bfloat16', 'float16'"),
    "device": (["gpu", "cuda:0", None, 0], "one of 'auto', 'cpu', 'cuda'"),
    "seed": ([-1, 2**64, 1.0, None, True], f"an integer from 0 to {2**64 - 1}"),
}
ACCEPTED: dict[str, list[Any]] = {
    "max_num_batched_tokens": [512, 16384, np.int64(600)],
    "max_num_seqs": [1, 512, np.int32(4)],
    "max_model_len": [2, 131072],
    "gpu_memory_utilization": [1e-9, 0.9, 1, 1.0, np.float32(0.5)],
    "tensor_parallel_size": [1, 8, np.int64(2)],
    "enforce_eager": [True, False],
    "async_scheduling": [True, False, None],
    "kv_cache_block_size": [256, 512, 768, np.int64(256)],
    "num_kv_cache_blocks": [1, None, np.int64(7), 2**31 - 1],
    "attention_backend": list(ATTENTION_BACKENDS),
    "dtype": ["auto", "float32", "bfloat16", "float16"],
    "device": ["auto", "cpu", "cuda"],
    "seed": [0, 2**64 - 1, np.uint64(2**64 - 1)],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, (values, _) in REFUSED.items() for value in values]
)
def test_a_violation_says_name_rule_and_value(name: str, value: Any) -> None:
    """D36 for tensor_parallel_size: said before any process starts."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the message is compared below
        Config("model", **{name: value})
    assert str(caught.value).startswith(f"{name} must be {REFUSED[name][1]}")
    assert f"got {value!r}" in str(caught.value)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in ACCEPTED.items() for value in values])
def test_values_at_the_edge_are_taken(name: str, value: Any) -> None:
    assert getattr(Config("model", **{name: value}), name) == value


def test_every_option_has_its_rules_tested() -> None:
    names = {field.name for field in dataclasses.fields(Config)} - {"model"}
    assert REFUSED.keys() == ACCEPTED.keys() == names


def test_defaults_are_those_that_are_documented() -> None:
    config = Config("model")
    assert (config.max_num_batched_tokens, config.max_num_seqs, config.max_model_len) == (16384, 512, 4096)
    assert (config.gpu_memory_utilization, config.tensor_parallel_size, config.enforce_eager) == (0.9, 1, False)
    assert (config.kv_cache_block_size, config.num_kv_cache_blocks, config.attention_backend) == (256, None, "auto")


@pytest.mark.parametrize(
    ("backend", "sizes"),
    [
        ("auto", {256, 512, 768}),
        ("flash_attn", {256, 512, 768}),
        ("triton", {16, 32, 64, 128, 256, 512, 768}),
        ("torch", {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768}),
    ],
)
def test_block_sizes_that_a_backend_takes(backend: str, sizes: set[int]) -> None:
    taken = set()
    for size in range(1, 800):
        try:
            Config("model", kv_cache_block_size=size, attention_backend=backend)
        except ValueError:
            continue
        taken.add(size)
    assert taken == sizes


def test_a_block_size_that_does_not_fit_the_backend_names_those_that_do() -> None:
    with pytest.raises(ValueError, match=r"multiple of 256 with attention_backend='auto', got 16; ") as caught:
        Config("model", kv_cache_block_size=16)
    assert "attention_backend='triton' also takes powers of two from 16" in str(caught.value)
    assert "attention_backend='torch' powers of two from 1" in str(caught.value)


def test_the_token_budget_covers_a_decode_step_of_all_sequences() -> None:
    with pytest.raises(
        ValueError, match=r"at least 9, got 8; .*max_num_seqs=9 sequences: raise this or lower max_num_seqs"
    ):
        Config("model", max_num_seqs=9, max_num_batched_tokens=8)
    assert Config("model", max_num_seqs=8, max_num_batched_tokens=8).max_num_batched_tokens == 8


def test_remedies_are_named() -> None:
    with pytest.raises(ValueError, match="one prompt token and one generated token"):
        Config("model", max_model_len=1)
    with pytest.raises(ValueError, match="use None to size it from memory"):
        Config("model", num_kv_cache_blocks=0)


def test_a_path_becomes_a_str() -> None:
    assert Config(Path("some/model")).model == str(Path("some/model"))  # type: ignore[arg-type]


@pytest.mark.parametrize("model", ["", None, 7, b"model", ["model"]])
def test_a_model_is_a_str_or_a_path(model: Any) -> None:
    with pytest.raises(
        ValueError, match=r"model must be a directory or a hub id such as 'Qwen/Qwen3-0\.6B', got "
    ) as caught:
        Config(model)
    assert repr(model) in str(caught.value)


@pytest.mark.parametrize(
    ("given", "nearest"),
    [("max_seqs", "max_num_seqs"), ("block_size", "kv_cache_block_size"), ("max_model_length", "max_model_len")],
)
def test_an_unknown_option_offers_the_nearest(given: str, nearest: str) -> None:
    """D69."""
    with pytest.raises(TypeError, match=rf"Config has no option '{given}'; did you mean '{nearest}'\?"):
        Config("model", **{given: 1})


def test_a_config_cannot_be_changed_but_replaced() -> None:
    config = Config("model")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.max_num_seqs = 3  # type: ignore[misc]
    assert dataclasses.replace(config, max_model_len=99).max_model_len == 99
    with pytest.raises(ValueError, match="max_model_len"):
        dataclasses.replace(config, max_model_len=0)


def test_numpy_integers_become_ints() -> None:
    """Arithmetic on a small numpy integer would overflow later."""
    config = Config("model", max_num_seqs=np.int8(100), max_model_len=np.int16(4096))  # type: ignore[arg-type]
    assert type(config.max_num_seqs) is type(config.max_model_len) is int
