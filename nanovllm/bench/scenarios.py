"""`nanovllm bench --scenario`: checks the lengths, measures the ceilings, starts the engine, measures the scenarios."""

import math
from collections.abc import Callable
from typing import Any

from nanovllm.bench.ceilings import measure_ceilings
from nanovllm.bench.machine import machine_info
from nanovllm.bench.report import Result
from nanovllm.bench.session import Plan, Target, measure
from nanovllm.bench.workload import SCENARIOS, Scenario
from nanovllm.config import Config
from nanovllm.distributed.placement import local_placements, resolve_device
from nanovllm.model_config import ModelConfig
from nanovllm.model_path import local_model_dir
from nanovllm.models.registry import load_model_config
from nanovllm.torchrun_env import read_torchrun_env


def bench_scenarios(
    open_llm: Callable[[], Any], config: Config, name: str, plan: Plan, options: dict[str, Any]
) -> Result:
    """The result of `plan` on the LLM that open_llm starts, which is closed at the end.

    config: the configuration that open_llm uses. name: what the report calls the model. options: those of the command
        line, for the report.
    Raises ValueError before the engine starts if a scenario's sequences are too long for it.
    """
    import torch

    model = load_model_config(local_model_dir(config.model))
    check_lengths(plan.scenarios, config.max_model_len, model.max_supported_len)
    dtype = model.dtype if config.dtype == "auto" else config.dtype
    device = resolve_device(config.device)
    of_one_device = measure_ceilings(device, dtype)
    with open_llm() as llm:
        ceilings = of_one_device.scaled(num_devices(device, llm.config.tensor_parallel_size))
        rows = measure(Target(llm, model, dtype, ceilings, has_gpu=device.type == "cuda"), plan)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return Result(machine_info(gpu), describe_model(model, name, dtype), options, plan.scenarios, ceilings, rows)


def check_lengths(scenarios: dict[str, Scenario], max_model_len: int, max_supported_len: int) -> None:
    """Raise ValueError for the first scenario whose longest sequence exceeds what the engine or the model takes."""
    limit = min(max_model_len, max_supported_len)
    for name, scenario in scenarios.items():
        if scenario.max_len > limit:
            scale = max(1, math.floor(100 * limit / SCENARIOS[name].max_len)) / 100
            higher = f", set max_model_len to at least {scenario.max_len}" if limit < max_supported_len else ""
            raise ValueError(
                f"a scenario's sequences must have at most {limit} tokens, prompt and output together, which is what "
                f"the {'engine' if higher else 'model'} takes, got {scenario.max_len} in {name!r}; lower --scale to "
                f"{scale:g}{higher}, or choose another model or scenario"
            )


def num_devices(device: Any, num_ranks: int) -> int:
    """The number of devices that num_ranks ranks use: GPUs, or one for the CPU that they share."""
    if device.type == "cpu":
        return 1
    if read_torchrun_env() is not None:
        return num_ranks  # each process of torchrun gets a GPU of its own, where there are enough of them
    return len({placement.gpu for placement in local_placements(device, num_ranks)})


def describe_model(model: ModelConfig, name: str, dtype: str) -> dict[str, Any]:
    """The sizes on which the limit depends."""
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    described = {size: getattr(model, size) for size in ("model_type", *sizes, "head_dim", "vocab_size")}
    if model.moe is not None:
        experts = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
        described.update({size: getattr(model.moe, size) for size in experts})
    return {"name": name, "dtype": dtype, **described}
