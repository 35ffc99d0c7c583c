"""The score: per component, how many of the mutants that can be noticed are; and the survivors, by name."""

import json
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.mutants.mutant import Mutant
from tests.mutants.results import Result

SCORE = Path(__file__).parent / "score.json"  # committed; the suite's report reads it
_PACKAGES = ("pytest", "hypothesis", "numpy", "torch", "triton")


@dataclass
class Score:
    """num_caught of num_mutants; the others are equivalent (nobody could notice) or survivors: gaps in the tests."""

    num_mutants: int = 0
    num_caught: int = 0
    num_equivalent: int = 0

    @property
    def num_survivors(self) -> int:
        return self.num_mutants - self.num_caught - self.num_equivalent

    @property
    def percent(self) -> float:
        """Caught, of those that are not equivalent; 100 if all are."""
        num_noticeable = self.num_mutants - self.num_equivalent
        return 100 * self.num_caught / num_noticeable if num_noticeable else 100.0


def scores(mutants: Iterable[Mutant], results: Iterable[Result]) -> dict[str, Score]:
    """Score of each component, and of all under "total". Mutants without a result are left out."""
    by_id = {result.id: result for result in results}
    table: dict[str, Score] = {}
    total = Score()
    for mutant in mutants:
        result = by_id.get(mutant.id)
        if result is None:
            continue
        for score in (table.setdefault(mutant.component, Score()), total):
            score.num_mutants += 1
            score.num_caught += result.is_caught
            score.num_equivalent += bool(mutant.equivalent) and not result.is_caught
    return {**table, "total": total}


def text(mutants: list[Mutant], results: list[Result]) -> str:
    lines = [f"{'component':28}{'mutants':>9}{'caught':>9}{'equivalent':>12}{'survived':>10}{'score':>9}"]
    for name, score in scores(mutants, results).items():
        counts = f"{score.num_mutants:9}{score.num_caught:9}{score.num_equivalent:12}{score.num_survivors:10}"
        lines.append(f"{name:28}{counts}{score.percent:8.1f}%")
    by_id = {result.id: result for result in results}
    for mutant in mutants:
        result = by_id.get(mutant.id)
        if result is None:
            continue
        if mutant.equivalent:
            verdict = "WRONG VERDICT, a test notices it" if result.is_caught else "equivalent"
            lines.append(f"\n{mutant.id}: {verdict}: {mutant.equivalent}")
        elif not result.is_caught:
            lines.append(f"\n{mutant.id}: SURVIVED: {mutant.why}\n  {mutant.file}\n{changed_lines(mutant)}")
    return "\n".join(lines)


def changed_lines(mutant: Mutant) -> str:
    old = [f"  - {line}" for line in mutant.old.splitlines()]
    return "\n".join(old + [f"  + {line}" for line in mutant.new.splitlines()])


def is_good(mutants: Iterable[Mutant], results: Iterable[Result]) -> bool:
    """Every result is as the data says: caught, or not caught and equivalent."""
    by_id = {mutant.id: mutant for mutant in mutants}
    return all(result.is_caught != bool(by_id[result.id].equivalent) for result in results)


def write_score(mutants: list[Mutant], results: list[Result], path: Path = SCORE) -> None:
    """Keeps what stands under other keys (the generic mutation tool's figures)."""
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    components = {
        name: {
            "mutants": score.num_mutants,
            "caught": score.num_caught,
            "equivalent": score.num_equivalent,
            "survivors": score.num_survivors,
            "percent": round(score.percent, 1),
        }
        for name, score in scores(mutants, results).items()
    }
    by_id = {result.id: result for result in results}
    caught = {mutant.id for mutant in mutants if by_id[mutant.id].is_caught}
    known |= {
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        "total": components.pop("total"),
        "components": components,
        "survivors": [mutant.id for mutant in mutants if mutant.id not in caught and not mutant.equivalent],
        "defects_put_back": sorted({defect for mutant in mutants for defect in mutant.defects}),
    }
    path.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
