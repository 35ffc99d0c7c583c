"""Adapters of layers other than attention: signatures of FlashInfer and of FlashInfer-Trace's definitions.

ADAPTERS is a table: our launcher, the parameters by which a signature is recognised, and a function that makes the
launcher of it. adapters.py has attention.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.support.kernels.plans import Plans

Function = Callable[..., Any]


class Adapter(NamedTuple):
    launcher: str
    marks: frozenset[str]
    adapted: Callable[[Function], Function]


def _rms_norm(function: Function, x_name: str) -> Function:
    """A definition fixes eps: in half precision, 1e-5 and 1e-6 differ by far less than rounding."""
    given = _names(function)

    def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
        inputs = {x_name: x.reshape(-1, x.shape[-1]), "weight": weight, **({"eps": eps} if "eps" in given else {})}
        return _first(function(**inputs)).view(x.shape)

    return rms_norm


def _add_rms_norm(function: Function) -> Function:
    """FlashInfer-Trace's definition returns no sum, so the sum is PyTorch's."""

    def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
        normed = function(hidden_states=x, residual=residual, weight=weight)
        return normed if isinstance(normed, tuple) else (normed, x + residual)

    return add_rms_norm


def _add_rms_norm_in_place(function: Function) -> Function:
    def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
        normed, total = x.clone(), residual.clone()
        function(input=normed, residual=total, weight=weight, eps=eps)
        return normed, total

    return add_rms_norm


def _rope_of_positions(function: Function) -> Function:
    given = _names(function)

    def rotary_embedding(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        positions = torch.arange(len(cos), device=cos.device)
        options = {"is_neox": True} if "is_neox" in given else {}
        return function(q=query, k=key, cos_sin_cache=torch.cat([cos, sin], dim=1), positions=positions, **options)

    return rotary_embedding


def _rope_of_tables(function: Function) -> Function:
    """[1, heads, T, D], and cosines of all D dimensions in the dtype of q."""

    def rotary_embedding(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        tables = {name: torch.cat([one, one], dim=1).to(query.dtype) for name, one in (("cos", cos), ("sin", sin))}
        heads_first = {name: one.transpose(0, 1)[None] for name, one in (("q", query), ("k", key))}
        return tuple(one[0].transpose(0, 1).contiguous() for one in function(**heads_first, **tables))

    return rotary_embedding


def _moe(function: Function) -> Function:
    """w1 has the rows of up before those of gate, and the choice of experts is given."""
    given, plans = _names(function), Plans()

    def grouped_gemm(hidden_states: Tensor, gate_up_proj: Tensor, down_proj: Tensor, routing: Any) -> Tensor:
        w1 = plans.get(gate_up_proj, lambda: torch.cat(gate_up_proj.chunk(2, dim=1)[::-1], dim=1))
        inputs: dict[str, Any] = {"hidden_states": hidden_states, "w1": w1, "w2": down_proj}
        inputs |= {"topk_weights": routing.weights, "topk_ids": routing.experts}
        if "gating_output" in given:  # whose choice is in the other two
            inputs["gating_output"] = torch.zeros(len(hidden_states), len(down_proj), device=hidden_states.device)
        return _first(function(**inputs))

    return grouped_gemm


def _store(function: Function) -> Function:
    """Our reference's definition returns the caches, and the launcher writes them."""

    def store_kvcache(key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
        result = function(key=key, value=value, k_cache=k_cache, v_cache=v_cache, slot_mapping=slot_mapping)
        for cache, new in zip((k_cache, v_cache), result or (), strict=bool(result)):
            cache.copy_(new)

    return store_kvcache


ADAPTERS = (
    Adapter("rms_norm", frozenset({"hidden_states", "weight"}), partial(_rms_norm, x_name="hidden_states")),
    Adapter("rms_norm", frozenset({"input", "weight"}), partial(_rms_norm, x_name="input")),
    Adapter("add_rms_norm", frozenset({"hidden_states", "residual", "weight"}), _add_rms_norm),
    Adapter("add_rms_norm", frozenset({"input", "residual", "weight", "eps"}), _add_rms_norm_in_place),
    Adapter("rotary_embedding", frozenset({"q", "k", "cos_sin_cache", "positions"}), _rope_of_positions),
    Adapter("rotary_embedding", frozenset({"q", "k", "cos", "sin"}), _rope_of_tables),
    Adapter("grouped_gemm", frozenset({"hidden_states", "w1", "w2", "topk_weights", "topk_ids"}), _moe),
    Adapter("store_kvcache", frozenset({"key", "value", "k_cache", "v_cache", "slot_mapping"}), _store),
)


def adapt(name: str, function: Function) -> Function:
    """`function` as our launcher `name`, if a row fits; else as it is."""
    try:
        names = _names(function)
    except (TypeError, ValueError):
        return function
    if name == "sampling" and "probs" in names:
        return _sampling
    row = next((row for row in ADAPTERS if row.launcher == name and row.marks <= names), None)
    return function if row is None else row.adapted(function)


def _sampling(logits: Tensor, temperature: Tensor, seed_low: Any, seed_high: Any, position: Any, is_greedy: Any) -> Any:
    """sized_cases.py compares what such a function draws with the exact probabilities."""
    raise NotImplementedError("it draws from probabilities, with random numbers of its own")


def _names(function: Function) -> set[str]:
    return set(inspect.signature(function).parameters)


def _first(result: Any) -> Any:
    return result[0] if isinstance(result, tuple) else result
