"""tests/mutants: every mutant still fits its file, and the data say what they must. Running them is `make mutants`."""

import re
from collections import Counter
from pathlib import Path

import pytest

from tests.defects import TABLE
from tests.mutants import __main__ as command_line
from tests.mutants.mutant import Mutant, MutantError, read_mutants, source_of
from tests.mutants.private_tree import PrivateTree
from tests.mutants.report import is_good, scores
from tests.mutants.results import Result
from tests.source_tree import ROOT

MUTANTS = read_mutants()


def test_every_mutant_fits_its_file_and_compiles() -> None:
    for mutant in MUTANTS:
        source = source_of(mutant)
        changed = mutant.apply(source)
        assert changed != source, mutant.id
        if mutant.file.endswith(".py"):
            compile(changed, mutant.file, "exec")


def test_every_mutants_tests_exist() -> None:
    for mutant in MUTANTS:
        assert mutant.tests, mutant.id
        for test in (*mutant.tests, *mutant.then):
            path, _, name = test.partition("::")
            assert not name or f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), f"{mutant.id}: {test}"
            assert (ROOT / path).is_file(), f"{mutant.id}: {test}"


def test_there_are_enough_of_them_and_no_two_are_one() -> None:
    assert len(MUTANTS) >= 150
    assert max(Counter(mutant.id for mutant in MUTANTS).values()) == 1
    assert max(Counter((mutant.file, mutant.apply(source_of(mutant))) for mutant in MUTANTS).values()) == 1


def test_every_defect_is_put_back() -> None:
    known = set(re.findall(r"^\| (D\d\d) \|", TABLE.read_text(encoding="utf-8"), re.MULTILINE))
    put_back = {defect for mutant in MUTANTS for defect in mutant.defects if not mutant.equivalent}
    assert put_back == known


# --- the tool itself ---

HEAD = "file: pyproject.toml\ntests: tests/unit/test_packaging.py\n\n"


def read(folder: Path, text: str) -> list[Mutant]:
    (folder / "component.mutants").write_text(HEAD + text, encoding="utf-8")
    return read_mutants(folder)


def test_a_mutant_is_read(tmp_path: Path) -> None:
    text = "[some-name] D01 D02\nWrong, and\nso on.\n- a\n-   b\n+ c\noccurrence: 2 of 3\nequivalent: since\nit is\n"
    (mutant,) = read(tmp_path, text)
    assert (mutant.id, mutant.component, mutant.file) == ("some-name", "component", "pyproject.toml")
    assert (mutant.old, mutant.new, mutant.occurrence) == ("a\n  b", "c", (2, 3))
    assert (mutant.why, mutant.equivalent, mutant.defects) == ("Wrong, and so on.", "since it is", ("D01", "D02"))


@pytest.mark.parametrize(
    "text", ["[no-reason]\n- a\n+ b\n", "[no-old-text]\nWhy.\n+ b\n", "[no-change]\nWhy.\n- a\n+ a\n", "words\n"]
)
def test_a_mutant_that_says_too_little_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(MutantError, match="component"):
        read(tmp_path, text)


def test_the_stated_occurrence_is_changed_and_another_number_refused(tmp_path: Path) -> None:
    (mutant,) = read(tmp_path, "[x]\nWhy.\n- ab\n+ cd\noccurrence: 2 of 3\n")
    assert mutant.apply("ab ab ab") == "ab cd ab"
    with pytest.raises(MutantError, match="must occur 3 times in pyproject"):
        mutant.apply("ab ab")


def test_a_private_copy_judges_and_the_checkout_stays_as_it_is(tmp_path: Path) -> None:
    """A right change passes, a wrong one fails, one that never ends is killed; then the copy is as before."""
    file, test = "nanovllm/engine/throughput.py", ("tests/unit/engine/test_throughput.py",)
    source = (ROOT / file).read_text(encoding="utf-8")
    with PrivateTree() as tree:
        assert tree.run_changed(file, source + "\n", test, 20).passed
        assert "test_throughput.py" in tree.run_changed(file, source.replace("+= batch", "-= batch"), test, 20).by
        assert "killed" in tree.run_changed(file, source + "while True:\n    pass\n", test, 1).by
        assert (tree.root / file).read_text(encoding="utf-8") == source
        folder = tree.root
    assert not folder.exists()
    assert (ROOT / file).read_text(encoding="utf-8") == source


def test_the_score_is_of_those_that_can_be_noticed(tmp_path: Path) -> None:
    mutants = read(
        tmp_path,
        "[a]\nWhy.\n- a\n+ b\n\n[b]\nWhy.\n- a\n+ b\n\n[c]\nWhy.\n- a\n+ b\nequivalent: so\n\n[d]\nWhy.\n- a\n",
    )
    results = [Result("a", True, "test", 1), Result("b", False, "", 1), Result("c", False, "", 1)]
    total = scores(mutants, results)["total"]
    assert (total.num_mutants, total.num_caught, total.num_equivalent, total.num_survivors) == (3, 1, 1, 1)
    assert total.percent == 50
    assert not is_good(mutants, results)
    assert is_good(mutants, [results[0], results[2]])
    assert not is_good(mutants, [Result("c", True, "test", 1)]), "a proof that a test refutes"


@pytest.mark.parametrize(
    ("num_run", "survivors", "code", "said"),
    [
        (4, [], 0, "repeat with --sample 4 --seed 3"),
        (3, [], 0, "1 of them were not run: the minutes were over"),
        (4, [2], 1, "SURVIVED"),
        (1, [0], 1, "SURVIVED"),
    ],
)
def test_a_survivor_fails_the_command_and_too_few_minutes_do_not(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    num_run: int,
    survivors: list[int],
    code: int,
    said: str,
) -> None:
    noticeable = [mutant for mutant in MUTANTS if not mutant.equivalent]

    def run_mutants(mutants: list[Mutant], *_: object) -> list[Result]:
        assert len(mutants) == 4
        return [Result(mutants[i].id, i not in survivors, "a test", 1) for i in range(num_run)]

    monkeypatch.setattr(command_line, "read_mutants", lambda: noticeable)
    monkeypatch.setattr(command_line, "run_mutants", run_mutants)
    monkeypatch.setattr(command_line.os, "nice", lambda _: 0)
    monkeypatch.setattr(command_line.signal, "signal", lambda *_: None)
    monkeypatch.setattr("sys.argv", ["tests.mutants", "--sample", "4", "--seed", "3", "--minutes", "1"])
    assert command_line.main() == code
    output = capsys.readouterr().out
    assert said in output
    assert output.count("SURVIVED") == len(survivors)
    chosen = command_line._chosen(noticeable, command_line._arguments())
    assert all(f"{chosen[i].id}: SURVIVED: {chosen[i].why}" in output for i in survivors)
