"""Exercises: "this line is broken: which test fails?" An exercise is a mutant, so tools.mutants can check its answer.

The entries are in docs/site/exercises/*.mutants. An id begins with the name of its page; the reason is the answer.
`python -m tools.mutants --data docs/site/exercises` breaks each line and shows that its test fails.
"""

from functools import cache
from pathlib import Path

from tools.docs.prose import markdown
from tools.docs.sources import ROOT, Sources
from tools.mutants.mutant import Mutant, read_mutants

FOLDER = ROOT / "docs/site/exercises"


@cache
def exercises() -> tuple[Mutant, ...]:
    return tuple(read_mutants(FOLDER))


def page_of(exercise: Mutant) -> str:
    """The name of the reference file whose page has the exercise."""
    return exercise.id.partition("-")[0]


def exercises_of(name: str) -> list[Mutant]:
    return [exercise for exercise in exercises() if page_of(exercise) == name]


def exercises_markdown(found: list[Mutant], page: str, sources: Sources) -> str:
    if not found:
        return ""
    command = f"python -m tools.mutants --data {FOLDER.relative_to(ROOT)} {found[0].id}"
    return "\n\n".join(
        [
            "## Exercises",
            "Each of these changes breaks something. Which test fails, and why?",
            *(_exercise(number, exercise, page, sources) for number, exercise in enumerate(found, start=1)),
            f"Change the line yourself and run the test, or let this command do both in a private copy: `{command}`",
        ]
    )


def _exercise(number: int, exercise: Mutant, page: str, sources: Sources) -> str:
    path, _ = exercise.apply(ROOT)
    file = path.relative_to(ROOT).as_posix()
    place = "" if exercise.place == file else exercise.place
    change = "\n".join(
        [*(f"- {line}" for line in exercise.old.splitlines()), *(f"+ {line}" for line in exercise.new.splitlines())]
    )
    link = f"[{file}]({sources.link(page, file, place)})"
    where = f"`{place}` of {link}" if place else link
    return (
        f"**{number}.** In {where}:\n\n```diff\n{change}\n```\n\n"
        f'??? success "Answer"\n\n    {_test(exercise, page, sources)}\n\n    {markdown(exercise.why)}'
    )


def _test(exercise: Mutant, page: str, sources: Sources) -> str:
    (test,) = exercise.paths
    file, _, name = test.partition("::")
    options = [argument for argument in exercise.tests if argument != test]
    chosen = f" with `{' '.join(options)}`" if options else ""
    return f"[`{name}`]({sources.link(page, file, name.replace('::', '.'))}) in `{Path(file).name}`{chosen}."
