"""Times of work on the GPU: replays of a CUDA graph between two events, with none of its data in the L2 cache.

A graph holds many calls, each with inputs and outputs of its own. Before each replay a buffer larger than the L2 is
read, so that small inputs are cold too. The host's time for launches is not part of a replay.
"""

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

BYTES_BEYOND_L2 = 256 * 2**20
TARGET_SECONDS = 1e-3  # of a replay: a thousand times what events can tell apart
MAX_CALLS = 64
LAUNCH_SECONDS = 2e-4

_seconds_on_device = 0.0


def device_clock() -> float:
    """pytest-benchmark's timer: it advances only by the time of one call that a Replay measured."""
    return _seconds_on_device


class Replay:
    """`calls` recorded in one graph, in order. Raises what they raise, and RuntimeError if they cannot be recorded."""

    def __init__(self, calls: Sequence[Callable[[], Any]]) -> None:
        self._num_calls = len(calls)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles, and makes the libraries' handles
            calls[0]()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = [call() for call in calls]  # alive, so that no two share memory
        self._start = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)

    def seconds(self) -> float:
        """Seconds of one call: the mean over the calls of the graph."""
        read_beyond_l2()
        self._start.record()
        self._graph.replay()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) * 1e-3 / self._num_calls

    def tick(self) -> None:
        """Replay, and advance device_clock by the time of one call."""
        global _seconds_on_device
        _seconds_on_device += self.seconds()


def read_beyond_l2() -> None:
    """Fill the L2 with something else, by reading: written lines would be written back during what comes next."""
    torch.max(_filler())


_fillers: list[torch.Tensor] = []


def _filler() -> torch.Tensor:
    if not _fillers:
        _fillers.append(torch.randint(0, 100, (BYTES_BEYOND_L2 // 4,), dtype=torch.int32, device="cuda"))
    return _fillers[0]


def rough_seconds(call: Callable[[], Any]) -> float:
    """Seconds of one call, launches included; good enough to choose how many calls a graph gets."""
    times = []
    for _ in range(4):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return median(times[1:])


def choose_num_calls(rough: float, floor: float = 0.0) -> int:
    """How many calls make a replay of about TARGET_SECONDS; at least 2, so that none finds its own inputs in the L2.

    rough: rough_seconds of a call, which below LAUNCH_SECONDS may be all launching; floor: what a call takes at least.
    """
    seconds = rough if rough > LAUNCH_SECONDS else max(floor, TARGET_SECONDS / MAX_CALLS)
    return max(2, min(MAX_CALLS, round(TARGET_SECONDS / seconds)))


def choose_num_sets(bytes_per_set: int, num_calls: int) -> int:
    """How many sets of buffers the calls take turns on: one each, or as many as exceed the L2 in sum; at least 2."""
    return max(2, min(num_calls, -(-BYTES_BEYOND_L2 // max(bytes_per_set, 1))))
