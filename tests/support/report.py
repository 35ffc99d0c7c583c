"""The report's page as data: facts in, sections and tables out. text.py and html.py draw it."""

import math
from dataclasses import dataclass, field

from tests.evidence import COMPILED, KERNELS, WAYS
from tests.report import floors, skips
from tests.report.facts import GPU, PART, Facts


@dataclass(frozen=True)
class Bar:
    """A fraction, drawn as a bar; label: what stands beside it."""

    fraction: float
    label: str = ""


Cell = str | int | Bar


@dataclass
class Section:
    """A title, what it means in a sentence or two, and a table; without rows, `empty` stands in its place."""

    title: str
    text: str
    columns: tuple[str, ...] = ()
    rows: list[tuple[Cell, ...]] = field(default_factory=list)
    empty: str = ""

    @property
    def holds_numbers(self) -> list[bool]:
        """Of each column; they stand on the right."""
        return [any(isinstance(cell, int) for cell in column) for column in zip(*self.rows, strict=True)]


@dataclass
class Page:
    title: str
    verdict: str
    good: str  # what is said where there are no problems
    problems: list[str]
    facts: list[tuple[str, str]]
    sections: list[Section]

    @property
    def is_good(self) -> bool:
        return not self.problems


def make_page(facts: Facts, problems: list[str]) -> Page:
    failed = facts.outcomes["failed"] + facts.outcomes["error"]
    if failed:
        problems = [f"{failed} {'test' if failed == 1 else 'tests'} failed, so no floor was applied", *problems]
    compared = sum(n for name, n in facts.counts.comparisons.items() if not name.endswith(f", {COMPILED}"))
    verdict = f"Tests: {facts.outcomes['passed']:,} passed, {failed:,} failed, {len(facts.skips):,} skipped. They "
    verdict += f"compared {compared:,} values with what an oracle says that they must be."
    good = "Nothing is wrong: every figure is above its floor, every skip is stated."
    if facts.scope == PART:
        good = "Nothing is wrong. This was a part of the tests, so no floor was applied; every skip is stated."
    return Page(
        title="nanovllm: what this run checked",
        verdict=verdict,
        good=good,
        problems=problems,
        facts=[("run", facts.scope), ("repeat with", facts.repeat), *facts.machine.items()],
        sections=[
            _comparisons(facts),
            _kernels(facts),
            _events(facts),
            _tolerances(facts),
            _mutants(facts),
            _defects(facts),
            _skips(facts),
            _slowest(facts),
        ],
    )


def _comparisons(facts: Facts) -> Section:
    """Bars on a logarithmic scale: components differ by factors of thousands."""
    figures = {name: n for name, n in facts.counts.comparisons.items() if not name.startswith(f"{KERNELS}:")}
    known = floors.COMPARISONS.get(facts.scope, {})
    names = sorted(figures.keys() | {name for name in known if not name.startswith(f"{KERNELS}:")})
    largest = max([*figures.values(), 10])
    rows = []
    for name in names:
        number = figures.get(name, 0)
        what, _, oracle = name.partition(" against ")
        bar = Bar(math.log10(max(number, 1)) / math.log10(largest))
        rows.append((what, oracle, number, _floor(known.get(name)), bar))
    return Section(
        "Comparisons",
        "Values that were compared with an oracle: a reference, Hugging Face transformers, PyTorch, a formula by "
        "hand. A figure below its floor fails the run: tests that compare next to nothing pass, and prove nothing. The "
        "bars are logarithmic.",
        ("what", "against", "values", "floor", ""),
        rows,
        empty="no test of this run counts what it compares",
    )


def _kernels(facts: Facts) -> Section:
    figures = facts.counts.comparisons
    known = floors.COMPARISONS.get(facts.scope, {})
    names = [name for name in figures.keys() | known.keys() if name.startswith(f"{KERNELS}: ")]
    cases = sorted({tuple(name.removeprefix(f"{KERNELS}: ").split(", ")[:2]) for name in names})
    rows: list[tuple[Cell, ...]] = []
    for kernel, dtype in cases:
        row: list[Cell] = [kernel, dtype]
        for name in (f"{KERNELS}: {kernel}, {dtype}, {way}" for way in WAYS):
            row += [figures[name], _floor(known.get(name))]
        rows.append(tuple(row))
    return Section(
        "Kernels",
        "Interpreted: values that Triton's interpreter computed on the CPU and that were compared with a reference; in "
        "bfloat16 only where nothing is computed, since the interpreter computes it wrongly. Compiled: "
        "variants that were compiled for GPUs of compute capability 8.0, 9.0 or 10.0, which need not be there, "
        "with registers and shared memory within what is allowed. On a GPU: values compared there.",
        ("kernel", "dtype", *(title for way in WAYS for title in (way, "floor"))),
        rows,
        empty="no test of a kernel was in this run",
    )


