"""Whether the workers' processes can import the program, checked before one is started.

The remedy, a program in a file, is what tests/distributed/test_lifetime.py runs.
"""

import re
import sys
from contextlib import nullcontext
from types import ModuleType

import pytest

from nanovllm.executor.multiproc import require_importable_program
from tests.support.programs import run_python

PROGRAM = """\
from nanovllm import LLM, bundled_model_path
if __name__ == "__main__":
    LLM(str(bundled_model_path()), tensor_parallel_size=2, device="cpu", max_model_len=64)
"""


def test_a_program_on_stdin_is_refused() -> None:
    """D92, D93: multiprocessing would fail to import '<stdin>' in each rank, with a traceback of its own."""
    result = run_python("-", stdin=PROGRAM)
    assert result.returncode == 1
    *_, last = result.stderr.splitlines()
    assert re.match("ValueError: a program .* must be a .*'<stdin>'; save it to a file and start the engine", last)
    assert "No such file" not in result.stderr


@pytest.mark.parametrize(
    ("refused", "file", "spec"),
    [(0, None, None), (0, __file__, None), (0, "<stdin>", "s"), (1, "<stdin>", None), (1, "gone", None)],
)
def test_which_programs_are_refused(refused: int, file: str | None, spec: object, monkeypatch) -> None:
    """D92: a module (python -m) is found by its name; python -c and a notebook have nothing to import."""
    main = ModuleType("__main__")
    main.__spec__ = spec  # type: ignore[assignment]
    if file is not None:
        main.__file__ = file
    monkeypatch.setitem(sys.modules, "__main__", main)
    with pytest.raises(ValueError, match=f"got '{file}'") if refused else nullcontext():
        require_importable_program()
