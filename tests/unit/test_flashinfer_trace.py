"""tools.flashinfer_trace: what it exports is valid for flashinfer-bench, and computes what our references compute."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from reference.paged_attention import paged_attention
from tests.support.tiny_models import tiny_model
from tools.flashinfer_trace.__main__ import main
from tools.flashinfer_trace.recording import OPERATIONS, PROMPTS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a run of a tiny Qwen3-MoE, whose layers call every operation but silu_and_mul, and a tiny Llama."""
    folder = tmp_path_factory.mktemp("trace") / "new"
    main([str(folder), "--model", str(tiny_model("qwen3_moe")), "--model", str(tiny_model("llama"))])
    return folder


def definitions(folder: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(path.read_text(encoding="utf-8")) for path in (folder / "definitions").rglob("*.json")]
    return {definition["name"]: definition for definition in found}


def workloads(folder: Path, name: str) -> list[dict[str, Any]]:
    (path,) = (folder / "workloads").rglob(f"{name}.jsonl")
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["workload"] for line in lines]


def inputs_of(folder: Path, definition: dict[str, Any], workload: dict[str, Any]) -> dict[str, Any]:
    sizes = {name: axis["value"] for name, axis in definition["axes"].items() if axis["type"] == "const"}
    sizes |= workload["axes"]
    inputs: dict[str, Any] = {}
    for name, given in workload["inputs"].items():
        spec = definition["inputs"][name]
        if given["type"] == "safetensors":
            inputs[name] = load_file(folder / given["path"])[given["tensor_key"]]
        elif given["type"] == "scalar":
            inputs[name] = given["value"]
        else:
            inputs[name] = torch.randn([sizes[axis] for axis in spec["shape"]], dtype=getattr(torch, spec["dtype"]))
    return inputs


def outputs_of(definition: dict[str, Any], inputs: dict[str, Any]) -> tuple[Any, ...]:
    """Of the code that the definition holds."""
    module: dict[str, Any] = {}
    exec(definition["reference"], module)
    result = module["run"](**inputs)
    return result if isinstance(result, tuple) else (result,)


def test_the_code_of_a_definition_needs_torch_alone_and_gives_what_the_reference_gives(folder: Path) -> None:
    """And every operation has a definition, and every definition workloads."""
    assert all(any(name.startswith(operation) for name in definitions(folder)) for operation in OPERATIONS)
    num_compared = 0
    for name, definition in definitions(folder).items():
        assert "jaxtyping" not in definition["reference"]
        assert "reference." not in definition["reference"]
        assert "__main__" not in definition["reference"]
        function = next(one.function for key, one in OPERATIONS.items() if name.startswith(key))
        found = workloads(folder, name)
        assert found, name
        for workload in found:
            inputs = inputs_of(folder, definition, workload)
            expected = function(**inputs)
            outputs = expected if isinstance(expected, tuple) else (expected,)
            for got, wanted in zip(outputs_of(definition, inputs), outputs, strict=True):
                torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)
                num_compared += 1
    assert num_compared > 30


def test_workloads_are_those_of_the_run(folder: Path) -> None:
    """Two prompts are prefilled and decode; a third begins like the first, whose first block is in the prefix cache."""
    (name,) = (name for name in definitions(folder) if name.startswith("paged_attention_decode_h4_d16"))
    definition = definitions(folder)[name]
    first = inputs_of(folder, definition, workloads(folder, name)[0])
    lengths = [len(prompt) + 1 for prompt in PROMPTS[:2]]
    assert sorted(first["context_lens"].tolist()) == sorted(lengths)
    assert first["block_tables"].dtype == torch.int32
    assert paged_attention(**first).shape == (2, 4, 16)
    (name,) = (name for name in definitions(folder) if name.startswith("paged_attention_prefill_h4_d16"))
    queries = [workload["axes"]["T"] for workload in workloads(folder, name)]
    assert queries == [len(PROMPTS[2]) - 16, 1], "the last layer computes the last token alone"


def test_flashinfer_bench_reads_what_is_exported(folder: Path) -> None:
    pytest.importorskip("flashinfer_bench")
    from flashinfer_bench.data import TraceSet

    traces = TraceSet.from_path(str(folder))
    assert traces.definitions.keys() == traces.workloads.keys() == definitions(folder).keys()
    for name, definition in traces.definitions.items():
        for trace in traces.workloads[name]:
            inputs = inputs_of(folder, definitions(folder)[name], trace.workload.model_dump(mode="json"))
            ordered = [inputs[key] for key in definition.inputs]
            assert definition.get_axes_values_from_inputs(ordered) == trace.workload.axes
            outputs = outputs_of(definitions(folder)[name], inputs)
            shapes = [list(one.shape) if isinstance(one, torch.Tensor) else None for one in outputs]
            assert definition.get_output_shapes(trace.workload.axes) == shapes, name
            sizes = {**definition.const_axes, **trace.workload.axes}
            assert all(eval(rule, {"__builtins__": {}}, sizes) for rule in definition.constraints), name


def test_an_export_of_the_same_run_is_the_same(folder: Path, tmp_path: Path) -> None:
    main([str(tmp_path / "new"), "--model", str(tiny_model("llama"))])
    paths = [path.relative_to(tmp_path / "new") for path in (tmp_path / "new").rglob("*.json")]
    assert len(paths) > 10
    assert all((folder / path).read_bytes() == (tmp_path / "new" / path).read_bytes() for path in paths)


def test_a_folder_that_is_not_empty_and_a_model_that_is_not_there_are_refused(tmp_path: Path, capsys) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path)])
    assert "is not empty; name a new folder" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "new"), "--model", str(tmp_path / "no_model")])
    assert "no_model" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
