"""LLMEngine: requests in, outputs out; the one place where engine (decides) and worker (computes) meet.

All entry points are in this one file because they share the requests under way and the lock around them.
"""

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

from nanovllm.config import Config, accept_nano_vllm_names
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.chat import TWO_BOS_WARNING, begins_with_two_bos, chat_prompts
from nanovllm.engine.fair_lock import FairLock
from nanovllm.engine.input_processor import as_params_list, as_prompt_list, as_token_ids, request_seed
from nanovllm.engine.request_state import RequestState
from nanovllm.engine.scheduler import ScheduledBatch, Scheduler
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.engine.throughput import GenerationProgress
from nanovllm.engine.tokenizer import load_tokenizer
from nanovllm.model_path import local_model_dir
from nanovllm.models.registry import load_model_config
from nanovllm.outputs import RequestOutput, StepOutput, StreamOutput
from nanovllm.sampling_params import SamplingParams

T = TypeVar("T")
NOTHING = ScheduledBatch(False, (), (), ())
logger = logging.getLogger("nanovllm")


class LLMEngine:
    """An engine for one model. Use it in a `with` statement, or call close().

    model: a directory or a hub id; options: Config's fields. Raises TypeError for an unknown option, ValueError for a
    value, a model or a checkpoint that will not do; nothing is left behind then.
    A text ends at the ids at which transformers' generate ends it (ModelConfig.eos_token_ids) and at the tokenizer's
    end-of-sequence token, as in vLLM; SamplingParams.ignore_eos turns both off.

    Threads: every method may be called by several threads at once. Steps are computed one after the other; a step
    computes the requests of all threads together, and each call gets the whole output of its own requests. When a step
    fails, the exception is raised in the thread that computed it, and the requests of other calls are computed again.
    A call gets a RuntimeError that names the cause when its requests are lost: another thread closes the engine, or a
    step fails with several ranks, or while its tokens are taken in. `tokenizer` is used by the engine as well: a thread
    that calls it with truncation or padding may get the library's "Already borrowed".

    Processes: an engine belongs to the process that made it. In a forked child its methods raise RuntimeError, and
    close() does nothing.
    """

    def __init__(self, model: str, **options: Any) -> None:
        self._executor: Any = None
        self._pid = os.getpid()
        self._lock = FairLock()  # held while a step is computed, and while anything below changes; never across a yield
        self._tokenizer_lock = threading.Lock()
        config = Config(model, **accept_nano_vllm_names(options))
        model_dir = local_model_dir(config.model)
        model_config = load_model_config(model_dir)
        model_config.check_tensor_parallel_size(config.tensor_parallel_size)  # before anything is started
        self.config = replace(config, max_model_len=min(config.max_model_len, model_config.max_supported_len))
        self.tokenizer = load_tokenizer(model_dir, model_config)
        self.vocab_size = model_config.vocab_size

        from nanovllm.executor.base import make_executor  # imports torch, which `import nanovllm` must not

        self._executor = make_executor(self.config, model_config, model_dir)
        if self.config.async_scheduling is None:
            self.config = replace(self.config, async_scheduling=self._executor.supports_async_scheduling)
        tokenizer_eos = getattr(self.tokenizer, "eos_token_id", None)
        self.scheduler = Scheduler(
            BlockManager(self._executor.num_kv_cache_blocks, config.kv_cache_block_size),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=self.config.max_model_len,
            max_supported_len=model_config.max_supported_len,
            eos_token_ids=model_config.eos_token_ids | ({tokenizer_eos} if tokenizer_eos is not None else set()),
        )
        self._ahead: Any = None  # AsyncModelOutput of the step after the current one
        self._requests: dict[int, RequestState] = {}
        self._news: dict[int, list[RequestState]] = {}  # seq_id -> those of the same generate call that got a token
        self._left: deque[RequestState] = deque()  # their generate calls have ended
        self._lost: dict[int, str] = {}  # seq_id -> why its call gets no output
        self._num_arrivals = 0
        self._why_closed = ""
        self._has_warned_of_two_bos = False

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
        with progress, closing(self._run(requests, lambda request: request.sequence)) as steps:
            for batch, sequences in steps:
                progress.add(batch, sequences)
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

    def _stream(self, requests: list[RequestState]) -> Iterator[StreamOutput]:
        with closing(self._run(requests, RequestState.next_stream_output)) as steps:
            for _, items in steps:
                yield from items
        for request in requests:
            if not request.is_stream_finished:  # aborted between steps
                yield request.next_stream_output()

    def _run(
        self, requests: list[RequestState], take: Callable[[RequestState], T]
    ) -> Generator[tuple[ScheduledBatch, list[T]], None, None]:
        """Step until `requests` are finished; yields each step, and what `take` returns of those with new tokens.

        When steps of other threads have brought tokens, they are yielded at once, with an empty batch. `requests` leave
        the engine at the end, or aborted when this stops early.
        """
        news: list[RequestState] = []
        unfinished = requests[::-1]
        try:
            self._check_process()
            with self._lock:
                for request in requests:
                    self._enqueue(request)
                    self._news[request.sequence.seq_id] = news
            while True:
                self._check_process()
                with self._lock:
                    self._check_not_lost(requests)
                    while unfinished and unfinished[-1].sequence.is_finished:
                        unfinished.pop()
                    if not unfinished and not news:
                        break
                    batch = NOTHING if news else self._advance()
                    taken = [take(request) for request in dict.fromkeys(news) if not _is_aborted(request)]
                    news.clear()
                yield batch, taken
        finally:
            self._left.extend(requests)
            # The garbage collector may run this anywhere, inside a step too: waiting for the lock could wait for ever.
            if self._is_own_process and self._lock.try_acquire():
                try:
                    self._forget_left()
                finally:
                    self._lock.__exit__()

    # --- chat ---

    def chat(
        self,
        messages: list[Any],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[Any] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Generate the next message of one conversation, or of each in a list of conversations.

        messages: a list of dicts with "role" and "content" (each a str), or a list of such lists. The model's chat
            template renders them, special tokens included; no other special tokens are added.
        chat_template: a Jinja template in place of the model's.
        add_generation_prompt: the prompt ends where the assistant's message begins.
        continue_final_message: the last message stays open and the model continues it; needs
            add_generation_prompt=False.
        tools: JSON schemas or functions that the template offers to the model.
        chat_template_kwargs: further variables of the template, for example {"enable_thinking": False}.
        Raises ValueError for messages that the template cannot render, and as generate.
        """
        options = (chat_template, add_generation_prompt, continue_final_message, tools, chat_template_kwargs)
        return self.generate(self._chat_prompts(messages, *options), sampling_params, use_tqdm)

    def chat_stream(
        self,
        messages: list[Any],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[Any] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> Iterator[StreamOutput]:
        """As chat, but yields each message's text and tokens as they are produced. See generate_stream."""
        options = (chat_template, add_generation_prompt, continue_final_message, tools, chat_template_kwargs)
        return self.generate_stream(self._chat_prompts(messages, *options), sampling_params)

    def _chat_prompts(self, messages: list[Any], *options: Any) -> list[list[int]]:
        self._check_open()
        with self._tokenizer_lock:
            return chat_prompts(self.tokenizer, messages, *options)

    # --- step by step ---

    def add_request(self, prompt: str | list[int], sampling_params: SamplingParams | None = None) -> int:
        """Queue one prompt and return its seq_id; step() computes it. Raises ValueError as generate."""
        (request,) = self._make_requests([prompt], sampling_params, is_streamed=False)
        request.index = None
        with self._lock:
            self._enqueue(request)
        return request.sequence.seq_id

    def step(self) -> StepOutput:
        """Compute one step. Outputs of requests from add_request are handed out here, once.

        When computing fails, the exception passes through, the requests from add_request in that step end with
        finish_reason "abort", and the others go on (with one rank; with several, the engine is closed).
        """
        self._check_process()
        with self._lock:
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
        self._check_process()
        with self._lock:
            return self.scheduler.abort(seq_id)

    def is_finished(self) -> bool:
        """Whether no request is waiting, running, or finished with its output still to be handed out."""
        self._check_process()
        with self._lock:
            self._forget_left()
            return not self._requests

    def _advance(self) -> ScheduledBatch:
        """Schedule, compute and take in one step; with async_scheduling, the next one is begun meanwhile."""
        self._check_open()
        self._forget_left()
        launched, batch = self._next_batch()
        if batch.is_empty:
            if not self.scheduler.is_finished:
                raise RuntimeError("nothing can be scheduled although requests wait: please report this as a bug")
            return batch
        is_computed = False
        try:
            token_ids = (
                self._execute_async(batch, launched) if self.config.async_scheduling else self._executor.run(batch)
            )
            is_computed = True
            self._process_tokens(batch, token_ids)
        except BaseException as error:
            self._end_failed_step(batch, error, is_computed)
            raise
        return batch

    def _process_tokens(self, batch: ScheduledBatch, token_ids: list[int]) -> None:
        """Append the new tokens, end what they end, and tell the calls that wait for them."""
        self.scheduler.postprocess(batch, token_ids)
        for seq in batch.sampled_sequences:
            if seq.finish_reason == "abort":  # while it was computed: it has no new token
                continue
            request = self._requests[seq.seq_id]
            is_stopped = request.process_new_token()
            if is_stopped and not seq.is_finished:
                self.scheduler.finish(seq, "stop")
            elif is_stopped:
                seq.finish_reason = "stop"  # the stop string goes before max_tokens
            if request.index is not None:
                self._news[seq.seq_id].append(request)

    def _end_failed_step(self, batch: ScheduledBatch, error: BaseException, is_computed: bool) -> None:
        """Requests from add_request end, those of generate calls are computed again: nothing of them was cached.

        Once the step is computed, the text of a request may lack its token: then its call is told.
        """
        for seq in batch.sequences:
            request = self._requests.get(seq.seq_id)
            if request is None or request.index is None:
                self.scheduler.abort(seq.seq_id)
            elif is_computed and seq in batch.sampled_sequences:
                self._lose(request, f"a step of another call failed: {_one_line(error)}; call generate again")
        if self._executor is not None and self._executor.is_closed:
            self._why_closed = f", since a step failed: {_one_line(error)}"
        while any(seq.status is SequenceStatus.RUNNING for seq in batch.sequences):
            self.scheduler.preempt(self.scheduler.running[-1])  # from the last on: arrivals stay in order

    def _next_batch(self) -> tuple[Any, ScheduledBatch]:
        """The step to take in next, and its AsyncModelOutput if it has been begun."""
        launched, self._ahead = self._ahead, None
        if launched is not None:
            batch = self.scheduler.commit_async_batch(launched.batch)
            if not batch.is_empty:
                return launched, batch
        return None, self.scheduler.schedule()

    def _execute_async(self, batch: ScheduledBatch, launched: Any) -> list[int]:
        """The new tokens of `batch`. The step after it is begun before they are waited for, if it is known by then."""
        launched = launched or self._executor.execute(batch)
        ahead = self.scheduler.schedule_next_async(batch)
        if ahead is not None:
            self._ahead = self._executor.execute(ahead, launched)
        tokens = dict(zip(launched.batch.sampled_sequences, launched.token_ids(), strict=True))
        return [tokens[seq] for seq in batch.sampled_sequences]  # without those of sequences that had ended

    # --- requests ---

    def _make_requests(self, prompts: list[Any], sampling_params: Any, is_streamed: bool) -> list[RequestState]:
        """Checked requests, not queued yet. Raises ValueError that names the prompt's index."""
        self._check_process()
        self._check_open()
        params_list = as_params_list(sampling_params, len(prompts))
        requests = []
        for index, (prompt, params) in enumerate(zip(prompts, params_list, strict=True)):
            try:
                seq = self._make_sequence(prompt, params)
            except ValueError as error:
                raise ValueError(f"prompt {index}: {error}") from error
            requests.append(RequestState(seq, self.tokenizer, index, is_streamed))
        with self._lock:  # not before: other threads' steps go on while prompts are tokenized
            for request in requests:
                self._number(request.sequence)
        return requests

    def _make_sequence(self, prompt: Any, params: SamplingParams) -> Sequence:
        with self._tokenizer_lock if isinstance(prompt, str) else nullcontext():
            token_ids = as_token_ids(prompt, self.tokenizer, self.vocab_size)
            if not self._has_warned_of_two_bos and begins_with_two_bos(prompt, token_ids, self.tokenizer):
                self._has_warned_of_two_bos = True
                logger.warning(TWO_BOS_WARNING, self.tokenizer.bos_token)
        if params.stop and self.tokenizer is None:
            raise ValueError(f"stop strings need a tokenizer and the model has none, got stop={params.stop!r}")
        seq = Sequence(token_ids, params, block_size=self.config.kv_cache_block_size)
        self.scheduler.validate_request(seq)
        return seq

    def _number(self, seq: Sequence) -> None:
        """The sequence's id, and the seed that follows from it or from its parameters."""
        seq.seq_id, seed = self._num_arrivals, seq.sampling_params.seed
        seq.seed = request_seed(self.config.seed, seq.seq_id) if seed is None else seed
        self._num_arrivals += 1

    def _enqueue(self, request: RequestState) -> None:
        self._check_open()
        self.scheduler.add(request.sequence)
        self._requests[request.sequence.seq_id] = request

    def _forget_left(self) -> None:
        """Requests whose generate calls have ended leave the engine, aborted unless they are finished."""
        while self._left:
            seq = self._left.popleft().sequence
            if not seq.is_finished:
                self.scheduler.abort(seq.seq_id)
            for by_id in (self._requests, self._news, self._lost):
                by_id.pop(seq.seq_id, None)

    def _lose(self, request: RequestState, reason: str) -> None:
        """End a generate call's request; the call raises RuntimeError with `reason`."""
        self.scheduler.abort(request.sequence.seq_id)
        self._lost[request.sequence.seq_id] = reason

    def _check_not_lost(self, requests: list[RequestState]) -> None:
        if self._lost:
            for request in requests:
                if request.sequence.seq_id in self._lost:
                    raise RuntimeError(self._lost[request.sequence.seq_id])

    # --- the end ---

    def close(self) -> None:
        """Abort what is under way and give memory and processes back. May be called twice, and after a failure.

        Calls of generate in other threads raise RuntimeError. Waits for the step that another thread computes.
        """
        if not self._is_own_process:
            return
        with self._lock:
            if self._executor is None:
                return
            executor, self._executor = self._executor, None
            for request in self._requests.values():
                if request.sequence.is_finished:
                    continue
                if request.index is None:
                    self.scheduler.abort(request.sequence.seq_id)
                else:
                    self._lose(request, self._closed_message)
            self._requests.clear()
            self._ahead = None
            executor.close()

    @property
    def _is_own_process(self) -> bool:
        return os.getpid() == self._pid

    @property
    def _closed_message(self) -> str:
        return f"this engine is closed: make a new one{self._why_closed}"

    def _check_open(self) -> None:
        if self._executor is None or self._executor.is_closed:
            raise RuntimeError(self._closed_message)

    def _check_process(self) -> None:
        """Before the lock: in a forked process a thread that is not there may hold it."""
        if not self._is_own_process:
            raise RuntimeError(
                f"this engine belongs to process {self._pid}, and this is process {os.getpid()}, forked from it: "
                "make a new engine in the child"
            )

    def __enter__(self) -> "LLMEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _is_aborted(request: RequestState) -> bool:
    return request.sequence.finish_reason == "abort"


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
