"""Engines with several ranks from their start to their end, whichever way that comes."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from nanovllm import LLM, SamplingParams, bundled_model_path
from nanovllm.console import TERMINATED
from nanovllm.executor.multiproc import MultiprocExecutor
from tests.support.counts import count_event
from tests.support.limits import HANG_SECONDS, wait_until
from tests.support.rank_engines import OPTIONS, engine, generate
from tests.support.resource_snapshot import SHARED_MEMORY, Watch
from tests.support.source_tree import ROOT

# --- in this process ---


def test_two_engines_at_once_do_not_meet(nothing_left: Watch) -> None:
    """D21 D32: in one process, step by step in turn, with other block sizes, while a segment has the name that
    nano-vllm uses.
    """
    prompt, params = "In the beginning", SamplingParams.greedy(max_tokens=12)
    stale = SHARED_MEMORY / "nanovllm"
    stale.write_bytes(b"left by a program that crashed")
    try:
        with LLM(str(bundled_model_path()), **OPTIONS) as alone, ExitStack() as stack:
            expected = alone.generate(prompt, params, use_tqdm=False)[0]["text"]
            engines = [stack.enter_context(engine(kv_cache_block_size=size)) for size in (16, 4)]
            for llm in engines:
                llm.add_request(prompt, params)
            outputs: list[Any] = [None, None]
            while not all(llm.is_finished() for llm in engines):
                for index, llm in enumerate(engines):
                    for output in llm.step().finished:
                        outputs[index] = output["text"]
        assert outputs == [expected, expected]
        assert stale.read_bytes() == b"left by a program that crashed"
    finally:
        stale.unlink(missing_ok=True)


def test_a_suspended_rank_is_waited_for(nothing_left: Watch) -> None:
    """D33: in the middle of decoding; then it goes on."""
    with engine() as llm:
        (rank_1,) = llm._core.executor._processes
        params = SamplingParams.greedy(max_tokens=20, ignore_eos=True)
        whole = llm.generate([[5, 6, 7]], params, use_tqdm=False)[0]["token_ids"]
        stream = llm.generate_stream([[5, 6, 7]], params)
        pieces = [next(stream)]
        os.kill(rank_1.pid, signal.SIGSTOP)
        threading.Timer(2, os.kill, (rank_1.pid, signal.SIGCONT)).start()
        pieces += stream
        assert [token for piece in pieces for token in piece["token_ids"]] == whole
        count_event("a rank suspended and continued")


def test_an_engine_without_references_ends(nothing_left: Watch) -> None:
    """D34: `del llm` without close()."""
    before = nothing_left.snapshot().processes
    llm = engine()
    generate(llm)
    assert nothing_left.snapshot().processes > before
    del llm  # nothing_left looks for what remains


def test_ranks_end_by_themselves(nothing_left: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """D34: close() lets them destroy the group and free what they hold; none is killed."""
    exit_codes: list[int | None] = []
    kill = MultiprocExecutor._kill_workers

    def look_and_kill(executor: MultiprocExecutor) -> None:
        exit_codes.extend(process.exitcode for process in executor._processes)
        kill(executor)

    monkeypatch.setattr(MultiprocExecutor, "_kill_workers", look_and_kill)
    engine().close()
    assert exit_codes == [0]


# --- in a process of its own ---

PROGRAM = """
import signal
from nanovllm import LLM, SamplingParams, bundled_model_path


def segments(queue):
    semaphores = [semaphore for reader in queue.readers for semaphore in (reader.items_available, reader.slot_free)]
    return [queue._segment.name, *("sem." + semaphore._semlock.name.lstrip("/") for semaphore in semaphores)]


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs the tests in the background ignores it
    llm = LLM(str(bundled_model_path()), tensor_parallel_size=2, **{options!r})
    executor = llm._core.executor
    print(executor._processes[0].pid, executor._store_path, *segments(executor._queue), flush=True)
    {body}
