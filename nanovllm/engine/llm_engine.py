"""LLMEngine: requests in, outputs out; the one place where engine (decides) and worker (computes) meet."""

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

from nanovllm.config import Config
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.inputs import as_params_list, as_prompt_list, as_token_ids, request_seed
from nanovllm.engine.request import Request
from nanovllm.engine.scheduler import ScheduledBatch, Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.throughput import GenerationProgress
from nanovllm.engine.tokenizer import load_tokenizer
from nanovllm.model_config import load_model_config
from nanovllm.model_path import local_model_dir
from nanovllm.outputs import RequestOutput, StepOutput, StreamOutput
from nanovllm.sampling_params import SamplingParams


class LLMEngine:
    """An engine for one model. Use it in a `with` statement, or call close().

    model: a directory or a hub id; options: Config's fields. Raises TypeError for an unknown option, ValueError for a
    value, a model or a checkpoint that will not do; nothing is left behind then.
    """

    def __init__(self, model: str, **options: Any) -> None:
        self._executor: Any = None
        config = Config(model, **options)
        model_dir = local_model_dir(config.model)
        model_config = load_model_config(model_dir)
        model_config.check_tensor_parallel_size(config.tensor_parallel_size)  # before anything is started
        self.config = replace(config, max_model_len=min(config.max_model_len, model_config.max_supported_len))
        self.tokenizer = load_tokenizer(model_dir)
        self.vocab_size = model_config.vocab_size

        from nanovllm.worker.executor import Executor  # imports torch, which `import nanovllm` must not

        self._executor = Executor(self.config, model_config, model_dir)
        if self.config.async_scheduling is None:
            self.config = replace(self.config, async_scheduling=self._executor.can_go_ahead)
        tokenizer_eos = getattr(self.tokenizer, "eos_token_id", None)
        self.scheduler = Scheduler(
            BlockManager(self._executor.num_kv_cache_blocks, config.kv_cache_block_size),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=self.config.max_model_len,
            max_supported_len=model_config.max_supported_len,
            eos_token_ids=model_config.eos_token_ids | ({tokenizer_eos} if tokenizer_eos is not None else set()),
        )
        self._ahead: Any = None  # LaunchedStep of the step after the current one
        self._requests: dict[int, Request] = {}
        self._num_arrivals = 0

    # --- whole prompts ---

    def generate(
        self,
        prompts: str | list[str] | list[list[int]],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Generate from all prompts; outputs are in the order of the prompts.

        A str, or one list of token ids, is one prompt. sampling_params is one for all, or a list with one for each.
        Raises ValueError, naming the prompt's index, before anything is computed. An exception on the way (Ctrl-C
        too) aborts these prompts; the engine stays usable, unless it has several ranks and the exception came in the
        middle of a step: then it is closed.
        """
        requests = self._make_requests(as_prompt_list(prompts), sampling_params, is_streamed=False)
        progress = GenerationProgress(requests, self.config.max_model_len, is_shown=use_tqdm)
        with progress, closing(self._run(requests)) as steps:
            for batch, advanced in steps:
                progress.add(batch, advanced)
            progress.finish()
        return [request.output() for request in requests]

    def generate_stream(
        self,
        prompts: str | list[str] | list[list[int]],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
    ) -> Iterator[StreamOutput]:
        """As generate, but yields each prompt's text and tokens as they are produced.

        Prompts are checked at the call, and queued when the first item is asked for. Closing the iterator early
        aborts what is left.
        """
        return self._stream(self._make_requests(as_prompt_list(prompts), sampling_params, is_streamed=True))

    def _stream(self, requests: list[Request]) -> Iterator[StreamOutput]:
        with closing(self._run(requests)) as steps:
            for _, advanced in steps:
                for request in advanced:
                    yield request.take_stream_output()
        for request in requests:
            if not request.is_stream_over:  # aborted between steps
                yield request.take_stream_output()

    def _run(self, requests: list[Request]) -> Generator[tuple[ScheduledBatch, list[Request]], None, None]:
        """Step until `requests` are finished; yields each step and those of them that got a token in it.

        They leave the engine at the end, or aborted when this stops early.
        """
        own = {request.sequence.seq_id for request in requests}
        unfinished = requests[::-1]
        try:
            for request in requests:
                self._enqueue(request)
            while unfinished:
                if unfinished[-1].sequence.is_finished:
                    unfinished.pop()
                    continue
                batch = self._advance()
                advanced = [self._requests[seq.seq_id] for seq in batch.sampled_sequences if seq.seq_id in own]
                yield batch, [request for request in advanced if request.sequence.finish_reason != "abort"]
        finally:
            for request in requests:
                if not request.sequence.is_finished:
                    self.abort(request.sequence.seq_id)
                self._requests.pop(request.sequence.seq_id, None)

    # --- step by step ---

    def add_request(self, prompt: str | list[int], sampling_params: SamplingParams | None = None) -> int:
        """Queue one prompt and return its seq_id; step() computes it. Raises ValueError as generate."""
        (request,) = self._make_requests([prompt], sampling_params, is_streamed=False)
        request.index = None
        self._enqueue(request)
        return request.sequence.seq_id

    def step(self) -> StepOutput:
        """Compute one step. Outputs of requests from add_request are handed out here, once.

        When computing fails, the exception passes through, the requests of that step end with finish_reason "abort",
        and the others go on (with one rank; with several, the engine is closed).
        """
        batch = self._advance()
        finished = [r for r in self._requests.values() if r.index is None and r.sequence.is_finished]
        for request in finished:
            del self._requests[request.sequence.seq_id]
        num_tokens = batch.num_tokens
        return StepOutput(
            finished=tuple(request.output() for request in finished),
            num_prefill_tokens=num_tokens if batch.is_prefill else 0,
            num_decode_tokens=0 if batch.is_prefill else num_tokens,
        )

    def abort(self, seq_id: int) -> bool:
        """End a request; its output, with finish_reason "abort", comes as any other. False if it is not under way."""
        return self.scheduler.abort(seq_id)

    def is_finished(self) -> bool:
        """Whether no request is waiting, running, or finished with its output still to be handed out."""
        return not self._requests

    def _advance(self) -> ScheduledBatch:
        """Schedule, compute and take in one step; with async_scheduling, the next one is begun meanwhile."""
        self._check_open()
        launched, batch = self._take_up()
        if batch.is_empty:
            if not self.scheduler.is_finished:
                raise RuntimeError("nothing can be scheduled although requests wait: please report this as a bug")
            return batch
        try:
            token_ids = (
                self._compute_ahead(batch, launched) if self.config.async_scheduling else self._executor.run(batch)
            )
        except BaseException:
            for seq in batch.sequences:  # their keys and values are in doubt; nothing of them was cached
                self.abort(seq.seq_id)
            raise
        self.scheduler.postprocess(batch, token_ids)
        for seq in batch.sampled_sequences:
            if seq.finish_reason == "abort":  # while it was computed: it has no new token
                continue
            is_stopped = self._requests[seq.seq_id].take_in_token()
            if is_stopped and not seq.is_finished:
                self.scheduler.finish(seq, "stop")
            elif is_stopped:
                seq.finish_reason = "stop"  # the stop string goes before max_tokens
        return batch

    def _take_up(self) -> tuple[Any, ScheduledBatch]:
        """The step to take in next, and its LaunchedStep if it has been begun."""
        launched, self._ahead = self._ahead, None
        if launched is not None:
            batch = self.scheduler.take_up(launched.batch)
            if not batch.is_empty:
                return launched, batch
        return None, self.scheduler.schedule()

    def _compute_ahead(self, batch: ScheduledBatch, launched: Any) -> list[int]:
        """The new tokens of `batch`. The step after it is begun before they are waited for, if it is known by then."""
        launched = launched or self._executor.launch(batch)
        ahead = self.scheduler.schedule_ahead(batch)
        if ahead is not None:
            self._ahead = self._executor.launch(ahead, launched)
        tokens = dict(zip(launched.batch.sampled_sequences, launched.token_ids(), strict=True))
        return [tokens[seq] for seq in batch.sampled_sequences]  # without those of sequences that had ended

    # --- requests ---

    def _make_requests(self, prompts: list[Any], sampling_params: Any, is_streamed: bool) -> list[Request]:
        """Checked requests, not queued yet. Raises ValueError that names the prompt's index."""
        self._check_open()
        params_list = as_params_list(sampling_params, len(prompts))
        requests = []
        for index, (prompt, params) in enumerate(zip(prompts, params_list, strict=True)):
            try:
                seq = self._make_sequence(prompt, params, arrival=self._num_arrivals + index)
            except ValueError as error:
                raise ValueError(f"prompt {index}: {error}") from error
            requests.append(Request(seq, self.tokenizer, index, is_streamed))
        self._num_arrivals += len(requests)
        return requests

    def _make_sequence(self, prompt: Any, params: SamplingParams, arrival: int) -> Sequence:
        token_ids = as_token_ids(prompt, self.tokenizer, self.vocab_size)
        if params.stop and self.tokenizer is None:
            raise ValueError(f"stop strings need a tokenizer and the model has none, got stop={params.stop!r}")
        seq = Sequence(
            token_ids,
            params,
            seq_id=arrival,
            block_size=self.config.kv_cache_block_size,
            seed=request_seed(self.config.seed, arrival) if params.seed is None else params.seed,
        )
        self.scheduler.check_fits(seq)
        return seq

    def _enqueue(self, request: Request) -> None:
        self.scheduler.add(request.sequence)
        self._requests[request.sequence.seq_id] = request

    # --- the end ---

    def close(self) -> None:
        """Abort what is under way and give memory and processes back. May be called twice, and after a failure."""
        if self._executor is None:
            return
        for seq_id in list(self._requests):
            self.abort(seq_id)
        self._requests.clear()
        self._ahead = None
        executor, self._executor = self._executor, None
        executor.close()

    def _check_open(self) -> None:
        if self._executor is None or self._executor.is_closed:
            raise RuntimeError("this engine is closed: make a new one")

    def __enter__(self) -> "LLMEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
