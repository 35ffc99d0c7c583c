"""The document that `make docs` builds: its links, examples, formulas, pictures and exercises."""

import html
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import reference
from reference.checkpoint import Checkpoint, ModelConfig
from reference.generate import generate
from reference.paged_attention import paged_attention
from tests.support.programs import run_python
from tests.support.source_tree import ROOT
from tools.docs.exercises import exercises, page_of
from tools.docs.formulas import FORMULAS
from tools.docs.pictures import draw, picture_names
from tools.docs.prose import Part, markdown, parts

NAMES = reference.reading_order()


# --- exercises ---


@pytest.mark.parametrize("exercise", exercises(), ids=lambda exercise: exercise.id)
def test_exercise_names_a_line_that_exists_and_one_test_that_exists(exercise: Any) -> None:
    """`python -m tools.mutants --data docs/site/exercises` shows that the test fails."""
    path, text = exercise.apply(ROOT)
    compile(text, str(path), "exec")
    (test,) = exercise.paths
    file, _, name = test.partition("::")
    assert re.search(rf"^def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)


def test_every_page_has_two_or_three_exercises_which_all_differ() -> None:
    assert {page_of(exercise) for exercise in exercises()} <= set(NAMES)
    numbers = {name: sum(page_of(exercise) == name for exercise in exercises()) for name in NAMES}
    assert {name: number for name, number in numbers.items() if number not in (2, 3)} == {}
    changes = [exercise.apply(ROOT) for exercise in exercises()]
    assert len(set(changes)) == len(changes)


# --- pictures and formulas ---


def test_every_page_has_a_picture_which_is_what_the_code_draws() -> None:
    """`python -m tools.docs` draws them anew. Numbers may differ by rounding between machines."""
    folder = ROOT / "docs/site/pictures"
    assert sorted(path.stem for path in folder.glob("*.svg")) == picture_names() == sorted(NAMES)
    for name in picture_names():
        texts = [(folder / f"{name}.svg").read_text(encoding="utf-8"), draw(name).file()]
        (words, numbers), (drawn_words, drawn_numbers) = (_words_and_numbers(text) for text in texts)
        assert words == drawn_words, f"{name}.svg differs; python -m tools.docs draws it anew"
        assert numbers == pytest.approx(drawn_numbers, abs=0.11), f"{name}.svg differs; python -m tools.docs"


@pytest.mark.parametrize("name", picture_names())
def test_words_of_a_picture_stay_inside_it(name: str) -> None:
    """A letter of a sans-serif font is about half as wide as it is high: 6 units, 5.3 in the small size."""
    svg = draw(name).file()
    width, height = (int(number) for number in re.findall(r'viewBox="0 0 (\d+) (\d+)"', svg)[0])
    for x, y, anchor, look, text in re.findall(r'<text x="(.*?)" y="(.*?)" text-anchor="(.*?)"(.*?)>(.*?)</text>', svg):
        length = len(html.unescape(text)) * (5.3 if "small" in look else 6.0)
        left = float(x) - length * {"start": 0, "middle": 0.5, "end": 1}[anchor]
        assert left >= -2, (name, text)
        assert left + length <= width + 2, (name, text)
        assert 8 <= float(y) <= height, (name, text)


def _words_and_numbers(text: str) -> tuple[list[str], list[float]]:
    number = r"-?\d+\.\d+"
    return re.split(number, text), [float(match) for match in re.findall(number, text)]


def _blocks(name: str) -> list[Part]:
    found = parts(importlib.import_module(f"reference.{name}").__doc__ or "")
    return [part for part in found if part.kind == "block"]


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas_name_what_the_docstring_names(name: str) -> None:
    """Each name in the LaTeX occurs in the plain text, and each name that the plain text defines is in the LaTeX."""
    pytest.importorskip("matplotlib", reason="could not import 'matplotlib': it sets the formulas")
    from tools.docs.formula import names

    assert len(FORMULAS[name]) == len(_blocks(name))
    for lines, block in zip(FORMULAS[name], _blocks(name), strict=True):
        if lines:
            used = set().union(*(names(line) for line in lines))
            assert used - {"mod"} <= set(re.findall(r"\w+", block.text))
            defined = re.findall(r"^(\w\w+)(?:\[.*?\]|\(.*?\))? *=", block.text, re.MULTILINE)
            assert set(defined) <= used, f"{name}: the formula leaves out what the docstring defines"


# --- text ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cu_seqlens[b] is <none>", "`cu_seqlens[b]` is &#60;none&#62;"),
        ("a * b and k_len - q_len + i", "a &#42; b and `k_len - q_len + i`"),
        ("see block_hash", "see [`block_hash`](block_hash.md)"),
        ("(arXiv 1706.03762)", "([arXiv 1706.03762](https://arxiv.org/abs/1706.03762))"),
    ],
)
def test_prose_is_escaped_and_its_code_is_marked(text: str, expected: str) -> None:
    assert markdown(text, pages=("block_hash",)) == expected


