"""The documents agree with the tree: their links lead to files, their make targets exist, their version is ours."""

import re
from pathlib import Path

import pytest
import yaml

import nanovllm
from tests.support.source_tree import ROOT

DOCUMENTS = [
    *sorted(path for path in ROOT.glob("*.md") if path.name != "README.md"),  # test_readme.py
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").glob("*.md")),
]
EACH_DOCUMENT = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


def prose(path: Path) -> str:
    """The text without code blocks."""
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@EACH_DOCUMENT
def test_links_lead_to_files(path: Path) -> None:
    links = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", prose(path))
    assert [link for link in links if not (path.parent / link).exists()] == []


@EACH_DOCUMENT
def test_make_targets_exist(path: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    called = re.findall(r"(?:^|`)make ((?:[a-z-]+ ?)+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    targets = {target for targets in called for target in targets.split()}
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


def test_a_citation_names_this_version_and_this_licence() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == nanovllm.__version__
    assert (
        citation["license"] == re.findall(r'^license = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[0]
    )
