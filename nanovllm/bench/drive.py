"""Serves requests with add_request and step, and records when each request got its first and its last token.

The load is open-loop: a request is added at its arrival time, or when the running step ends, however long the queue is.
A slow engine does not delay later arrivals, so its queue grows as it would with real users.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nanovllm.bench.workload import Requests


@dataclass(frozen=True)
class RequestTimes:
    """One finished request. Times in seconds from the start of the run; num_tokens generated tokens.

    A token's time is the end of the step that returned it, since no caller gets it sooner.
    """

    arrival: float
    first_token: float
    finish: float
    num_tokens: int

    @property
    def time_to_first_token(self) -> float:
        """Seconds from the arrival, so waiting before the request was added counts."""
        return self.first_token - self.arrival

    @property
    def time_per_output_token(self) -> float | None:
        """Mean seconds between two tokens after the first; None for a single token."""
        return (self.finish - self.first_token) / (self.num_tokens - 1) if self.num_tokens > 1 else None


def drive(
    llm: Any,
    requests: Requests,
    arrivals: Sequence[float] | None = None,
    on_finished: Callable[[int], object] = lambda number: None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], object] = time.sleep,
) -> list[RequestTimes]:
    """Serve all requests. Returns their times in the order of the prompts.

    llm: an LLM without other requests; add_request, step and scheduler.running are used.
    arrivals: seconds from the start, ascending, one for each prompt; None adds all of them before the first step.
    on_finished: called after a step with the number of requests that it finished, if any.
    """
    prompts, params = requests
    arrivals = [0.0] * len(prompts) if arrivals is None else arrivals
    indices: dict[int, int] = {}  # seq_id -> index of the prompt, for requests in the engine
    first_tokens: dict[int, float] = {}  # by seq_id
    times: dict[int, RequestTimes] = {}  # by index
    num_added, start = 0, clock()
    while len(times) < len(prompts):
        while num_added < len(prompts) and arrivals[num_added] <= clock() - start:
            indices[llm.add_request(prompts[num_added], params[num_added])] = num_added
            num_added += 1
        if not indices:
            sleep(max(0.0, arrivals[num_added] - (clock() - start)))
            continue
        finished = llm.step().finished
        now = clock() - start
        if len(first_tokens) < len(indices):
            for seq in llm.scheduler.running:
                if seq.num_completion_tokens:
                    first_tokens.setdefault(seq.seq_id, now)
        for output in finished:
            seq_id = output["seq_id"]
            index, first = indices.pop(seq_id), first_tokens.pop(seq_id, now)
            times[index] = RequestTimes(arrivals[index], first, now, len(output["token_ids"]))
        if finished:
            on_finished(len(finished))
    return [times[index] for index in range(len(prompts))]
