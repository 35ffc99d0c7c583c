"""The page: what planted facts look like as text and as HTML."""

from collections import Counter
from html.parser import HTMLParser

import pytest

from tests.evidence import Counts
from tests.report import floors
from tests.report.facts import WHOLE, Facts, Skip
from tests.report.floors import Floor
from tests.report.html import to_html
from tests.report.page import make_page
from tests.report.text import WIDTH, to_text

COMPARISONS = Counter({
    "engine: tokens against the reference": 12345,
    "norm of <b>& against the reference": 10,
    "kernel: rms_norm, float16, interpreted": 640,
    "kernel: rms_norm, float16, compiled": 5,
    "kernel: rms_norm, bfloat16, on a GPU": 77,
})  # fmt: skip
FACTS = Facts(
    scope=WHOLE,
    outcomes=Counter(passed=7),
    skips=[Skip("tests/test_a.py::test_b", "no x")],
    seconds=Counter({f"tests/test_a.py::test_{number}": number / 10 for number in range(30)}),
    counts=Counts(COMPARISONS, Counter(preemption=3, collision=0), {"engine: logits": (0.5, 2.0)}),
    defects={"X90": ("slots", 2), "X91": ("a rank that dies", 0)},
    mutants={
        "components": {"scheduler": {"mutants": 10, "caught": 8, "equivalent": 2}},
        "generic": {"tool": "some tool", "total": 200, "caught": 190},
    },
    repeat="NANOVLLM_TEST_SEED=5",
    machine={"Python": "3.11.7"},
)


@pytest.fixture(autouse=True)
def _planted_floors(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {
        "engine: tokens against the reference": Floor(500, "planted"),
        "a figure that is missing": Floor(4, "planted"),
        "kernel: rms_norm, float16, compiled": Floor(3, "planted"),
        "kernel: missing, float16, compiled": Floor(2, "planted"),
    }
    monkeypatch.setattr(floors, "COMPARISONS", {WHOLE: known})
    monkeypatch.setattr(floors, "EVENTS", {WHOLE: {"preemption": Floor(2, "planted")}})


def lines_with(text: str, word: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if word in line]


def test_the_text_has_every_figure_in_its_row() -> None:
    text = to_text(make_page(FACTS, []))
    assert "Tests: 7 passed, 0 failed, 1 skipped. They compared 13,072 values" in text  # without what was compiled
    assert lines_with(text, "engine: tokens")[0][:5] == ["engine:", "tokens", "the", "reference", "12,345"]
    assert lines_with(text, "engine: tokens")[0][5] == "500"
    assert lines_with(text, "is missing")[0][5:7] == ["0", "4"]
    assert lines_with(text, "rms_norm  float16") == [["rms_norm", "float16", "640", "5", "3", "0"]]
    assert lines_with(text, "missing   float16") == [["missing", "float16", "0", "0", "2", "0"]]
    assert lines_with(text, "rms_norm  bfloat16") == [["rms_norm", "bfloat16", "0", "0", "77"]]
    assert ["preemption", "3", "2"] in lines_with(text, "preemption")
    assert ["collision", "0"] in lines_with(text, "collision")
    assert lines_with(text, "engine: logits")[0][2:4] == ["0.5", "2"]
    assert lines_with(text, "engine: logits")[0][-2:] == ["25", "%"]
    assert lines_with(text, "scheduler")[0][:4] == ["scheduler", "8", "10", "2"]
    assert lines_with(text, "some tool")[0][-2:] == ["95.0", "%"]
    assert "2 defects that reached users" in text
    assert lines_with(text, "X91") == [["X91", "a", "rank", "that", "dies"]]
    assert lines_with(text, "X90") == []
    assert lines_with(text, "no x") == [["tests/test_a.py::test_b", "no", "x", "NOT", "STATED"]]
    assert lines_with(text, "SEED") == [["repeat", "with", "NANOVLLM_TEST_SEED=5"]]


def test_the_ten_slowest_tests_are_shown() -> None:
    rows = lines_with(to_text(make_page(FACTS, [])), "test_a.py::test_")
    assert [row[-1] for row in rows if row[0] != "tests/test_a.py::test_b"] == [
        f"{n / 10:.1f}" for n in range(29, 19, -1)
    ]


def test_problems_stand_first_and_a_good_run_says_so() -> None:
    good, bad = to_text(make_page(FACTS, [])), to_text(make_page(FACTS, ["something is low"]))
    assert "Nothing is wrong" in good
    assert "Nothing is wrong" not in bad
    assert bad.index("THE RUN FAILS") < bad.index("something is low") < bad.index("Comparisons")


def test_failed_tests_are_a_problem() -> None:
    page = make_page(Facts(outcomes=Counter(passed=1, failed=2, error=1)), [])
    assert page.problems == ["3 tests failed, so no floor was applied"]


def test_a_run_without_evidence_has_a_page() -> None:
    text = to_text(make_page(Facts(), []))
    assert "no test of this run counts what it compares" in text
    assert "not measured: there is no tests/mutants/score.json" in text
    assert "a part of the tests" in text


class Reader(HTMLParser):
    """Checks that tags are closed in order; gathers tags, attributes and text."""

    VOID = ("meta", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open:
            self.cells.append(data)


def test_the_html_is_one_whole_file_without_scripts() -> None:
    reader = Reader()
    reader.feed(to_html(make_page(FACTS, ["<i>low</i>"])))
    assert reader.open == []
    assert not {"script", "link", "img", "i", "b"} & reader.tags.keys(), "nothing to fetch, and text stays text"
    assert not {"src", "href"} & {name for name, _ in reader.attributes}
    assert {"12,345", "norm of <b>&", "95.0 %", "X91"} <= set(reader.cells)


def test_text_lines_of_prose_are_short() -> None:
    prose = [line for line in to_text(make_page(FACTS, [])).splitlines() if not line.startswith("  ")]
    assert max(map(len, prose)) <= WIDTH
