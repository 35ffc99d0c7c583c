"""tools/words finds words that the project does not use where prose is, and nowhere else."""

from pathlib import Path

from tools.words import findings, main

CODE = '''"""Whoever reads
this."""
nobody = "in vain"  # a name and a value are no prose


def test_who_comes_first():
    # it has
    # gone
    assert nobody, f"{nobody} heard"
    raise ValueError("let it go")


class Box:
    """What a user who reads gets; a tensor whose rows are even."""
'''
PAGE = "As `who` and\n```\nnobody\n```\nsays, it lives here."


def test_words_are_found_in_comments_docstrings_names_and_messages(tmp_path: Path, capsys) -> None:
    (tmp_path / "code.py").write_text(CODE)
    (tmp_path / "page.md").write_text(PAGE)
    found = [(line, word) for line, word, _ in findings(tmp_path / "code.py")]
    assert found == [(1, "Whoever"), (6, "who"), (7, "has gone"), (9, "heard"), (10, "let it go")]
    assert main([str(tmp_path / "page.md")]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(str(tmp_path))]
    assert line.startswith(f"{tmp_path / 'page.md'}:5: 'lives': is, exists, is stored")