"""
GENERATE_LONG = "llm.generate([[5, 6, 7]], SamplingParams(max_tokens=16, ignore_eos=True), use_tqdm=False)"


class Program:
    """A program that starts an engine with two ranks and prints what the engine made."""

    def __init__(self, directory: Path, body: str) -> None:
        script = directory / "program.py"
        script.write_text(PROGRAM.format(options=OPTIONS, body=body))
        self.process = subprocess.Popen(
            [sys.executable, str(script)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def wait_until_it_has_started(self) -> None:
        words = self.line().split()
        self.rank_1, self.store, self.segments = psutil.Process(int(words[0])), Path(words[1]), words[2:]

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def end(self) -> tuple[int, str, str]:
        """Exit code, output, errors; fails unless rank 1 ends and its directory and segments are removed."""
        out, err = self.process.communicate(timeout=HANG_SECONDS)
        wait_until(lambda: not self.rank_1.is_running(), "rank 1 has ended")
        wait_until(lambda: not self.store.parent.exists(), "the directory is removed")
        for path in (SHARED_MEMORY / name for name in self.segments):
            wait_until(lambda path=path: not path.exists(), f"{path} is removed")
        return self.process.returncode, out, err

    def kill(self) -> None:
        """With its children, as far as they are left."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


@pytest.fixture
def start_program(tmp_path: Path) -> Iterator[Callable[[str], Program]]:
    """Starts a Program with the given body; ends it after the test."""
    with ExitStack() as stack:

        def start(body: str) -> Program:
            program = Program(tmp_path, body)
            stack.callback(program.kill)
            program.wait_until_it_has_started()
            return program

        yield start


def test_the_interpreter_ends_without_close(start_program: Callable[[str], Program]) -> None:
    """D34: exit code 0 and no message."""
    program = start_program("print(len(llm.generate([[5]], SamplingParams(max_tokens=2), use_tqdm=False)))")
    assert program.end() == (0, "1\n", "")


def test_ctrl_c_ends_the_ranks(start_program: Callable[[str], Program]) -> None:
    """D33: the whole foreground group gets it, as at a terminal; generate() raises KeyboardInterrupt."""
    body = f"""
    try:
        while True:
            {GENERATE_LONG}
            print("working", flush=True)
    except KeyboardInterrupt:
        print("interrupted")
"""
    program = start_program(body)
    assert program.line() == "working\n"
    program.rank_1.send_signal(signal.SIGINT)  # ignored: rank 0 handles it
    for _ in range(2):  # a call that had ended by then, and one that had not
        assert program.line() == "working\n"
    os.killpg(program.process.pid, signal.SIGINT)
    code, out, err = program.end()
    assert (code, out.splitlines()[-1], err) == (0, "interrupted", "")


def test_sigterm_ends_a_command_and_its_ranks(tmp_path: Path) -> None:
    """D34: exit code 143, nothing left, and Python has nothing to say about shared memory."""
    arguments = ["--tensor-parallel-size=2", "--device=cpu", "--max-tokens=2000", "--ignore-eos", "In the beginning"]
    with subprocess.Popen(
        [sys.executable, "-m", "nanovllm", "generate", *arguments], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, "TMPDIR": str(tmp_path)},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.read(1)
        children = psutil.Process(process.pid).children()
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        segments = [Path(line.split()[-1]) for line in maps.splitlines() if f" {SHARED_MEMORY}/" in line]
        assert len(children) == 2, "rank 1, and the tracker of shared memory"
        assert len(segments) == 3, "one for messages, and two semaphores"
        process.terminate()
        _, errors = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == TERMINATED
    assert [
        line for line in errors.splitlines() if not line.startswith(("no --model given", "attention backend"))
    ] == []
    wait_until(lambda: not any(child.is_running() for child in children), "the processes have ended")
    assert [path for path in segments if path.exists()] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["between steps", "in a collective", "in a collective, while a child has its files"])
def test_ranks_end_when_rank_0_is_killed(start_program: Callable[[str], Program], where: str) -> None:
    """D33 D34: in a collective rank 1 notices the closed connections, and nothing reads its report: a child of rank 0
    may have the pipe, or rank 0 itself, whose files are closed one by one.
    """
    body = f"""
    import subprocess, time
    if {"child" in where}:
        files = [pipe.fileno() for pipe in executor._monitor._pipes.values()]
        child = ["sleep", "{2 * HANG_SECONDS}"]
        subprocess.Popen(child, pass_fds=files, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if {"in a collective" in where}:
        executor._runner.run = lambda *step: print("sent", flush=True) or time.sleep({2 * HANG_SECONDS})
        {GENERATE_LONG}
    print("idle", flush=True)
    time.sleep({2 * HANG_SECONDS})
"""
    program = start_program(body)
    assert program.line() in ("sent\n", "idle\n")
    time.sleep(0.2)  # for rank 1 to reach the collective; if it does not, this is as between steps
    program.process.kill()
    code, _, _ = program.end()
    assert code == -signal.SIGKILL
