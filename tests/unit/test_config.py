"""Config: each rule at its edges, each message, and what it becomes."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanovllm import LLM
from nanovllm.config import ATTENTION_BACKENDS, Config, accept_nano_vllm_names

NAN, INF = float("nan"), float("inf")
MAX = 2**31 - 1
# option -> (values that are refused, the rule as the message states it, values that are accepted)
RULES: dict[str, tuple[list[Any], str, list[Any]]] = {
    "max_num_batched_tokens": ([511, -1, 600.0, "600", None, True], "an integer of at least 512", [512, np.int64(600)]),
    "max_num_seqs": ([0, -1, 1.5, "4", None, True], "an integer of at least 1", [1, 512, np.int8(100)]),
    "max_model_len": ([1, -1, 64.0, None, True], "an integer of at least 2", [2, 131072, np.int16(4096)]),
    "gpu_memory_utilization": ([0, 1.1, NAN, INF, "0.9", None, True], "a number in (0, 1]", [1e-9, 1, np.float32(0.5)]),
    "tensor_parallel_size": ([0, 9, -1, 2.0, None, True], "an integer from 1 to 8", [1, 8, np.int64(2)]),
    "enforce_eager": ([0, 1, None, "False"], "True or False", [True, False]),
    "async_scheduling": ([0, 1, "False"], "True or False", [True, False, None]),
    "kv_cache_block_size": ([0, -256, 256.0, True], "an integer of at least 1", [256, 768, None, np.int64(256)]),
    "num_kv_cache_blocks": ([0, 4.0, "4", True, MAX + 1], f"an integer from 1 to {MAX}", [1, None, np.int64(7), MAX]),
    "attention_backend": (
        ["flash", "", None, 3],
        "one of 'auto', 'torch', 'triton', 'flash_attn'",
        list(ATTENTION_BACKENDS),
    ),
    "dtype": (["fp32", None, 16], "one of 'auto', 'float32', 'bfloat16', 'float16'", ["auto", "float32", "bfloat16"]),
    "device": (["gpu", "cuda:0", None, 0], "one of 'auto', 'cpu', 'cuda'", ["auto", "cpu", "cuda"]),
    "seed": ([-1, 2**64, 1.0, None, True], f"an integer from 0 to {2**64 - 1}", [0, np.uint64(2**64 - 1)]),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, rule in RULES.items() for value in rule[0]])
def test_a_violation_says_name_rule_and_value(name: str, value: Any) -> None:
    """D36 for tensor_parallel_size: before any process starts."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the message is compared below
        Config("model", **{name: value})
    assert str(caught.value).startswith(f"{name} must be {RULES[name][1]}")
    assert f"got {value!r}" in str(caught.value)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, rule in RULES.items() for value in rule[2]])
def test_values_at_the_edge_are_accepted(name: str, value: Any) -> None:
    """numpy integers become ints: arithmetic on a small one would overflow later."""
    taken = getattr(Config("model", **{name: value}), name)
    assert taken == value
    assert not isinstance(taken, np.integer)


def test_every_option_has_its_rules_tested() -> None:
    assert RULES.keys() == {field.name for field in dataclasses.fields(Config)} - {"model"}


@pytest.mark.parametrize(
    ("backend", "smaller_sizes"),
    [
        ("auto", {16, 32, 64, 128}),
        ("flash_attn", set()),
        ("triton", {16, 32, 64, 128}),
        ("torch", {1, 2, 4, 8, 16, 32, 64, 128}),
    ],
)
def test_block_sizes_that_a_backend_takes(backend: str, smaller_sizes: set[int]) -> None:
    taken = set()
    for size in range(1, 800):
        try:
            Config("model", kv_cache_block_size=size, attention_backend=backend)
        except ValueError:
            continue
        taken.add(size)
    assert taken == smaller_sizes | {256, 512, 768}


def test_a_step_has_a_token_for_each_sequence() -> None:
    with pytest.raises(ValueError, match=r"at least 9, got 8; .*raise this or lower max_num_seqs"):
        Config("model", max_num_seqs=9, max_num_batched_tokens=8)
    assert Config("model", max_num_seqs=8, max_num_batched_tokens=8)


def test_a_model_is_a_str_or_a_path() -> None:
    assert Config(Path("some/model")).model == str(Path("some/model"))  # type: ignore[arg-type]
    for model in ("", None, 7, b"model"):
        with pytest.raises(ValueError, match=r"model must be a directory or a hub id such as 'Qwen/.*, got ") as caught:
            Config(model)  # type: ignore[arg-type]
        assert repr(model) in str(caught.value)


def test_names_of_nano_vllm_are_ours_for_an_llm() -> None:
    given = {"kvcache_block_size": 512, "num_kvcache_blocks": 7, "max_num_seqs": 3}
    assert accept_nano_vllm_names(given) == {"kv_cache_block_size": 512, "num_kv_cache_blocks": 7, "max_num_seqs": 3}
    assert accept_nano_vllm_names({"num_kvcache_blocks": -1}) == {"num_kv_cache_blocks": None}  # sized from memory
    with pytest.raises(TypeError, match="kvcache_block_size and kv_cache_block_size are one option under two names"):
        LLM("model", kvcache_block_size=256, kv_cache_block_size=256)
