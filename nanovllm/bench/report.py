"""The Result of a session as a table, JSON and a picture: throughput as a fraction of the limit, latency by rate."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nanovllm import __version__
from nanovllm.bench.limits import Ceilings
from nanovllm.bench.session import Percentiles, Row
from nanovllm.bench.workload import Scenario

FORMAT = 1  # version of the JSON file's layout; raise it with every incompatible change
ABSENT = "-"


@dataclass(frozen=True)
class Result:
    """One session. machine: see machine_info. model: its name, dtype and sizes. options: those of the command line.
    scenarios: by name, as they were measured.
    """

    machine: dict[str, Any]
    model: dict[str, Any]
    options: dict[str, Any]
    scenarios: dict[str, Scenario]
    ceilings: Ceilings
    rows: Sequence[Row]


# --- table ---

_THROUGHPUT = ("scenario", "requests", "tok/s", "", "lowest", "highest", "limit", "of limit", "GPU idle")
_LATENCY = ("scenario", "requests", "req/s", "tok/s", "first token", "p99", "per token", "p99")
_LEFT_ALIGNED = ("scenario", "")


def table(result: Result) -> str:
    """Throughput of each scenario, latencies of each row, and the ceilings; "-" where there is no figure."""
    at_once = [_throughput_cells(row) for row in result.rows if row.rate is None]
    ceilings, model = result.ceilings, result.model
    lines = [
        "Throughput with all requests at once; lowest and highest of the runs",
        *_aligned(_THROUGHPUT, at_once),
        "",
        "Latency in ms: of the first token, from the arrival of a request, and of each token after it",
        *_aligned(_LATENCY, [_latency_cells(row) for row in result.rows]),
        "",
        f"{model['name']}, {model['dtype']}; {_describe(result.machine)}; nanovllm {__version__}",
        f"ceilings of this run: memory {ceilings.memory / 1e9:,.1f} GB/s, matrix product "
        f"{ceilings.matmul / 1e12:.3g} TFLOP/s",
    ]
    return "\n".join(lines)


def _aligned(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    formats = [f"{'<' if title in _LEFT_ALIGNED else '>'}{width}" for title, width in zip(header, widths, strict=True)]
    return [" ".join(map(format, cells, formats)).rstrip() for cells in (header, *rows)]


def _throughput_cells(row: Row) -> tuple[str, ...]:
    runs = [repetition.tokens_per_second(row.counted) for repetition in row.repetitions]
    return (
        row.scenario,
        str(row.num_seqs),
        f"{row.tokens_per_second:,.0f}",
        row.counted,
        f"{min(runs):,.0f}",
        f"{max(runs):,.0f}",
        ABSENT if row.limit_tokens_per_second is None else f"{row.limit_tokens_per_second:,.0f}",
        _percent(row.fraction),
        _percent(row.gpu_idle),
    )


def _latency_cells(row: Row) -> tuple[str, ...]:
    return (
        row.scenario,
        str(row.num_seqs),
        "at once" if row.rate is None else f"{row.rate:g}",
        f"{row.tokens_per_second:,.0f}",
        *_milliseconds(row.time_to_first_token),
        *_milliseconds(row.time_per_output_token),
    )


def _percent(share: float | None) -> str:
    return ABSENT if share is None else f"{share:.1%}"


def _milliseconds(times: Percentiles | None) -> tuple[str, str]:
    return (ABSENT, ABSENT) if times is None else (f"{times.median * 1e3:.1f}", f"{times.p99 * 1e3:.1f}")


def _describe(machine: dict[str, Any]) -> str:
    return f"{machine['gpu'] or machine['cpu'] + ' CPU'}, torch {machine['torch']}, Python {machine['python']}"


# --- files ---


def write(result: Result, folder: Path) -> list[Path]:
    """Write bench.json (docs/performance.md), and bench.png or, without matplotlib, bench.txt. Returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "bench.json"
    fields = {"format": FORMAT, "nanovllm": __version__, **asdict(result)}
    path.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
    return [path, draw(result, folder)]


# --- picture ---


def draw(result: Result, folder: Path) -> Path:
    """The picture if matplotlib is installed (the extra `bench`), else the table."""
    try:
        import matplotlib
    except ImportError:
        path = folder / "bench.txt"
        path.write_text(table(result) + "\n", encoding="utf-8")
        return path
    matplotlib.use("agg")
    from matplotlib import pyplot

    with_rates = any(row.rate is not None for row in result.rows)
    figure, axes = pyplot.subplots(1, 3 if with_rates else 1, figsize=(15 if with_rates else 6, 4), squeeze=False)
    figure.set_layout_engine("constrained")
    _draw_throughput(axes[0][0], [row for row in result.rows if row.rate is None])
    if with_rates:
        _draw_latency(axes[0][1], result.rows, "time to first token")
        _draw_latency(axes[0][2], result.rows, "time per output token")
    figure.suptitle(f"nanovllm bench: {result.model['name']}; {_describe(result.machine)}", fontsize=9)
    path = folder / "bench.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _draw_throughput(axes: Any, rows: list[Row]) -> None:
    rows = rows[::-1]
    rates = [f"{row.tokens_per_second:,.0f} of {row.limit_tokens_per_second or 0:,.0f}" for row in rows]
    names = [f"{row.scenario}\n{rate} tok/s {row.counted}" for row, rate in zip(rows, rates, strict=True)]
    axes.barh(names, [row.fraction or 0.0 for row in rows])
    axes.axvline(1.0, color="gray")
    axes.set_xlim(0, 1.05)
    axes.set_title("throughput", fontsize=9)
    axes.set_xlabel("fraction of the physical limit")


def _draw_latency(axes: Any, rows: Sequence[Row], what: str) -> None:
    """Median and 99th percentile against the request rate, a colour for each scenario."""
    attribute = what.replace(" ", "_")
    for index, scenario in enumerate(dict.fromkeys(row.scenario for row in rows)):
        measured = [(row.rate, getattr(row, attribute)) for row in rows if row.scenario == scenario]
        points = [(rate, times) for rate, times in measured if rate is not None and times is not None]
        points.sort(key=lambda point: point[0])
        for percentile, style in (("median", "o-"), ("p99", "^--")):
            values = [1e3 * getattr(times, percentile) for _, times in points]
            label = scenario if percentile == "median" else None
            axes.plot([rate for rate, _ in points], values, style, color=f"C{index}", label=label)
    axes.set_xlabel("requests a second (Poisson arrivals)")
    axes.set_title(what, fontsize=9)
    axes.set_ylabel("ms: median; dashed: 99th percentile")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7)
