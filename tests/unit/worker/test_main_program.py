"""Whether the ranks' processes can import the program, asked before one is started."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from nanovllm.worker.main_program import require_importable_program
from tests.support.limits import HANG_SECONDS
from tests.support.source_tree import ROOT

PROGRAM = """\
from nanovllm import LLM, bundled_model_path
if __name__ == "__main__":
    with LLM(str(bundled_model_path()), tensor_parallel_size=2, device="cpu", max_model_len=64) as llm:
        print(llm.generate([[5, 6]], use_tqdm=False)[0]["finish_reason"])
"""


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, input=stdin, capture_output=True, text=True, timeout=HANG_SECONDS)


def test_a_program_on_stdin_is_refused_with_a_remedy_that_works(tmp_path: Path) -> None:
    """D92, D93: multiprocessing would fail to import '<stdin>' in each rank, with a traceback of its own."""
    result = run("-", stdin=PROGRAM)
    assert result.returncode == 1
    *_, last = result.stderr.splitlines()
    assert last.startswith(
        "ValueError: a program that starts an engine with tensor_parallel_size above 1 must be a file"
    )
    assert last.endswith(
        """got '<stdin>'; save it to a file and start the engine there under `if __name__ == "__main__":`"""
    )
    assert "No such file" not in result.stderr
    (tmp_path / "program.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + PROGRAM)
    result = run(str(tmp_path / "program.py"))
    assert (result.returncode, result.stdout) == (0, "length\n"), result.stderr


def test_a_program_without_a_file_needs_none() -> None:
    """D92: python -c, as a notebook, has nothing to import."""
    result = run("-c", PROGRAM)
    assert (result.returncode, result.stdout) == (0, "length\n"), result.stderr


@pytest.mark.parametrize(
    ("file", "spec", "is_taken"),
    [
        (None, None, True),
        (__file__, None, True),
        ("<stdin>", None, False),
        ("gone.py", None, False),
        ("<stdin>", "spec", True),
    ],
)
def test_which_programs_are_taken(
    file: str | None, spec: object, is_taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D92: a module (python -m) is found by its name."""
    main = ModuleType("__main__")
    main.__spec__ = spec  # type: ignore[assignment]
    if file is not None:
        main.__file__ = file
    monkeypatch.setitem(sys.modules, "__main__", main)
    if is_taken:
        require_importable_program()
    else:
        with pytest.raises(ValueError, match=f"got '{file}'"):
            require_importable_program()
