"""A child that the user's program forks, and that ends in any way, leaves its parent's engine alone."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM
from tests.distributed.test_failures import GREEDY, PROMPTS, engine, generate
from tests.support.limits import HANG_SECONDS
from tests.support.resource_snapshot import Watch
from tests.support.source_tree import ROOT

FORK_WARNING = "ignore:.*use of fork:DeprecationWarning"  # of Python 3.12 and newer, in a process with threads

# A program of its own, since a child of pytest would run pytest's end.
PROGRAM = """
import gc, os, sys, time
from nanovllm import LLM, SamplingParams, bundled_model_path

def main():
    global llm, stream
    size = int(sys.argv[1])
    params = SamplingParams.greedy(max_tokens=8, ignore_eos=True)
    llm = LLM(str(bundled_model_path()), device="cpu", attention_backend="torch", kv_cache_block_size=16,
              num_kv_cache_blocks=32, max_model_len=64, max_num_seqs=8, tensor_parallel_size=size)
    def generate():
        return llm.generate("In the", params, use_tqdm=False)[0]["token_ids"]
    expected = generate()
    stream = llm.generate_stream("In the", params)
    streamed = next(stream)["token_ids"]
    for how in ("exit", "close", "use", "gc"):
        pid = os.fork()
        if not pid:
            if how == "close":
                llm.close()
            if how == "use":
                uses = (lambda: next(stream), lambda: llm.abort(0), lambda: llm.add_request("a"))
                for use in (generate, llm.step, *uses):
                    try:
                        use()
                    except RuntimeError as error:
                        assert "belongs to process" in str(error) and "make a new engine in the child" in str(error)
                    else:
                        raise AssertionError("no error")
            if how == "gc":
                llm = stream = None
                gc.collect()
            sys.exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
        time.sleep(0.3)  # for what a signal or a closed connection does to a rank
        assert generate() == expected
    for item in stream:
        streamed += item["token_ids"]
    assert streamed == expected
    llm.close()
    print("as before")

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("size", [1, 2])
def test_a_forked_child_that_ends_leaves_the_engine_alone(tmp_path: Path, size: int) -> None:
    """D86: at its exit, finalizers and multiprocessing's exit function run."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    result = subprocess.run(
        [sys.executable, str(program), str(size)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=HANG_SECONDS,
    )  # fmt: skip
    assert (result.returncode, result.stdout, result.stderr.count("Error")) == (0, "as before\n", 0), result.stderr


def close_and_use(llm: LLM) -> None:
    llm.close()
    try:
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    except RuntimeError as error:
        os._exit(7 if "make a new engine in the child" in str(error) else 8)


@pytest.mark.filterwarnings(FORK_WARNING)
@pytest.mark.parametrize("size", [1, 2])
def test_a_child_of_multiprocessing_leaves_the_engine_alone(nothing_left: Watch, size: int) -> None:
    """D86."""
    with engine(size) as llm:
        expected = generate(llm)
        child = multiprocessing.get_context("fork").Process(target=close_and_use, args=(llm,))
        child.start()
        child.join(60)
        assert child.exitcode == 7
        child.close()
        assert generate(llm) == expected


@pytest.mark.filterwarnings(FORK_WARNING)
def test_an_engine_closes_while_a_forked_child_lives(nothing_left: Watch) -> None:
    """D86: the child holds copies of all pipes open."""
    with engine() as llm:
        pid = os.fork()
        if not pid:
            time.sleep(60)
            os._exit(0)
        try:
            started = time.monotonic()
            llm.close()
            assert time.monotonic() - started < 30
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@pytest.mark.filterwarnings(FORK_WARNING)
def test_a_child_forked_in_the_middle_of_a_step_does_not_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """D86: the thread that computes the step does not exist in the child."""
    is_reached, may_go = threading.Event(), threading.Event()
    with engine(1) as llm, ThreadPoolExecutor(1) as threads:
        expected = generate(llm)
        run = llm._core.executor.run

        def wait_and_run(batch: Any) -> list[int]:
            is_reached.set()
            assert may_go.wait(60)
            return run(batch)

        monkeypatch.setattr(llm._core.executor, "run", wait_and_run)
        computing = threads.submit(generate, llm)
        assert is_reached.wait(60)
        child = multiprocessing.get_context("fork").Process(target=close_and_use, args=(llm,))
        child.start()
        child.join(20)
        exit_code = child.exitcode
        child.kill()
        child.join()
        child.close()
        may_go.set()
        assert exit_code == 7
        assert computing.result(60) == expected
