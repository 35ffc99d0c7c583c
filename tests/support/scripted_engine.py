"""ScriptedEngine: an engine without a model, whose clock advances by a second at each step."""

from types import SimpleNamespace
from typing import Any

from nanovllm.outputs import StepOutput
from nanovllm.sampling_params import SamplingParams


class ScriptedEngine:
    """Each step gives one token to each of the first max_num_seqs unfinished requests, and takes a second.

    now: seconds; clock() and sleep() use it. added: (prompt, params, time) of each request, in order. slept: seconds of
    each sleep. scheduler.running: the requests that got a token and are not finished, as LLM.scheduler has them.
    """

    vocab_size = 10**6

    def __init__(self, max_num_seqs: int = 10**6) -> None:
        self.max_num_seqs = max_num_seqs
        self.now = 0.0
        self.added: list[tuple[list[int], SamplingParams, float]] = []
        self.slept: list[float] = []
        self.scheduler = SimpleNamespace(running=[])
        self._requests: list[Any] = []

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def add_request(self, prompt: list[int], params: SamplingParams) -> int:
        seq_id = len(self.added)
        self.added.append((prompt, params, self.now))
        self._requests.append(SimpleNamespace(seq_id=seq_id, num_completion_tokens=0, max_tokens=params.max_tokens))
        return seq_id

    def step(self) -> StepOutput:
        assert self._requests, "a step without a request"
        self.now += 1.0
        computed = self._requests[: self.max_num_seqs]
        for request in computed:
            request.num_completion_tokens += 1
        finished = [request for request in computed if request.num_completion_tokens == request.max_tokens]
        self._requests = [request for request in self._requests if request not in finished]
        self.scheduler.running = [request for request in computed if request not in finished]
        outputs: Any = [{"seq_id": request.seq_id, "token_ids": [0] * request.max_tokens} for request in finished]
        return StepOutput(tuple(outputs), num_prefill_tokens=0, num_decode_tokens=len(computed))