def test_code_of_the_first_page_does_what_it_says() -> None:
    """The two examples of docs/site/index.md run, and give what generate and paged_attention give."""
    text = (ROOT / "docs/site/index.md").read_text(encoding="utf-8")
    loop, lookup = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    functions = ("transformer", "sampling", "slot_mapping", "attention")
    names = {name: getattr(importlib.import_module(f"reference.{name}"), name) for name in functions}
    generator = torch.Generator().manual_seed(0)

    config = ModelConfig(num_hidden_layers=0, num_attention_heads=1, num_key_value_heads=1, head_dim=2)
    matrices = ("model.embed_tokens.weight", "lm_head.weight")
    weights = {name: torch.randn(7, 3, generator=generator) for name in matrices}
    weights["model.norm.weight"] = torch.ones(3)
    names |= {"tokens": [1, 2], "max_tokens": 8, "weights": weights, "config": config}
    exec(loop, names)
    assert names["tokens"] == [1, 2, *generate(Checkpoint(weights, config), [1, 2], max_tokens=8).token_ids]

    query, k_cache, v_cache = (torch.randn(*shape, generator=generator) for shape in ((1, 2, 4), *[(3, 2, 1, 4)] * 2))
    cache = {"k_cache": k_cache, "v_cache": v_cache, "block_table": torch.tensor([2, 0]), "block_size": 2}
    names |= {"torch": torch, "query": query, "context_len": 3, **cache}
    exec(lookup, names)
    expected = paged_attention(query, k_cache, v_cache, torch.tensor([[2, 0]]), torch.tensor([3]))
    assert torch.equal(names["output"], expected)


# --- the site ---


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built with every warning an error: a link or an anchor that leads nowhere, an example that fails."""
    pytest.importorskip("material", reason="could not import 'material': it builds the document")
    pytest.importorskip("matplotlib", reason="could not import 'matplotlib': it sets the formulas")
    folder = tmp_path_factory.mktemp("site")
    command = ("-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder)
    done = run_python(*command, NO_MKDOCS_2_WARNING="1")  # Material's advertisement of its successor
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_site_has_a_page_for_every_file_of_reference_that_links_tests_of_the_engine(site: Path) -> None:
    for name in NAMES:
        page = (site / "reference" / f"{name}.html").read_text(encoding="utf-8")
        for heading in ("Why", "The code", "Examples", "In the engine", "Exercises"):
            assert f">{heading}<a" in page, f"{name} has no section {heading!r}"
        held = page.partition("These tests hold the engine")[2].partition("</ul>")[0]
        assert 'href="../source/tests/' in held, f"{name} links no test of the engine"


def test_pages_load_nothing_from_other_machines(site: Path) -> None:
    for path in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|iframe|link)\b[^>]*(?:src|href)=\"?https?://", path.read_text("utf-8"))
        assert loaded == [], path


def test_pictures_of_a_document_are_part_of_its_page_and_follow_its_colours(site: Path) -> None:
    page = (site / "documents" / "conformance.html").read_text(encoding="utf-8")
    pictures = [*(ROOT / "docs" / "conformance").glob("*.svg")]
    assert pictures != []
    assert page.count('class="picture"') == len(pictures)
    assert "prefers-color-scheme" not in page.partition("<article")[2]
    assert "<img" not in page.partition("<article")[2]


def test_every_link_to_a_line_leads_to_that_line(site: Path) -> None:
    """MkDocs checks files and headings; the numbers of lines are checked here."""
    number = 0
    for path in (site / "reference").glob("*.html"):
        for target, anchor in re.findall(r'href="([^"#]+)#(__codelineno-[\d-]+)"', path.read_text(encoding="utf-8")):
            text = (path.parent / target).resolve().read_text(encoding="utf-8")
            assert f'id="{anchor}"' in text, (path, target, anchor)
            number += 1
    assert number > len(NAMES)
