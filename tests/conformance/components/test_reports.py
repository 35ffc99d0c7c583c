"""The report of the conformance checks, its exit codes, and the two commands that print it."""

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from nanovllm import cli
from nanovllm.cli_errors import USER_ERROR
from nanovllm.commands import conformance
from nanovllm.console import TERMINATED
from tests.conformance.components import report
from tests.conformance.components.__main__ import BROKEN_PIPE
from tests.conformance.components.contracts import CONTRACTS
from tests.conformance.components.drawing import drawing
from tests.conformance.components.running import plant, run_checks
from tests.conformance.components.targets.faults import FAULTS, RIGHT
from tests.support.limits import HANG_SECONDS, wait_until
from tests.support.programs import run_python
from tests.support.source_tree import ROOT
from tools.docs.svg import MAX_WIDTH

FAULT = "C34 is one position ahead"


def result(**verdicts: str) -> dict:
    rows = {
        name: {"verdict": verdict, "message": "<b>", "script": "x < 1", "picture": "block 0", "reason": "no part"}
        for name, verdict in verdicts.items()
    }
    return {"target": "fork", "seed": 1, "num_scenarios": 2, "verdicts": rows}


def test_drawing_of_many_blocks_and_a_long_request_stays_inside_the_width() -> None:
    blocks = [f"block {number} |0 1 .|  ref 1  in the tables of r0, r1" for number in range(9)]
    text = "\n".join(
        [*blocks, f"r0: prompt {'0 ' * 27}1; block table 0 1 2 3 4 5 6 7 8", f"r1: prompt {'0 ' * 40}1; waits"]
    )
    boxes = re.findall(r'<rect x="(.*?)" y="(.*?)" width="(.*?)"', drawing(text, "many").file())
    assert len(boxes) == 9 + 9 + 1 + 41
    assert max(float(x) + float(width) for x, _, width in boxes) <= MAX_WIDTH
    assert len({(x, y) for x, y, _ in boxes}) == len(boxes)


def test_drawing_refuses_a_line_that_is_neither_block_nor_request() -> None:
    with pytest.raises(ValueError, match="no line of a picture: 'block one'"):
        drawing("block one", "")


@pytest.mark.parametrize(
    ("verdicts", "code"),
    [
        ({"C01": "holds", "C02": "not applicable"}, 0),
        ({"C01": "holds", "C02": "broken"}, 1),
        ({"C01": "not applicable"}, 2),
    ],
)
def test_exit_code(verdicts: dict[str, str], code: int) -> None:
    assert report.exit_code(result(**verdicts)) == code


def test_text_names_what_is_broken_and_why_the_rest_is_not_applicable() -> None:
    text = report.as_text(result(C01="holds", C02="broken", C03="not applicable", C04="not applicable"))
    assert "1 contracts hold, 1 are broken, 2 are not applicable" in text
    assert CONTRACTS["C02"].users_see in text
    assert text.count("not applicable: no part") == 1
    assert "not applicable: as C03" in text


def test_long_picture_is_cut_after_its_first_blocks_and_requests() -> None:
    blocks = [f"block {number} |0 .|  free" for number in range(20)]
    requests = [f"r{number}: prompt 0; waits" for number in range(report.MAX_LINES + 1)]
    lines = report.short("\n".join([*blocks, *requests])).splitlines()
    assert lines[: report.MAX_LINES + 1] == [*blocks[: report.MAX_LINES], "(8 more blocks)"]
    assert lines[report.MAX_LINES + 1 :] == requests, "a note about one line would be as long as that line"


def test_page_escapes_the_messages_of_the_target() -> None:
    page = report.as_html([result(C02="broken")])
    assert "&lt;b&gt;" in page
    assert "x &lt; 1" in page


def test_nanovllm_conformance_prints_a_finding_and_writes_a_page(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The tests of targets run the other command, python -m tests.conformance.components."""
    (path,) = plant({FAULT: FAULTS[FAULT]}, tmp_path)
    arguments = ["conformance", str(path), "--scenarios", "10", "--seed", "1", "--html", str(tmp_path / "page.html")]
    assert cli.main(arguments) == 1
    assert "C34 BROKEN  The position of a token is its index in the sequence." in capfd.readouterr().out
    assert "C34" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert cli.main(["conformance", str(tmp_path / "nothing")]) == USER_ERROR
    assert capfd.readouterr().err.startswith("nanovllm conformance: error: ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no-such-folder"], "no-such-folder is no folder; give the root of a checkout"),
        (["--scenarios=0", "."], "--scenarios must be at least 1"),
        (["--seconds=nan", "."], "--seconds above 0"),
        (["--html=no/such/page.html", "."], "the folder does not exist"),
    ],
)
def test_wrong_arguments_are_refused_with_a_remedy(arguments: list[str], words: str) -> None:
    printed = run_checks(*arguments)
    assert (printed.returncode, words in printed.stderr) == (USER_ERROR, True), printed.stderr


def test_closed_output_ends_the_command_without_a_traceback() -> None:
    command = [sys.executable, "-m", "tests.conformance.components", str(RIGHT), "--scenarios=5"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == ("", BROKEN_PIPE)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, TERMINATED), (signal.SIGINT, cli.INTERRUPTED)])
def test_signal_ends_the_command_with_its_processes_and_files(
    number: int, code: int, tmp_path: Path, ctrl_c_raises: None
) -> None:
    """Ctrl-C reaches the whole process group of the terminal; SIGTERM, which CI systems send, the command alone."""
    command = [sys.executable, "-m", "nanovllm", "conformance", str(RIGHT), "--scenarios=1000000", "--seconds=60"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    ) as process:
        wait_until(lambda: examining(tmp_path))
        (child,) = examining(tmp_path)
        (os.kill if number == signal.SIGTERM else os.killpg)(process.pid, number)
        output, _ = process.communicate(timeout=HANG_SECONDS)  # returns when no process has its end of the pipe
    assert process.returncode == code, output
    assert output == (b"" if number == signal.SIGTERM else b"\nnanovllm: interrupted\n")
    assert list(tmp_path.iterdir()) == []
    wait_until(lambda: not Path(f"/proc/{child}/cmdline").exists() or not Path(f"/proc/{child}/cmdline").read_bytes())


def test_ctrl_c_while_the_checks_are_imported_shows_no_traceback(tmp_path: Path) -> None:
    """The command prints its line; a file in place of a module that the checks import is the Ctrl-C."""
    (tmp_path / "html.py").write_text("raise KeyboardInterrupt")
    result = run_python("-c", conformance._START, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert (result.returncode, result.stdout, result.stderr) == (cli.INTERRUPTED, "", "")


def examining(folder: Path) -> list[int]:
    """The processes that examine a target, with temporary files in a folder of `folder`: each has a session."""
    found = []
    for pid in (int(path.name) for path in Path("/proc").glob("[0-9]*")):
        with suppress(OSError):
            if f"TMPDIR={folder}/".encode() in Path(f"/proc/{pid}/environ").read_bytes() and os.getsid(pid) == pid:
                found.append(pid)
    return found


def test_installed_package_says_that_a_checkout_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(conformance, "ROOT", tmp_path)
    assert cli.main(["conformance", str(RIGHT)]) == USER_ERROR
    assert "runs from a checkout" in capsys.readouterr().err
