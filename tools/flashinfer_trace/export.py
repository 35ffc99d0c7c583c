"""Definitions and workloads in FlashInfer-Trace's layout of a folder.

    definitions/OP_TYPE/NAME.json                   axes, inputs, outputs, and the reference as code
    workloads/OP_TYPE/NAME.jsonl                    one recorded call a line
    blob/workloads/OP_TYPE/NAME/UUID.safetensors    its integers: lengths, block tables, slots

Floats are drawn by the program that reads a workload, but for the scalars. Solutions go to solutions/.
"""

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, uuid5

import torch
from safetensors.torch import save_file

from tools.flashinfer_trace.recording import OPERATIONS, Call
from tools.flashinfer_trace.references import code_of, describe

MOST_WORKLOADS = 8  # of one definition, each of other sizes


def export(calls: Iterable[Call], folder: Path) -> dict[str, int]:
    """Write what `calls` show; returns the number of workloads of each definition, by its name."""
    definitions: dict[str, dict[str, Any]] = {}
    workloads: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for call in calls:
        definition, sizes = definition_of(call)
        name = definition["name"]
        definitions.setdefault(name, definition)
        key = json.dumps(sizes)
        if key not in workloads[name] and len(workloads[name]) < MOST_WORKLOADS:
            workloads[name][key] = _write_workload(call, definition, sizes, folder)
    for name, definition in definitions.items():
        place = Path(definition["op_type"])
        _write(folder / "definitions" / place / f"{name}.json", json.dumps(definition, indent=2) + "\n")
        lines = [json.dumps({"definition": name, "workload": one}) for one in workloads[name].values()]
        _write(folder / "workloads" / place / f"{name}.jsonl", "\n".join(lines) + "\n")
    return {name: len(found) for name, found in workloads.items()}


def definition_of(call: Call) -> tuple[dict[str, Any], dict[str, int]]:
    """The Definition that the call belongs to, and the values of its variable axes."""
    operation = OPERATIONS[call.name]
    result = operation.function(**call.inputs)
    results = result if isinstance(result, tuple) else (result,)
    outputs = dict(zip(operation.outputs, results, strict=True))
    found = describe(operation.function, call.inputs, outputs)
    arguments = ", ".join(f"{name}={_as_python(name, value)}" for name, value in call.inputs.items())
    idea = (operation.function.__doc__ or "").strip().splitlines()[0]
    return {
        "name": "_".join(filter(None, (call.name, found["suffix"]))),
        "description": f"nanovllm's reference {operation.function.__name__}: {idea}",
        "op_type": operation.op_type,
        "tags": ["status:verified", "framework:nanovllm"],
        "axes": found["axes"],
        "constraints": found["constraints"],
        "inputs": found["inputs"],
        "outputs": found["outputs"],
        "reference": code_of(operation.function, f"{operation.function.__name__}({arguments})", list(call.inputs)),
    }, found["sizes"]


def _as_python(name: str, value: Any) -> str:
    """Scalars may come as tensors."""
    return name if isinstance(value, torch.Tensor) else f"{type(value).__name__}({name})"


def _write_workload(call: Call, definition: dict[str, Any], sizes: dict[str, int], folder: Path) -> dict[str, Any]:
    tensors = {name: value for name, value in call.inputs.items() if isinstance(value, torch.Tensor)}
    stored = {name: value.contiguous() for name, value in tensors.items() if not value.is_floating_point()}
    text = json.dumps([definition["name"], sizes, {name: value.tolist() for name, value in stored.items()}])
    uuid = str(uuid5(NAMESPACE_URL, text))
    path = Path("blob", "workloads", definition["op_type"], definition["name"], f"{uuid}.safetensors")
    inputs: dict[str, Any] = {}
    for name, value in call.inputs.items():
        if name in stored:
            inputs[name] = {"type": "safetensors", "path": path.as_posix(), "tensor_key": name}
        else:
            inputs[name] = {"type": "random"} if name in tensors else {"type": "scalar", "value": value}
    if stored:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        save_file(stored, folder / path)
    return {"axes": sizes, "inputs": inputs, "uuid": uuid}


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
