"""Ranks that torchrun started. Two agents with a process each, over loopback, stand in for two machines."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanovllm import LLM, Config, SamplingParams, bundled_model_path
from nanovllm.worker import executor
from nanovllm.worker.rank_process import Model
from tests.distributed.test_failures import OPTIONS
from tests.support.counts import count_comparisons
from tests.support.limits import HANG_SECONDS
from tests.support.rank_faults import WORDS
from tests.support.source_tree import ROOT

PROMPTS = ["In the beginning", "And it came to pass"]
CLI_OPTIONS = ["--device", "cpu", "--max-model-len", "64", "--max-tokens", "12", "--greedy"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def torchrun(
    log_dir: Path, num_machines: int, per_machine: int, *program: str
) -> list[subprocess.CompletedProcess[str]]:
    """What each machine's torchrun printed, machine 0's first."""
    port = free_port()

    def agent(machine: int) -> Any:
        where = ["--nnodes", num_machines, "--node-rank", machine, "--nproc-per-node", per_machine]
        where += ["--master-addr", "127.0.0.1", "--master-port", port, "--log-dir", log_dir]
        command = [sys.executable, "-m", "torch.distributed.run", *map(str, where), *program]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, **pipes)

    agents = [agent(machine) for machine in range(num_machines)]
    outputs = [agent.communicate(timeout=HANG_SECONDS) for agent in agents]
    return [
        subprocess.CompletedProcess(agent.args, agent.returncode, out, err)
        for agent, (out, err) in zip(agents, outputs, strict=True)
    ]


def test_two_machines_say_what_one_process_says(tmp_path: Path) -> None:
    """D37: the first machine prints, and the second, which was sent the steps over the network, computes its share."""
    with LLM(str(bundled_model_path()), **OPTIONS) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams.greedy(max_tokens=12), use_tqdm=False)
    expected = [f"\n>>> {prompt}\n{output['text']}\n" for prompt, output in zip(PROMPTS, outputs, strict=True)]
    first, second = torchrun(tmp_path, 2, 1, "-m", "nanovllm", "generate", *CLI_OPTIONS, *PROMPTS)
    assert (first.returncode, first.stdout) == (0, "".join(expected)), first.stderr
    assert (second.returncode, second.stdout) == (0, ""), second.stderr
    assert "using the bundled one" not in second.stderr
    count_comparisons("ranks: texts of two machines against one process's", len(PROMPTS))


@pytest.mark.campaign
@pytest.mark.parametrize("place", ["load", "decode"])
def test_rank_0_says_what_ended_a_rank_on_another_machine(tmp_path: Path, place: str) -> None:
    """D33: torchrun ends all; before that, rank 0 has the cause."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os\n"
        "from nanovllm import LLM, SamplingParams, bundled_model_path\n"
        "from tests.support.rank_faults import Fault, plant_here\n"
        "if os.environ['RANK'] == '1':\n"
        f"    plant_here(Fault(1, {place!r}, 'raise'))\n"
        f"with LLM(str(bundled_model_path()), tensor_parallel_size=2, **{OPTIONS!r}) as llm:\n"
        "    llm.generate([[5, 6]], SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)\n"
    )
    first, second = torchrun(tmp_path, 2, 1, str(program))
    assert first.returncode != 0
    assert second.returncode != 0
    assert f"RankError: rank 1 of 2 failed: ArithmeticError: {WORDS}" in first.stderr
    assert f"ArithmeticError: {WORDS}" in second.stderr


def test_another_number_of_ranks_than_torchrun_started_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """D36: with both numbers."""
    launch = SimpleNamespace(rank=0, size=4, local_rank=0, local_size=4)
    monkeypatch.setattr(executor, "read_launch", lambda: launch)
    model: Any = Model(Config("any", tensor_parallel_size=2, device="cpu"), None, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the number of processes that torchrun started, 4, got 2"):
        executor._other_ranks(model)
