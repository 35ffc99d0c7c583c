"""`nanovllm bench --scenario`: a whole run on the bundled model, and what is refused."""

import json
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest

from nanovllm import cli
from nanovllm.bench import ceilings, random_model, scenarios
from nanovllm.bench.workload import SCENARIOS, draw_scenario
from nanovllm.commands import bench
from nanovllm.console import TERMINATED
from nanovllm.engine.llm_engine import LLMEngine
from tests.unit.test_cli import refusal

SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
TINY = dict(zip(SIZES, (64, 64, 4, 2, 99), strict=True))


@pytest.fixture(autouse=True)
def _small_ceilings(monkeypatch) -> None:
    """Two seconds less for each run."""
    monkeypatch.setattr(ceilings, "CPU_BYTES", 2**20)
    monkeypatch.setattr(ceilings, "CPU_MATMUL_SIZE", 64)


def test_scenarios_of_the_bundled_model_are_measured_and_written(tmp_path, capsys) -> None:
    options = ["--scenario", "prefix", "headline", "--scale", "0.02", "--rate", "500", "--repeat", "2", "--seed", "4"]
    assert cli.main(["bench", *options, "--results", str(tmp_path / "out"), "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert [line.split()[0] for line in lines[2:4]] == ["headline", "prefix"]
    assert [line.split()[0] for line in lines[7:11]] == ["headline", "headline", "prefix", "prefix"]
    assert "the bundled model, float32; " in captured.out
    assert lines[-2] == f"written: {tmp_path / 'out' / 'bench.json'}"
    assert captured.err.splitlines()[-1].startswith("Measuring: 50/50 in ")

    written = json.loads((tmp_path / "out" / "bench.json").read_text(encoding="utf-8"))
    assert written["options"]["rate"] == [500.0]
    assert written["options"]["device"] == "cpu"
    for row in written["rows"]:
        scenario = SCENARIOS[row["scenario"]].scaled(0.02)
        for repetition in row["repetitions"]:
            prompts, params = draw_scenario(scenario, 512, repetition["seed"])
            assert repetition["num_input_tokens"] == sum(map(len, prompts))
            assert repetition["num_output_tokens"] == sum(param.max_tokens for param in params)
        assert 0 < row["time_to_first_token"]["median"] <= row["time_to_first_token"]["p99"]
        assert row["gpu_idle"] is None
        assert (row["fraction"] is None) == (row["rate"] is not None)


@pytest.mark.gpu
@pytest.mark.whole_gpu
def test_on_a_gpu_the_idle_share_and_the_limit_are_measured(tmp_path, capsys) -> None:
    """With the real ceilings. A small model leaves the GPU idle for a part of the time, and computes for another."""
    options = ["--scenario", "small", "prefill", "--scale", "0.1", "--repeat", "1", "--rate", "50"]
    assert cli.main(["bench", *options, "--results", str(tmp_path), "--device", "cuda"]) == 0
    written = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert written["machine"]["gpu"] in capsys.readouterr().out
    assert written["ceilings"]["memory"] > 1e11
    assert written["ceilings"]["matmul"] > 1e12
    for row in written["rows"]:
        if row["rate"] is None:
            assert 0 <= row["gpu_idle"] < 1
            assert 0 < row["fraction"] < 1
        else:
            assert row["gpu_idle"] is None


@pytest.mark.parametrize("scenario", [[], ["--scenario", "single", "--scale", "0.02", "--repeat", "1"]])
def test_random_weights_of_a_named_shape_are_measured(scenario: list[str], capsys, monkeypatch) -> None:
    """With and without a scenario; the shape is made small."""
    class_name, options = random_model.SHAPES["llama-3-8b"]
    monkeypatch.setitem(random_model.SHAPES, "llama-3-8b", (class_name, {**options, **TINY, "head_dim": 16}))
    models: list[Any] = []
    start = LLMEngine.__init__

    def recorded_start(self: LLMEngine, model: str, **options: Any) -> None:
        start(self, model, **options)
        models.append((self.vocab_size, len(self._core.executor._runner.model.model.layers)))

    monkeypatch.setattr(LLMEngine, "__init__", recorded_start)
    like = ["--like", "llama-3-8b", "--num-layers", "2", "--device", "cpu", "--max-num-seqs", "4", "--num-seqs", "2"]
    assert cli.main(["bench", *like, *scenario]) == 0
    assert models == [(99, 2)]
    captured = capsys.readouterr()
    assert ("random weights like llama-3-8b, bfloat16" if scenario else "2 requests, ") in captured.out
    assert "no --model given" not in captured.err


SINGLE = ("--scenario", "single")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rate", "3", "--scale", "1"), "--rate, --scale needs a scenario: add --scenario"),
        ((*SINGLE, "--rate", "0"), "--rate must be a number above 0, in requests a second, got 0.0"),
        ((*SINGLE, "--rate", "5", "-2"), "--rate must be a number above 0, in requests a second, got -2.0"),
        ((*SINGLE, "--rate", "nan"), "--rate must be a number above 0, in requests a second, got nan"),
        (
            ("--scenario", "single", "headline", "--rate", "5", "1e-9"),
            "--rate must be at least 0.003, so that the 256 requests of 'headline' arrive within about a day, "
            "got 1e-09; raise it, or lower --num-seqs or --scale",
        ),
        ((*SINGLE, "--num-seqs", "2000", "--rate", "0.01"), "--rate must be at least 0.02, so that the 2000 requests"),
        ((*SINGLE, "--scale", "0"), "--scale must be a number above 0, got 0.0"),
        ((*SINGLE, "--scale", "1e307"), "got 18446744073709551614 in 'single'; lower --scale to 3.2, or choose"),
        ((*SINGLE, "--repeat", "0"), "--repeat must be an integer of at least 1, got 0"),
        ((*SINGLE, "--num-seqs", "0"), "--num-seqs must be an integer of at least 1, got 0"),
        ((*SINGLE, "--seed", "-1"), "--seed must be an integer of at least 0, got -1"),
        ((*SINGLE, "--input-len", "3", "4"), "a scenario has lengths of its own: leave out --input-len"),
        ((*SINGLE, "--like", "qwen3-0.6b", "--model", "x"), "leave out one of the two"),
        ((*SINGLE, "--num-layers", "3"), "add --like, or leave it out"),
        ((*SINGLE, "--like", "qwen3-0.6b", "--num-layers", "0"), "--num-layers must be an integer from 1 to 1000"),
        (("--like", "qwen3-0.6b", "--num-layers", "1001"), "--num-layers must be an integer from 1 to 1000, got 1001"),
        ((*SINGLE, "--model", "/nothing-here"), "--model must be an existing directory or a hub id"),
        ((*SINGLE, "--max-model-len", "100"), "lower --scale to 0.15, set --max-model-len to at least 640"),
        (("--scenario", "all"), "which is what the model takes, got 4016 in 'prefill'; lower --scale to 0.5"),
    ],
)
def test_a_wrong_use_is_refused_before_anything_is_measured(options, message, capsys, monkeypatch) -> None:
    monkeypatch.setattr(scenarios, "measure_ceilings", None)
    assert message in refusal(capsys, "bench", *options)


def test_an_output_that_is_a_file_is_refused(tmp_path, capsys) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert "--results must be a directory, got the file" in refusal(capsys, "bench", *SINGLE, "--results", str(file))
    assert "Not a directory" in refusal(capsys, "bench", *SINGLE, "--results", str(file / "below"))


def test_like_is_refused_under_torchrun(capsys, monkeypatch) -> None:
    """The other processes could not read a model in a temporary directory of this one."""
    names = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**names, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    line = refusal(capsys, "bench", *SINGLE, "--like", "qwen3-0.6b")
    assert "write one with python -m tools.make_random_model --like qwen3-0.6b DIR, and give --model DIR" in line


def test_sigterm_leaves_no_random_weights_behind(tmp_path, monkeypatch) -> None:
    """timeout and CI systems send it; the files of a model of 8 billion parameters take 16 GB."""

    def terminated(folder: Path, config: Any) -> None:
        (folder / "model.safetensors").write_text("weights")
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(bench, "make_random_model", terminated)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match=str(TERMINATED)):
        cli.main(["bench", "--like", "qwen3-0.6b", "--num-layers", "1"])
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before
