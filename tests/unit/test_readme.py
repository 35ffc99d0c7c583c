"""The documents agree with the tree: links, make targets, versions; and the README's examples work as pasted."""

import re
import shutil
from pathlib import Path

import pytest
import yaml

import nanovllm
import reference
from nanovllm import bundled_model_path, cli
from tests.support.source_tree import ROOT

DOCUMENTS = sorted(path for folder in (ROOT, ROOT / "docs", ROOT / "examples") for path in folder.glob("*.md"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files_and_make_targets_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", prose)
    assert [link for link in links if not (path.parent / link).exists()] == []
    called = re.findall(r"(?:^|`)make ((?:[a-z-]+ ?)+)", text, re.MULTILINE)
    targets = {target for targets in called for target in targets.split()}
    assert [target for target in targets if not re.search(rf"^{target}:", MAKEFILE, re.MULTILINE)] == []


def test_a_citation_names_this_version_and_this_licence() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    (license,) = re.findall(r'^license = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert (citation["version"], citation["license"]) == (nanovllm.__version__, license)


def test_reading_order_is_that_of_reference():
    listed = re.findall(r"^\d+\. \[(\w+)\]\(reference/\1\.py\): (.*)$", README, re.MULTILINE)
    assert listed == list(reference.READING_ORDER)


@pytest.mark.parametrize("kind", ["no tokenizer", "tokenizer", "chat template"])
def test_first_example_works_as_pasted(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = code_blocks("python")
    directory = tmp_path / "model"
    shutil.copytree(bundled_model_path(), directory)
    if kind == "no tokenizer":
        (directory / "tokenizer.json").unlink()
    if kind == "chat template":
        (directory / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    assert block.count('"Qwen/Qwen3-0.6B"') == 1
    exec(compile(block.replace('"Qwen/Qwen3-0.6B"', repr(str(directory))), "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.count("length") == 2
    assert len(printed.splitlines()) >= {"no tokenizer": 2, "tokenizer": 3, "chat template": 4}[kind]


def test_shell_lines_are_understood():
    """Every `nanovllm ...` of the README parses; nothing is run."""
    for line in [line for block in code_blocks("sh") for line in block.splitlines() if line.startswith("nanovllm ")]:
        words = re.findall(r'"[^"]*"|\S+', line.split("#")[0].split(" < ")[0])
        assert cli._parser().parse_args([word.strip('"') for word in words[1:]]).run, line
