"""Our references and recorded workloads in FlashInfer-Trace's format: `python -m tools.flashinfer_trace DIR`."""

import argparse
import sys
from pathlib import Path

from nanovllm import bundled_model_path
from tools.flashinfer_trace.export import export
from tools.flashinfer_trace.recording import record


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.flashinfer_trace", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="where to write definitions, workloads and tensors")
    parser.add_argument(
        "--model", type=Path, action="append", metavar="DIR",
        help="record a run of this model, on the CPU; may be repeated (default: the bundled one and a tiny Qwen3-MoE)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if options.folder.exists() and any(options.folder.iterdir()):
        parser.error(f"{options.folder} is not empty; name a new folder")
    try:
        calls = [call for model in options.model or _models() for call in record(model)]
    except ValueError as error:
        parser.error(str(error))
    counts = export(calls, options.folder)
    for name, number in sorted(counts.items()):
        print(f"{name}: {number} workloads")
    print(f"{len(counts)} definitions written to {options.folder}")


def _models() -> list[Path]:
    from tests.support.tiny_models import tiny_model

    return [Path(bundled_model_path()), tiny_model("qwen3_moe")]


if __name__ == "__main__":
    sys.exit(main())
