"""The report of a run: RunData as tables, and the tables as text and as one HTML page without scripts."""

import os
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass, field
from html import escape
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from tests.support.counts import Counts
from tests.support.skips import Skip, why

TITLE = "nanovllm: what this run checked"
HEAD = f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{TITLE}</title><style>
:root {{ color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif }}
body {{ max-width: 72rem; margin: 2rem auto; padding: 0 1rem }}
h2 {{ margin: 2rem 0 .3rem }} table {{ border-collapse: collapse; font-size: .93em }}
tr:first-child {{ font-weight: bold }}
td {{ padding: .2rem 1.2rem .2rem 0; border-bottom: 1px solid #8884; text-align: left; vertical-align: top }}
.number {{ text-align: right }} .problem {{ color: #c33 }}
</style></head><body><h1>{TITLE}</h1>"""


@dataclass
class RunData:
    """What is known after a run of the tests."""

    command: str = ""
    outcomes: Counter[str] = field(default_factory=Counter)  # passed, failed, error: of tests
    skips: list[Skip] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    num_tests: Counter[str] = field(default_factory=Counter)  # that made a comparison, by its name
    problems: list[str] = field(default_factory=list)


class Table(NamedTuple):
    title: str
    text: str
    columns: tuple[str, ...]
    rows: list[tuple[str | int, ...]]


def defects_without_test() -> list[tuple[str | int, ...]]:
    from tools.defects import ROW, TABLE, covering_tests  # late: it reads every test

    covered = covering_tests()
    rows = (ROW.match(line) for line in TABLE.read_text(encoding="utf-8").splitlines())
    return [(row[1], row[2]) for row in rows if row and row[1] not in covered]


def machine() -> str:
    """Versions, processor cores, and the GPU if torch is loaded and has one."""
    words = [f"Python {sys.version.split()[0]}", f"{os.cpu_count()} cores"]
    for package in ("torch", "triton", "transformers", "numpy", "hypothesis", "pytest"):
        try:
            words.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            words.append(f"no {package}")
    torch = sys.modules.get("torch")
    has_gpu = torch is not None and torch.cuda.is_available()
    return ", ".join([*words, torch.cuda.get_device_name() if has_gpu else "no GPU in use"])


def summary(data: RunData) -> list[str]:
    failed = data.outcomes["failed"] + data.outcomes["error"]
    tests = f"{data.outcomes['passed']:,} tests passed, {failed:,} failed, {len(data.skips):,} skipped"
    return [tests, f"Repeat with: {data.command}", machine()]


def tables(data: RunData) -> list[Table]:
    counts = data.counts
    compared = sorted(counts.comparisons.items())
    errors = sorted(counts.errors.items(), key=lambda item: item[1][0] / item[1][1], reverse=True)
    return [
        Table(
            "Comparisons",
            "How many values were compared with which oracle, and in how many tests. Kernels: interpreted on the CPU, "
            "compiled for GPUs that need not be present (number of variants), or run on a GPU.",
            ("what", "oracle", "values", "tests"),
            [(*name.partition(" against ")[::2], number, data.num_tests[name]) for name, number in compared],
        ),
        Table(
            "Events",
            "What makes an engine hard to get right. Each campaign fails if an event that it is about did not occur.",
            ("event", "times"),
            [*sorted(counts.events.items())],
        ),
        Table(
            "Tolerance used",
            "The largest error under each name. Near 100 %: another machine may exceed the bound. Near 0 %: the bound "
            "is loose, and a small mistake could pass.",
            ("comparison", "error", "allowed", "used"),
            [(name, f"{error:.2g}", f"{most:.2g}", f"{100 * error / most:.0f} %") for name, (error, most) in errors],
        ),
        Table(
            "Skipped",
            "A skip that is not on the list of tests/support/skips.py fails the run.",
            ("test", "it says", "reason on the list"),
            [(skip.test, skip.reason, why(skip) or "NOT ALLOWED") for skip in sorted(data.skips)],
        ),
        Table("Defects without a test", "Of tests/DEFECTS.md.", ("id", "what must hold"), defects_without_test()),
    ]


def to_text(data: RunData) -> str:
    parts = [TITLE, "\n".join(summary(data)), *(["THE RUN FAILS", *data.problems] if data.problems else [])]
    for table in tables(data):
        rows = [table.columns, *table.rows]
        widths = [max(len(_words(cell)) for cell in column) for column in zip(*rows, strict=True)]
        parts.append(f"{table.title}\n{'-' * len(table.title)}\n{textwrap.fill(table.text, 120)}")
        lines = ("  ".join(map(_padded, row, widths)).rstrip() for row in rows)
        parts.append("\n".join(f"  {line}" for line in lines) if table.rows else "  none")
    return "\n\n".join(parts) + "\n"


def to_html(data: RunData) -> str:
    parts = [HEAD, *(f"<p>{escape(line)}</p>" for line in summary(data))]
    parts += [f'<p class="problem">The run fails: {escape(problem)}</p>' for problem in data.problems]
    for table in tables(data):
        parts.append(f"<h2>{table.title}</h2><p>{escape(table.text)}</p><table>")
        for row in [table.columns, *table.rows] if table.rows else [("none",)]:
            parts.append(f"<tr>{''.join(map(_html_cell, row))}</tr>")
        parts.append("</table>")
    return "\n".join([*parts, "</body></html>"]) + "\n"


def _words(cell: str | int) -> str:
    return f"{cell:,}" if isinstance(cell, int) else cell


def _padded(cell: str | int, width: int) -> str:
    return _words(cell).rjust(width) if isinstance(cell, int) else cell.ljust(width)


def _html_cell(cell: str | int) -> str:
    kind = ' class="number"' if isinstance(cell, int) else ""
    return f"<td{kind}>{escape(_words(cell))}</td>"
