"""One kernel on one shape: checked, timed in turns with its peers, and compared with the ceiling."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any

import torch

from benchmarks import arithmetic
from benchmarks.timing import Replay, choose_num_calls, choose_num_sets, rough_seconds
from tests.support.kernels.own_kernels import without_own_kernels
from tests.support.kernels.plans import keep_plans

ROUNDS = 15
ROUNDS_OF_SLOW_PEERS = 3
SLOW_SECONDS = 5e-3  # of one call
TOLERANCE = 1e-2  # of the norm: five times the error of rounding to bfloat16, and far below that of a wrong index

Function = Callable[..., Any]


@dataclass(frozen=True)
class Measured:
    """One benchmark at one point, as tests/kernels/NAME_cases.py declares it.

    make(i): inputs of set i, random, on the GPU. run(*inputs): the kernel's outputs, a tensor or several.
    expected(*inputs): the right outputs, in float32 or wider where that matters. work: the bytes and operations.
    peers: other functions of the same inputs, such as flash-attn and, named "torch", plain PyTorch. A peer that fails,
    or is wrong, or cannot be recorded in a graph, gets a note instead of a figure; "torch" must not be wrong.
    """

    make: Callable[[int], tuple[Any, ...]]
    run: Function
    expected: Function
    work: arithmetic.Work
    peers: Mapping[str, Function] = field(default_factory=dict)
    tolerance: float = TOLERANCE


def beside_ours(measured: Measured) -> Measured:
    """The benchmark of a callable that --kernel gave, whose first peer is our kernel.

    The callable runs once on each set of inputs before it is recorded, since some libraries (FlashInfer) plan on the
    host at the first call. On the first set it runs when the results are checked.
    """

    keep_plans()

    def make(index: int) -> tuple[Any, ...]:
        inputs = measured.make(index)
        if index:
            measured.run(*inputs)
        return inputs

    def ours(*inputs: Any) -> Any:
        with without_own_kernels():
            return measured.run(*inputs)

    return replace(measured, make=make, peers={"ours": ours, **measured.peers})


class Measurement:
    """What the fixture `measure` gives: call it once in a test, with the names of kernel and point for the report."""

    def __init__(self, benchmark: Any, ceilings: arithmetic.Ceilings) -> None:
        self._benchmark = benchmark
        self._ceilings = ceilings

    def __call__(self, kernel: str, case: str, measured: Measured) -> None:
        make, run, work, tolerance = measured.make, measured.run, measured.work, measured.tolerance
        first = make(0)
        wanted = measured.expected(*first)
        check(run(*first), wanted, tolerance)
        floor = arithmetic.floor(work, self._ceilings)
        num_calls = choose_num_calls(rough_seconds(partial(run, *first)), floor.seconds)
        sets = [first, *(make(i) for i in range(1, choose_num_sets(work.num_bytes, num_calls)))]
        replay = Replay(calls(run, sets, num_calls))
        others, notes = _record_peers(measured.peers, sets, wanted, tolerance)
        samples: dict[str, list[float]] = {name: [] for name in others}

        def time_peers() -> None:
            for name, other in others.items():
                is_slow = bool(samples[name]) and samples[name][0] > SLOW_SECONDS
                if not (is_slow and len(samples[name]) >= ROUNDS_OF_SLOW_PEERS):
                    samples[name].append(other.seconds())

        self._benchmark.pedantic(replay.tick, setup=time_peers, rounds=ROUNDS, warmup_rounds=2)
        seconds = self._benchmark.stats.stats.median
        self._benchmark.extra_info.update(
            kernel=kernel,
            case=case,
            microseconds=seconds * 1e6,
            bytes=work.num_bytes,
            operations=work.operations,
            ceiling=floor.ceiling,
            floor_microseconds=floor.seconds * 1e6,
            fraction=floor.seconds / seconds,
            peers={name: median(times) * 1e6 for name, times in samples.items()},
            notes=notes,
        )


def calls(run: Function, sets: list[tuple[Any, ...]], num_calls: int) -> list[Callable[[], Any]]:
    """num_calls calls, rounded up to whole rounds over the sets."""
    num_rounds = -(-num_calls // len(sets))
    return [partial(run, *inputs) for inputs in sets] * num_rounds


def _record_peers(
    peers: Mapping[str, Function], sets: list[tuple[Any, ...]], wanted: Any, tolerance: float
) -> tuple[dict[str, Replay], list[str]]:
    """The peers' replays, and notes on those that have none."""
    replays, notes = {}, []
    for name, run in peers.items():
        try:
            check(run(*sets[0]), wanted, tolerance)
            num_calls = choose_num_calls(rough_seconds(partial(run, *sets[0])))
            replays[name] = Replay(calls(run, sets[:num_calls], num_calls))
        except Exception as error:  # libraries raise various types for a shape that they do not support
            if name == "torch" and isinstance(error, AssertionError):
                raise  # plain PyTorch is right, so its inputs were changed
            reason = (str(error).strip() or "?").splitlines()[0]
            notes.append(f"{name}: {type(error).__name__}: {reason[:150]}")
    return replays, notes


def check(actual: Any, wanted: Any, tolerance: float) -> None:
    """Raise AssertionError unless tensors agree: integers exactly, floats by the norm of the difference. Not NaN."""
    for got, want in zip(_tensors(actual), _tensors(wanted), strict=True):
        assert got.shape == want.shape, f"shape {list(got.shape)}, not {list(want.shape)}"
        if not got.is_floating_point():
            num_other = int((got != want).sum())
            assert num_other == 0, f"{num_other} of {got.numel()} integers differ"
            continue
        difference = (got.double() - want.double()).norm()
        error = float(difference / want.double().norm())
        assert error <= tolerance, f"relative error {error:.2e}, above {tolerance:.0e}"


def _tensors(outputs: Any) -> Iterable[torch.Tensor]:
    return (outputs,) if isinstance(outputs, torch.Tensor) else outputs
