"""The results as a table, as JSON, and as a picture: how near each kernel comes to what the GPU can do, and how long
the host side takes.

python -m benchmarks.report benchmarks/results/kernels.json    (or host.json: prints the table, draws the picture)
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

BAR_WIDTH = 40


class Result(NamedTuple):
    """One session: the machine, its ceilings, and a row for each benchmark, the extra_info that measuring.py writes."""

    machine: dict[str, Any]
    ceilings: dict[str, float]
    rows: list[dict[str, Any]]


class HostResult(NamedTuple):
    """The same of the host side: a row for each benchmark, the extra_info that hosting.py writes."""

    machine: dict[str, Any]
    rows: list[dict[str, Any]]


def worst_first(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: row["fraction"])


def table(result: Result | HostResult) -> str:
    """One line a benchmark; times in microseconds."""
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
    for row in worst_first(result.rows):
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


def text_chart(result: Result | HostResult) -> str:
    """Bars, of the fraction of the ceiling or of the longest time, for where there is no matplotlib."""
    if isinstance(result, HostResult):
        longest = max(row["microseconds"] for row in result.rows)
        width = max(len(row["host"]) for row in result.rows)
        bars = ["#" * round(BAR_WIDTH * row["microseconds"] / longest) for row in result.rows]
        return "".join(
            f"{row['host']:{width}} |{bar:.<{BAR_WIDTH}}| {row['microseconds']:9.1f} us\n"
            for row, bar in zip(result.rows, bars, strict=True)
        )
    names = [f"{row['kernel']}, {row['case']}" for row in worst_first(result.rows)]
    width = max(map(len, names))
    bars = [round(BAR_WIDTH * min(row["fraction"], 1.0)) for row in worst_first(result.rows)]
    lines = [
        f"{name:{width}} |{'#' * bar}{'.' * (BAR_WIDTH - bar)}| {row['fraction']:6.1%} of {row['ceiling']}"
        for name, bar, row in zip(names, bars, worst_first(result.rows), strict=True)
    ]
    return "\n".join(lines) + "\n"


def write(result: Result | HostResult, folder: Path) -> list[Path]:
    """kernels.json or host.json, and a picture beside it, .png or, without matplotlib, .txt; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_stem(result)}.json"
    path.write_text(json.dumps(result._asdict(), indent=1), encoding="utf-8")
    return [path, draw(result, folder)]


def _stem(result: Result | HostResult) -> str:
    return "host" if isinstance(result, HostResult) else "kernels"


def draw(result: Result | HostResult, folder: Path) -> Path:
    """The picture, as pixels if matplotlib is there (the extra `bench`), else as text."""
    try:
        import matplotlib
    except ImportError:
        path = folder / f"{_stem(result)}.txt"
        path.write_text(text_chart(result), encoding="utf-8")
        return path
    matplotlib.use("agg")
    from matplotlib import pyplot

    if isinstance(result, HostResult):
        figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.3 * len(result.rows)), layout="constrained")
        axes.barh([row["host"] for row in result.rows][::-1], [row["microseconds"] for row in result.rows][::-1])
        axes.set_xlabel("microseconds a call")
        axes.set_title(f"host side; Python {result.machine['python']} on {result.machine['cpu']}", fontsize=8)
        return _saved(figure, folder / "host.png")
    rows = worst_first(result.rows)[::-1]
    colours = {"copy": "tab:blue", "read": "tab:green", "matmul": "tab:orange"}
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.18 * len(rows)), layout="constrained")
    names = [f"{row['kernel']}, {row['case']}" for row in rows]
    axes.barh(names, [row["fraction"] for row in rows], color=[colours[row["ceiling"]] for row in rows])
    for position, row in enumerate(rows):
        for name, marker in (("flash-attn", "|"), ("torch", "."), ("ours", "x")):
            if name in row["peers"]:
                axes.plot(row["floor_microseconds"] / row["peers"][name], position, marker, color="black")
    axes.axvline(1.0, color="gray")
    axes.set_xlim(0, 1.05)
    axes.tick_params(labelsize=6)
    axes.set_xlabel("fraction of the ceiling: " + ", ".join(f"{c} {n}" for n, c in colours.items()))
    ours = ", x our kernel" if any("ours" in row["peers"] for row in rows) else ""
    axes.set_title(f"{result.machine['gpu']}; | flash-attn, . plain PyTorch{ours}", fontsize=8)
    return _saved(figure, folder / "kernels.png")


def _saved(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def main(words: list[str]) -> None:
    path = Path(words[0])
    stored = json.loads(path.read_text(encoding="utf-8"))
    result = Result(**stored) if "ceilings" in stored else HostResult(**stored)
    print(table(result))
    print(f"written: {draw(result, path.parent)}")


if __name__ == "__main__":
    main(sys.argv[1:])
