"""The results as a table and as JSON: how near each kernel comes to what the GPU can do, how long the host side takes.

python -m benchmarks.report benchmarks/results/kernels.json    (or host.json: prints the table)
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple


class Result(NamedTuple):
    """One session: the machine, its ceilings, and a row for each benchmark, the extra_info that measuring.py writes."""

    machine: dict[str, Any]
    ceilings: dict[str, float]
    rows: list[dict[str, Any]]


class HostResult(NamedTuple):
    """The same of the host side: a row for each benchmark, the extra_info that hosting.py writes."""

    machine: dict[str, Any]
    rows: list[dict[str, Any]]


def table(result: Result | HostResult) -> str:
    """One line a benchmark; times in microseconds. Kernels: worst fraction of the ceiling first."""
    if isinstance(result, HostResult):
        width = max(len(row["host"]) for row in result.rows)
        lines = [f"{'host side':{width}} {'us':>9} {'yardsticks':>10}"]
        lines += [f"{row['host']:{width}} {row['microseconds']:9.1f} {row['ratios'][0]:10.2f}" for row in result.rows]
        return "\n".join(lines)
    peers = sorted({name for row in result.rows for name in row["peers"]})
    widths = [max(len(str(row[name])) for row in result.rows) for name in ("kernel", "case")]
    lines = [
        f"{'kernel':{widths[0]}}  {'case':{widths[1]}} {'us':>9} {'floor':>9} {'of ceiling':>17}"
        + "".join(f" {name:>11}" for name in peers)
    ]
    for row in sorted(result.rows, key=lambda row: row["fraction"]):
        figures = "".join(f" {row['peers'][name]:11.1f}" if name in row["peers"] else f" {'-':>11}" for name in peers)
        lines.append(
            f"{row['kernel']:{widths[0]}}  {row['case']:{widths[1]}} {row['microseconds']:9.1f} "
            f"{row['floor_microseconds']:9.1f} {row['fraction']:9.1%} {row['ceiling']:>7}{figures}"
        )
    lines += [f"no figure, {row['kernel']}, {row['case']}: {note}" for row in result.rows for note in row["notes"]]
    ceilings = result.ceilings
    lines.append(
        f"ceilings of this run on {result.machine['gpu']}: copy {ceilings['copy'] / 1e12:.2f} TB/s, read "
        f"{ceilings['read'] / 1e12:.2f} TB/s, bfloat16 matrix product {ceilings['matmul'] / 1e12:.0f} TFLOP/s"
    )
    return "\n".join(lines)


def write(result: Result | HostResult, folder: Path) -> Path:
    """kernels.json or host.json; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ("host.json" if isinstance(result, HostResult) else "kernels.json")
    path.write_text(json.dumps(result._asdict(), indent=1), encoding="utf-8")
    return path


if __name__ == "__main__":
    stored = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(table(Result(**stored) if "ceilings" in stored else HostResult(**stored)))