def _events(facts: Facts) -> Section:
    known = floors.EVENTS.get(facts.scope, {})
    figures = facts.counts.events
    rows = [(name, figures[name], _floor(known.get(name))) for name in sorted(figures.keys() | known.keys())]
    note = "" if facts.scope == GPU else " CUDA graphs are replayed on a GPU only: a CPU replays none."
    return Section(
        "What happened on the way",
        "An engine is easily right while nothing happens. So often did the tests meet what makes it hard: requests "
        "that were preempted, prefixes found in the cache, blocks evicted, hashes that collided, prompts cut into "
        f"chunks.{note}",
        ("event", "times", "floor"),
        rows,
        empty="no test of this run counts events",
    )


def _tolerances(facts: Facts) -> Section:
    ratios = sorted(facts.counts.tolerances.items(), key=lambda item: item[1][0] / item[1][1], reverse=True)
    rows: list[tuple[Cell, ...]] = [
        (name, f"{error:.2g}", f"{allowed:.2g}", Bar(error / allowed, f"{100 * error / allowed:.0f} %"))
        for name, (error, allowed) in ratios
    ]
    return Section(
        "Tolerance used",
        "Of all errors under one name, the one nearest to what is allowed. Near 100 %: the next machine may break the "
        "bound. Near 0 %: the bound is loose, or rounding happened to be kind; a small mistake could pass.",
        ("comparison", "largest error", "allowed", "used"),
        rows,
        empty="no test of this run counts its errors",
    )


def _mutants(facts: Facts) -> Section:
    text = (
        "Small wrong changes to nanovllm's own code, each applied in turn: a test must fail. Equivalent ones change "
        "nothing that can be noticed, and do not count. This is what make mutants wrote when it last ran."
    )
    if facts.mutants is None:
        return Section("Mutants", text, empty="not measured: there is no tests/mutants/score.json")
    rows = []
    for name, score in facts.mutants.get("components", {}).items():
        rows.append((name, score["caught"], *_mutant_cells(score)))
    generic = facts.mutants.get("generic")
    if generic:
        name = f"generic ({generic.get('tool', 'a mutation tool')})"
        rows.append((name, generic["caught"], *_mutant_cells(generic)))
    if facts.mutants.get("date"):
        text += f" Measured on {facts.mutants['date']}."
    return Section("Mutants", text, ("component", "caught", "of", "equivalent", "score"), rows, empty="none")


def _mutant_cells(score: dict) -> tuple[Cell, ...]:
    ratio = floors.mutation_score(score)
    return floors.num_mutants(score), score.get("equivalent", 0), Bar(ratio, f"{100 * ratio:.1f} %")


def _defects(facts: Facts) -> Section:
    without = [(name, what) for name, (what, number) in facts.defects.items() if not number]
    covered = len(facts.defects) - len(without)
    return Section(
        "Known defects",
        f"tests/DEFECTS.md lists {len(facts.defects)} defects that reached users of engines of this kind. {covered} of "
        "them have tests that say they would notice. Those without:",
        ("id", "what must hold"),
        list(without),
        empty="none",
    )


def _skips(facts: Facts) -> Section:
    rows = [(skip.test, skip.reason, skips.why(skip) or "NOT STATED") for skip in sorted(facts.skips, key=str)]
    return Section(
        "Skips",
        "A skip that is not on the list of tests/report/skips.py fails the run.",
        ("test", "it says", "stated reason"),
        list(rows),
        empty="nothing was skipped",
    )


def _slowest(facts: Facts) -> Section:
    slowest = facts.seconds.most_common(10)
    longest = max([seconds for _, seconds in slowest], default=1.0)
    return Section(
        "Slowest tests",
        "In seconds; the clock of a shared machine, so to be read with care.",
        ("test", "seconds"),
        [(test, Bar(seconds / longest, f"{seconds:.1f}")) for test, seconds in slowest],
        empty="nothing ran",
    )


def _floor(floor: floors.Floor | None) -> Cell:
    return floor.least if floor else ""
