"""Runs kernels in Triton's interpreter, on the CPU, so that a wrong index, a forgotten element or a race would show.

The interpreter is chosen before triton's first import, and an access far out of bounds kills the process: so cases run
in a process beside pytest's, one at a time, and a new one is started when it died. A case runs with the programs of
each grid in order, then reversed, so each of two programs comes before the other once: what one writes and the other
reads or writes too would differ.
"""

import atexit
import importlib
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest.mock import patch

from tests.support.counts import add_counts, counting
from tests.support.kernels import gluon_emulation, own_kernels
from tests.support.kernels.registry import Check
from tests.support.limits import HANG_SECONDS


class Outcome(NamedTuple):
    """failure: what to print, or "" if the case passed. functions: names of the @triton.jit functions that ran.

    counts: what was compared, as Counts.to_properties gives it. not_judged: why the case says nothing about a callable
    that --kernel gave, or "".
    """

    failure: str
    functions: frozenset[str] = frozenset()
    counts: Sequence[tuple[str, Any]] = ()
    not_judged: str = ""


class Interpreter:
    """A process in which Triton interprets. It is started at the first call, and again after it died."""

    def __init__(self) -> None:
        self._process: Any = None

    def run(self, module: str, case: str, timeout: float = HANG_SECONDS) -> Outcome:
        """Run KERNEL.cases[case] of `module` in every order. What it compares is counted for the running test."""
        outcome = self.call(run_case, module, case, own_kernels.installed_specs(), timeout=timeout)
        add_counts(outcome.counts)
        return outcome

    def call(self, function: Callable[..., Any], *args: Any, timeout: float = HANG_SECONDS) -> Any:
        """function(*args), of module level, in that process. An exception there becomes an Outcome."""
        if self._process is None:
            self._start()
        self._connection.send((function, args))
        if not self._connection.poll(timeout):
            self.close()
            return Outcome(f"it ran for more than {timeout} s and was stopped")
        try:
            return self._connection.recv()
        except EOFError:
            self._process.join()
            code, self._process = self._process.exitcode, None
            return Outcome(f"the interpreting process died with exit code {code}: an access far out of bounds")

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        with patch.dict("os.environ", TRITON_INTERPRET="1", OMP_NUM_THREADS="1"):
            self._process.start()
        theirs.close()

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


INTERPRETER = Interpreter()
atexit.register(INTERPRETER.close)


def _serve(connection: Any) -> None:
    while True:
        try:
            function, args = connection.recv()
        except EOFError:  # pytest has ended
            return
        try:
            result = function(*args)
        except BaseException:
            result = Outcome(traceback.format_exc())
        connection.send(result)


def run_case(module: str, case: str, own_specs: Sequence[str] = ()) -> Outcome:
    """In the process that interprets: the case in every order, up to the first in which it fails.

    own_specs: the values of --kernel, whose callables are loaded in this process and take our launchers' place.
    """
    gluon_emulation.install()
    own_kernels.install(own_specs)
    check = importlib.import_module(module).KERNEL.cases[case]
    failure = ""
    with counting() as counts, recorded_functions() as functions:
        for order, context in (("in order", nullcontext()), ("reversed", programs_reversed())):
            with context:
                try:
                    failure = failure_of(check, "cpu")
                except own_kernels.NotJudged as reason:
                    return Outcome("", not_judged=str(reason))
            if failure:
                failure = f"programs {order}\n{failure}"
                break
    return Outcome(failure, frozenset(functions), counts.to_properties())


def failure_of(check: Check, device: str) -> str:
    """What the check says when it fails, with what it was given and where it failed; "" if it passes.

    Raises NotJudged if it says nothing about a callable that --kernel gave.
    """
    name = getattr(check, "__name__", check)
    try:
        with own_kernels.must_be_called():
            check(device)
    except own_kernels.NotJudged:
        raise
    except AssertionError as error:
        frames = traceback.extract_tb(error.__traceback__)
        frame = next(frame for frame in reversed(frames) if not frame.filename.endswith(("accuracy.py", "guards.py")))
        return f"{name}\n{str(error) or frame.line}\n(at {os.path.relpath(frame.filename)}:{frame.lineno})"
    except Exception:
        return f"{name}\n{traceback.format_exc()}"
    return ""


@contextmanager
def programs_reversed() -> Iterator[None]:
    """Within it, the interpreter and the emulation run the last program of every grid first."""
    from triton.runtime.interpreter import interpreter_builder

    set_grid_index = interpreter_builder.set_grid_idx

    def set_mirrored_index(*places: int) -> None:  # of the program that is next, as the interpreter counts
        set_grid_index(*(size - 1 - place for size, place in zip(interpreter_builder.grid_dim, places, strict=True)))

    with (
        patch.object(interpreter_builder, "set_grid_idx", set_mirrored_index),
        patch.object(gluon_emulation, "ordered", lambda count: range(count)[::-1]),
    ):
        yield


@contextmanager
def recorded_functions() -> Iterator[set[str]]:
    """Names of the @triton.jit functions that are launched or called within it, by the interpreter or the emulation."""
    from triton.runtime.interpreter import InterpretedFunction

    names: set[str] = set()
    emulated = gluon_emulation.EmulatedFunction

    def recording(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            names.add(self.fn.__name__)
            return method(self, *args, **kwargs)

        return call

    with (
        patch.object(InterpretedFunction, "run", recording(InterpretedFunction.run)),
        patch.object(InterpretedFunction, "__call__", recording(InterpretedFunction.__call__)),
        patch.object(emulated, "__call__", recording(emulated.__call__)),
    ):
        yield names
