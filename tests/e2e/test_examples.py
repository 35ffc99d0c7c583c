"""Every example runs on the bundled model and shows what it says."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from io import StringIO
from typing import Any

import pytest

from tests.e2e.conftest import bundled_llm, check_empty
from tests.support.kernels.versions import INTERPRETER_REASON, interprets
from tests.support.limits import HANG_SECONDS, wait_until
from tests.support.programs import run_python
from tests.support.source_tree import ROOT

GENESIS = " God created the heaven and the earth"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs an example in this process and returns what it printed. Fails if it exits with a code."""

    def run(name: str) -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py"])
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def run_in_a_process(name: str) -> str:
    result = run_python("-m", f"examples.{name}", CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_example_is_run_by_a_test_and_named_in_their_readme() -> None:
    names = {path.stem for path in (ROOT / "examples").glob("*.py")}
    source = (ROOT / "tests/e2e/test_examples.py").read_text(encoding="utf-8")
    assert names == set(re.findall(r'(?:example|run_in_a_process|serving)\("(\w+)"\)', source))
    readme = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert names == set(re.findall(r"\[(\w+)\.py\]\(\1\.py\)", readme))


def test_offline_batch_prints_one_row_a_prompt_in_order(example) -> None:
    rows = [json.loads(line) for line in example("offline_batch").splitlines()]
    assert [row["prompt"].split()[0] for row in rows] == ["In", "The", "To", "Blessed"]
    assert rows[0]["text"].startswith(GENESIS)
    assert (rows[1]["text"], rows[1]["finish_reason"]) == ("; I shall not want", "stop")


def test_streaming_chat_answers_each_line_until_an_empty_one(example, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", StringIO("In the beginning\nThe LORD is my shepherd\n\nnot read\n"))
    answers = example("streaming_chat").splitlines()
    assert len(answers) == 2
    assert answers[0].startswith(GENESIS)


def test_prefix_caching_finds_the_common_blocks_from_the_second_prompt_on(example) -> None:
    first, *rows = example("prefix_caching").splitlines()
    num_shared, num_blocks, block_size = map(int, re.findall(r"\d+", first))
    assert num_blocks == num_shared // block_size > 0
    found = [int(row.split(" tokens from the cache")[0].split()[-1]) for row in rows]
    assert found == [0] + [num_blocks * block_size] * 3


def test_reproducible_sampling_gives_one_text_for_one_seed(example) -> None:
    lines = example("reproducible_sampling").splitlines()
    texts = [line.partition(": ")[2] for line in lines[:4]]
    assert texts[0] == texts[1] == texts[2] != texts[3]
    assert lines[4] == "the three texts of seed 1 are the same"


def test_two_ranks_generate_the_texts_of_one() -> None:
    lines = run_in_a_process("tensor_parallel").splitlines()
    assert lines[0] == "1 rank:"
    assert lines[3] == "2 ranks:"
    assert lines[1:3] == lines[4:6]
    assert lines[6] == "the same texts"


@pytest.mark.skipif(not interprets(), reason=INTERPRETER_REASON)
def test_the_custom_kernel_computes_what_the_reference_does() -> None:
    pytest.importorskip("triton")
    assert "sequences of [41, 5, 0] keys on cpu: largest difference" in run_in_a_process("custom_attention")


# --- the HTTP server ---


@contextmanager
def serving(name: str) -> Iterator[int]:
    """The port of an example that serves HTTP in a process of its own. Ctrl-C ends it."""
    command = [sys.executable, "-u", "-m", f"examples.{name}", "--port", "0"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = []
        try:
            for line in process.stderr:
                lines.append(line)
                if found := re.search(r"running on http://127\.0\.0\.1:(\d+)", line):
                    yield int(found[1])
                    break
            else:
                pytest.fail("the server ended:\n" + "".join(lines))
        finally:
            process.send_signal(signal.SIGINT)
            rest = process.stderr.read()
            process.wait(HANG_SECONDS)
        assert "Traceback" not in rest


def post(port: int, body: str) -> str:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/generate", data=body.encode())
    with urllib.request.urlopen(request, timeout=HANG_SECONDS) as response:
        return response.read().decode()


def test_the_http_server_streams_texts_and_refuses_wrong_requests() -> None:
    pytest.importorskip("starlette")
    pytest.importorskip("uvicorn")
    body = json.dumps({"prompt": "In the beginning", "max_tokens": 24, "temperature": 0.01, "seed": 0})
    with serving("http_server") as port:
        assert post(port, body).startswith(GENESIS)
        for wrong, words in {
            '{"prompt": "x", "max_tokens": 0}': "max_tokens must be an integer of at least 1, got 0",
            '{"prompt": "x", "max_token": 1}': "did you mean 'max_tokens'?",
            '{"prompt": ["x", "y"]}': 'a JSON object with a string "prompt"',
            "[]": 'a JSON object with a string "prompt"',
            "no JSON": "Expecting value",
        }.items():
            with pytest.raises(urllib.error.HTTPError) as refused:
                post(port, wrong)
            assert refused.value.code == 400
            assert words in json.loads(refused.value.read())["error"]


def test_a_client_that_disconnects_from_the_http_server_aborts_its_request() -> None:
    pytest.importorskip("starlette")
    uvicorn = pytest.importorskip("uvicorn")
    make_app = runpy.run_path(str(ROOT / "examples" / "http_server.py"))["make_app"]
    body = json.dumps({"prompt": "In the beginning", "max_tokens": 480, "ignore_eos": True})
    with bundled_llm() as llm:
        server = uvicorn.Server(uvicorn.Config(make_app(llm), port=0, log_level="error"))
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            wait_until(lambda: server.started)
            client = HTTPConnection("127.0.0.1", server.servers[0].sockets[0].getsockname()[1])
            client.request("POST", "/generate", body)
            response = client.getresponse()
            assert response.read(1)
            response.close()
            client.close()
            wait_until(llm.is_finished)
        finally:
            server.should_exit = True
            thread.join(HANG_SECONDS)
        check_empty(llm)
        num_computed = llm.scheduler.block_manager.block_size * sum(
            block.is_cached for block in llm.scheduler.block_manager.blocks
        )
        assert num_computed < 400, "not generated to its end"
