"""What the README shows is what there is."""

import re
import shutil
from pathlib import Path

import pytest

import reference
from nanovllm import bundled_model_path, cli
from tests.support.source_tree import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_reading_order_is_that_of_reference():
    listed = re.findall(r"^\d+\. \[(\w+)\]\(reference/\1\.py\): (.*)$", README, re.MULTILINE)
    assert listed == list(reference.READING_ORDER)


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_link_leads_to_a_file(link):
    assert (ROOT / link).exists()


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


@pytest.mark.parametrize(
    "line", [line for block in code_blocks("sh") for line in block.splitlines() if line.startswith("nanovllm ")]
)
def test_shell_line_is_understood(line):
    """Every `nanovllm ...` of the README parses; nothing is run."""
    words = re.findall(r'"[^"]*"|\S+', line.split("#")[0].split(" < ")[0])
    assert cli._parser().parse_args([word.strip('"') for word in words[1:]]).run


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`?make ([a-z-]+)", README))))
def test_make_target_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
