"""The command `pytest tests/conformance/engines --engine MODULE:CLASS`: what it prints, and what it refuses."""

import dataclasses
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conformance.engines import plugin
from tests.conformance.engines.adapters import NANO_VLLM, NANOVLLM, VLLM, Target, recognise
from tests.conformance.engines.contracts import CONTRACTS, check_usable
from tests.conformance.engines.driver import Broken
from tests.conformance.engines.fakes import nano_vllm_like, vllm_like
from tests.conformance.engines.plugin import find_target, parse_option
from tests.conformance.engines.reporting import explain_unusable
from tests.support.programs import run_python
from tests.support.source_tree import ROOT

NANO, VLLM_LIKE = nano_vllm_like.__name__, vllm_like.__name__
FORK = """
from tests.conformance.engines.fakes import nano_vllm_like
from tests.conformance.engines.fakes.nano_vllm_like import SamplingParams

class LLM(nano_vllm_like.LLM):
    def generate(self, prompts, sampling_params, use_tqdm=True):
        outputs = super().generate(prompts, sampling_params, use_tqdm)
        for output in outputs:
            output["token_ids"].pop()
        return outputs
"""


def run_engine(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ("-m", "pytest", "-p", "no:cacheprovider", "tests/conformance/engines")
    return run_python(*command, *arguments, PYTHONPATH=str(ROOT))


def test_a_fork_that_is_called_nanovllm_too_is_told_what_it_breaks(tmp_path: Path) -> None:
    """Its folder comes first, although the suite has imported our package of that name; its script fails too."""
    (tmp_path / "nanovllm").mkdir()
    (tmp_path / "nanovllm" / "__init__.py").write_text(FORK)
    result = run_engine("--engine", "nanovllm:LLM", "--engine-path", str(tmp_path), "-k", "E02 or E07 or E08")
    (broken,) = [contract for contract in CONTRACTS if contract.id == "E08"]
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Traceback" not in result.stdout
    assert f"E08 is broken by nanovllm:LLM: {broken.sentence}\nusers see: {broken.users_see}\n" in result.stdout
    assert "expected   1\ngot        0\n" in result.stdout
    assert "E02 kept\nE08 broken\nE07 not applicable: its SamplingParams has no seed\n" in result.stdout
    assert f"pytest --engine=nanovllm:LLM --engine-path={tmp_path} --randomly-seed" in result.stdout
    script = tmp_path / "scenario.py"
    script.write_text(re.split("^-{40}\n", result.stdout, flags=re.MULTILINE)[1])
    again = run_python(script, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert again.stderr.endswith("AssertionError: \ngot      0\nexpected 1\n"), again.stderr


def test_wrong_use_ends_in_one_line() -> None:
    result = run_engine("--engine", "nothing")
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert result.stderr.strip() == "ERROR: --engine nothing: write MODULE:CLASS, for example nanovllm:LLM"


ODD = """
class LLM:
    def generate(self): ...

class SamplingParams:
    def __init__(self, x): ...
"""


@pytest.mark.parametrize(
    ("spec", "folder", "message"),
    [
        ("not_there.engine:LLM", None, r"not_there.engine cannot be imported \(ModuleNotFound.* --engine-path$"),
        ("nanovllm:LMM", None, r"^module nanovllm has no class LMM; it has LLM, "),
        ("nanovllm:bundled_model_path", None, r"has no class bundled_model_path; it has "),
        ("nanovllm:SamplingParams", None, r"is no engine: it has no method generate"),
        ("odd_engine:LLM", ".", r"fields x, which no adapter recognises; choose one .*add one to .*adapters.py$"),
        ("odd_without_params:LLM", ".", r"^there is no class SamplingParams in module odd_without_params"),
        ("odd_engine:LLM", "nothing", r"nothing is no folder$"),
        ("colorsys:LLM", ".", r"holds no module colorsys; Python found .*colorsys"),
    ],
)
def test_an_engine_that_cannot_be_used_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spec: str, folder: str | None, message: str
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "odd_engine.py").write_text(ODD)
    (tmp_path / "odd_without_params.py").write_text(ODD.partition("class SamplingParams")[0])
    with pytest.raises(ValueError, match=message):
        find_target(spec, folder and str(tmp_path / folder), None, {})


def test_outputs_of_another_style_are_shown() -> None:
    target = find_target(f"{NANO}:LLM", None, None, {})
    with pytest.raises(Broken, match=r"expected 1 outputs in the style of nano-vllm, got \[\{'text': "):
        check_usable(dataclasses.replace(target, adapter=dataclasses.replace(target.adapter, token_ids="{}.token_ids")))


def test_an_engine_that_cannot_be_constructed_is_shown_how_it_was_called() -> None:
    target = find_target(f"{VLLM_LIKE}:LLM", None, None, {"max_model_len": 10**6})
    with pytest.raises(Broken) as raised:
        check_usable(target)
    message = explain_unusable(target, raised.value)
    assert message.startswith(f"--engine {VLLM_LIKE}:LLM, called as vllm, cannot be used: ValueError: the KV cache")
    assert "max_model_len=1000000" in message


def test_an_option_is_a_literal_or_a_string_and_refused_without_a_name() -> None:
    assert [parse_option(text)[1] for text in ("a=1", "b=True", "c=cuda", "d=x=y")] == [1, True, "cuda", "x=y"]
    for text in ("enforce_eager", "=1", "a b=1"):
        with pytest.raises(ValueError, match="write NAME=VALUE"):
            parse_option(text)


def test_contracts_run_in_their_order() -> None:
    names = [f"{plugin.TESTS}[{contract.id}]" for contract in CONTRACTS]
    items: list[Any] = [SimpleNamespace(nodeid=name) for name in [*names[::-1], "another test"]]
    plugin.pytest_collection_modifyitems(items)
    assert [item.nodeid for item in items] == [*names, "another test"]


def test_the_style_of_an_engine_is_recognised_by_its_sampling_parameters() -> None:
    ours = find_target("nanovllm:LLM", None, None, {})
    assert ours == Target(("nanovllm", "LLM"), ("nanovllm", "SamplingParams"), NANOVLLM)
    assert [find_target(f"{name}:LLM", None, None, {}).adapter for name in (NANO, VLLM_LIKE)] == [NANO_VLLM, VLLM]
    assert find_target("nanovllm:LLM", None, "nano-vllm", {}).adapter.name == "nano-vllm"
    assert recognise(["prompt"]) is None


ON_A_GPU = {
    "nanovllm": ["--engine-option=device=cuda", "--engine-option=attention_backend=triton"],
    "nano-vllm": [],
    "vllm": [],
}


@pytest.mark.gpu
@pytest.mark.whole_gpu  # the other engines fill part of its memory
@pytest.mark.parametrize("name", ON_A_GPU)
def test_on_a_gpu(name: str) -> None:
    """Ours keeps all contracts. Of another engine it is shown only that all contracts can be checked."""
    arguments = ["--engine", "vllm:LLM" if name == "vllm" else "nanovllm:LLM", *ON_A_GPU[name]]
    if name == "vllm" and importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed")
    if name == "nano-vllm":
        try:
            folder = importlib.metadata.distribution("nano-vllm").locate_file("")
        except importlib.metadata.PackageNotFoundError:
            pytest.skip("nano-vllm is not installed")
        arguments += ["--engine-path", str(folder)]
    result = run_engine(*arguments)
    summary = re.findall(r"^(E\d\d) (kept|broken|not applicable)", result.stdout, re.MULTILINE)
    assert sorted(id for id, _ in summary) == [contract.id for contract in CONTRACTS], result.stdout + result.stderr
    if name == "nanovllm":
        assert {word for _, word in summary} == {"kept"}, result.stdout
