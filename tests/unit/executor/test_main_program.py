"""Whether the workers' processes can import the program, checked before one is started.

The remedy, a program in a file, is what tests/distributed/test_lifetime.py runs.
"""

import subprocess
import sys
from types import ModuleType

import pytest

from nanovllm.executor.main_program import require_importable_program
from tests.support.limits import HANG_SECONDS
from tests.support.source_tree import ROOT

PROGRAM = """\
from nanovllm import LLM, bundled_model_path
if __name__ == "__main__":
    LLM(str(bundled_model_path()), tensor_parallel_size=2, device="cpu", max_model_len=64)
"""


def test_a_program_on_stdin_is_refused() -> None:
    """D92, D93: multiprocessing would fail to import '<stdin>' in each rank, with a traceback of its own."""
    result = subprocess.run(
        [sys.executable, "-"], cwd=ROOT, input=PROGRAM, capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert result.returncode == 1
    *_, last = result.stderr.splitlines()
    assert last.startswith("ValueError: a program that starts an engine with tensor_parallel_size above 1 must be a")
    assert last.endswith(
        """'<stdin>'; save it to a file and start the engine there under `if __name__ == "__main__":`"""
    )
    assert "No such file" not in result.stderr


@pytest.mark.parametrize(
    ("file", "spec", "is_refused"),
    [
        (None, None, False),
        (__file__, None, False),
        ("<stdin>", None, True),
        ("gone.py", None, True),
        ("<stdin>", "spec", False),
    ],
)
def test_which_programs_are_refused(
    file: str | None, spec: object, is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D92: a module (python -m) is found by its name; python -c and a notebook have nothing to import."""
    main = ModuleType("__main__")
    main.__spec__ = spec  # type: ignore[assignment]
    if file is not None:
        main.__file__ = file
    monkeypatch.setitem(sys.modules, "__main__", main)
    if is_refused:
        with pytest.raises(ValueError, match=f"got '{file}'"):
            require_importable_program()
    else:
        require_importable_program()
