"""scenarios: lengths that the engine cannot take, the number of devices, what is reported of the model."""

import re
from types import SimpleNamespace

import pytest
import torch

from nanovllm.bench import scenarios
from nanovllm.bench.limits import Ceilings
from nanovllm.bench.scenarios import check_lengths, describe_model, num_devices
from nanovllm.bench.workload import SCENARIOS
from nanovllm.distributed import placement
from nanovllm.models.registry import load_model_config
from tests.support.tiny_models import tiny_model


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("limit", [100, 333, 2048, 4096])
def test_the_scale_that_the_message_names_makes_a_scenario_fit(name: str, limit: int) -> None:
    scenario = SCENARIOS[name]
    if scenario.max_len <= limit:
        check_lengths({name: scenario}, limit, limit)
        return
    with pytest.raises(ValueError, match="a scenario's sequences must have at most") as caught:
        check_lengths({name: scenario}, limit, limit)
    found = re.search(r"lower --scale to ([\d.]+), or choose another model or scenario$", str(caught.value))
    assert found is not None, caught.value
    check_lengths({name: scenario.scaled(float(found[1]))}, limit, limit)


def test_ceilings_are_those_of_all_gpus_that_the_ranks_use(monkeypatch) -> None:
    monkeypatch.setattr(placement.torch.cuda, "device_count", lambda: 4)
    gpu, cpu = SimpleNamespace(type="cuda", index=3), torch.device("cpu")
    assert [num_devices(gpu, ranks) for ranks in (1, 2, 4, 8)] == [1, 2, 4, 4]
    assert num_devices(cpu, 4) == 1, "ranks on a CPU share it"
    monkeypatch.setattr(scenarios, "read_torchrun_env", lambda: SimpleNamespace(size=8))
    assert num_devices(gpu, 8) == 8, "on several machines"
    assert Ceilings(2.0, 5.0).scaled(4) == Ceilings(8.0, 20.0)


def test_the_sizes_of_experts_are_reported() -> None:
    dense = describe_model(load_model_config(tiny_model("qwen3")), "a name", "float16")
    assert (dense["name"], dense["dtype"], dense["hidden_size"]) == ("a name", "float16", 64)
    assert "num_experts" not in dense
    assert describe_model(load_model_config(tiny_model("qwen3_moe")), "", "")["num_experts"] == 8
