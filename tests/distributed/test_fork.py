"""A child that the user's program forks, and that ends in any way, leaves its parent's engine alone."""

import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nanovllm import LLM
from tests.e2e.test_threads import HeldStep
from tests.support.programs import run_python
from tests.support.rank_engines import GREEDY, PROMPTS, engine, generate
from tests.support.source_tree import ROOT

# A program of its own, since a child of pytest would run pytest's end.
PROGRAM = """
import gc, multiprocessing, os, signal, sys, time
from nanovllm import LLM, SamplingParams, bundled_model_path

def main():
    global llm, stream
    params = SamplingParams.greedy(max_tokens=8, ignore_eos=True)
    llm = LLM(str(bundled_model_path()), device="cpu", attention_backend="torch", kv_cache_block_size=16,
              num_kv_cache_blocks=32, max_model_len=64, max_num_seqs=8, tensor_parallel_size=2)
    def generate():
        return llm.generate("In the", params, use_tqdm=False)[0]["token_ids"]
    expected = generate()
    stream = llm.generate_stream("In the", params)
    streamed = next(stream)["token_ids"]
    def child(how):
        global llm, stream
        if how == "close":
            llm.close()
        if how == "use":
            for use in (generate, llm.step, lambda: next(stream), lambda: llm.abort(0), lambda: llm.add_request("a"),
                        lambda: llm.chat([]), llm.is_finished):
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
    for how in ("exit", "close", "use", "gc", "multiprocessing"):
        if how == "multiprocessing":  # whose exit function ends its own children
            process = multiprocessing.get_context("fork").Process(target=child, args=("close",))
            process.start()
            process.join()
            assert process.exitcode == 3
        else:
            pid = os.fork()
            if not pid:
                child(how)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
        time.sleep(0.3)  # for what a signal or a closed connection does to a rank
        assert generate() == expected
    for item in stream:
        streamed += item["token_ids"]
    assert streamed == expected
    pid = os.fork()  # a child that holds copies of all pipes while the engine closes
    if not pid:
        time.sleep(600)
    started = time.monotonic()
    llm.close()
    assert time.monotonic() - started < 30
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    print("as before")

if __name__ == "__main__":
    main()
"""


def test_a_forked_child_that_ends_leaves_the_engine_alone(tmp_path: Path) -> None:
    """D86: at its exit, finalizers and multiprocessing's exit function run."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    result = run_python(program, PYTHONPATH=str(ROOT))
    assert (result.returncode, result.stdout, result.stderr.count("Error")) == (0, "as before\n", 0), result.stderr


def close_and_use(llm: LLM) -> None:
    llm.close()
    try:
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    except RuntimeError as error:
        os._exit(7 if "make a new engine in the child" in str(error) else 8)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # of Python 3.12, in a process with threads
def test_a_child_forked_in_the_middle_of_a_step_does_not_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """D86: the thread that computes the step does not exist in the child."""
    with engine(1) as llm, ThreadPoolExecutor(1) as threads:
        expected = generate(llm)
        step = HeldStep(llm, monkeypatch)
        computing = threads.submit(generate, llm)
        step.wait()
        child = multiprocessing.get_context("fork").Process(target=close_and_use, args=(llm,))
        child.start()
        child.join(20)
        exit_code = child.exitcode
        child.kill()
        child.join()
        child.close()
        step.resume()
        assert exit_code == 7
        assert computing.result(60) == expected
