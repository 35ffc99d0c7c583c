"""LLMEngine: requests in, outputs out; the methods that users call, and the lock that serialises steps."""

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any, TypeVar

from nanovllm.config import Config, accept_nano_vllm_names
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.engine_core import EngineCore
from nanovllm.engine.fair_lock import FairLock
from nanovllm.engine.input_processor import InputProcessor, Prompt, as_prompt_list
from nanovllm.engine.request_registry import RequestOwner
from nanovllm.engine.request_state import RequestState
from nanovllm.engine.scheduler import ScheduledBatch, Scheduler
from nanovllm.engine.throughput import GenerationProgress
from nanovllm.engine.tokenizer import load_tokenizer
from nanovllm.executor.base import make_executor
from nanovllm.model_path import local_model_dir
from nanovllm.models.registry import load_model_config
from nanovllm.outputs import RequestOutput, StepOutput, StreamOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.validation import require_int

T = TypeVar("T")
EMPTY_BATCH = ScheduledBatch(False, (), (), ())


class LLMEngine:
    """An engine for one model. Use it in a `with` statement, or call close().

    model: a directory or a hub id; options: Config's fields. Raises TypeError for an unknown option, and ValueError for
    a value, a model or a checkpoint that cannot be used; nothing is left behind then.
    A text ends at the token ids at which transformers' generate ends it (ModelConfig.eos_token_ids) and at the
    tokenizer's end-of-sequence token, as in vLLM; SamplingParams.ignore_eos turns both off.

    Threads: several threads may call any method at once. The engine computes one step at a time; a step computes the
    requests of all threads together, and each call gets the whole output of its own requests. When a step fails, the
    thread that computed it gets the exception, and the requests of other calls are computed again. A call whose
    requests are lost raises a RuntimeError that names the cause: another thread closed the engine, or a step failed
    with several ranks or while its tokens were processed. The outputs of add_request go to whichever thread calls
    step() next. `tokenizer` is the one that the engine uses: a thread that calls it with truncation or padding may get
    the library's error "Already borrowed".

    Processes: an engine belongs to the process that made it. In a forked child its methods raise RuntimeError, and
    close() does nothing.
    """

    def __init__(self, model: str, **options: Any) -> None:
        self._pid = os.getpid()
        self._lock = FairLock()  # held during a step, and while anything below changes; never across a yield
        config = Config(model, **accept_nano_vllm_names(options))
        model_dir = local_model_dir(config.model)
        model_config = load_model_config(model_dir)
        model_config.check_tensor_parallel_size(config.tensor_parallel_size)  # before any process is started
        self.config = replace(config, max_model_len=min(config.max_model_len, model_config.max_supported_len))
        self.tokenizer = load_tokenizer(model_dir, model_config)
        self.vocab_size = model_config.vocab_size
        executor = make_executor(self.config, model_config, model_dir, owner=self)
        self.config = replace(self.config, kv_cache_block_size=executor.kv_cache_block_size)
        if self.config.async_scheduling is None:
            self.config = replace(self.config, async_scheduling=executor.supports_async_scheduling)
        tokenizer_eos = getattr(self.tokenizer, "eos_token_id", None)
        self.scheduler = Scheduler(
            BlockManager(executor.num_kv_cache_blocks, executor.kv_cache_block_size),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=self.config.max_model_len,
            max_supported_len=model_config.max_supported_len,
            eos_token_ids=model_config.eos_token_ids | ({tokenizer_eos} if tokenizer_eos is not None else set()),
        )
        self._input_processor = InputProcessor(
            self.config, self.tokenizer, self.vocab_size, self.scheduler.validate_request
        )
        self._core = EngineCore(self.scheduler, executor, bool(self.config.async_scheduling))
        self._requests = self._core.requests

    # --- whole prompts ---

    def generate(
        self,
        prompts: str | list[str] | list[list[int]],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Generate from all prompts. Returns the outputs in the order of the prompts.

        A str, or one list of token ids, is one prompt. sampling_params is one for all prompts, or a list with one for
        each. Raises ValueError, naming the prompt's index, before anything is computed. Any later exception, including
        KeyboardInterrupt, aborts these prompts. The engine stays usable, but with several ranks an exception within a
        step closes it.
        """
        requests = self._make_requests(as_prompt_list(prompts), sampling_params)
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

        Prompts are checked at the call, and queued when the first item is asked for. Closing the iterator aborts the
        unfinished prompts.
        """
        return self._stream(self._make_requests(as_prompt_list(prompts), sampling_params))

    def _stream(self, requests: list[RequestState]) -> Iterator[StreamOutput]:
        with closing(self._run(requests, RequestState.next_stream_output)) as steps:
            for _, items in steps:
                yield from items
        for request in requests:
            if not request.is_stream_finished:  # aborted between steps
                yield request.next_stream_output()

    def _run(
        self, requests: list[RequestState], collect: Callable[[RequestState], T]
    ) -> Generator[tuple[ScheduledBatch, list[T]], None, None]:
        """Step until `requests` are finished. Yields each step, and `collect` of each request with new tokens.

        Tokens that steps of other threads have brought are yielded at once, with an empty batch. At the end, and when
        the generator is closed early, `requests` leave the engine; unfinished ones are aborted.
        """
        call = RequestOwner("call generate again", requests)
        try:
            self._check_process()
            with self._lock:
                for request in requests:
                    self._core.enqueue(request, call)
            while True:
                self._check_process()
                with self._lock:
                    call.raise_error()
                    if call.is_finished:
                        break
                    batch = EMPTY_BATCH if call.updated else self._core.advance(call)
                    items = [collect(request) for request in call.take_updates()]
                yield batch, items
        finally:
            self._requests.end_call(call)
            # The garbage collector may run this in a thread that is inside a step: waiting for the lock could deadlock.
            if self._is_own_process and self._lock.try_acquire():
                try:
                    self._core.remove_ended()
                finally:
                    self._lock.release()

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
        add_generation_prompt: whether the prompt ends with the beginning of the assistant's message.
        continue_final_message: whether the model continues the last message; needs add_generation_prompt=False.
        tools: JSON schemas or functions that the template offers to the model.
        chat_template_kwargs: further variables of the template, for example {"enable_thinking": False}.
        Raises ValueError for messages that the template cannot render, and the errors of generate.
        """
        options = (chat_template, add_generation_prompt, continue_final_message, tools, chat_template_kwargs)
        self._check_usable()
        return self.generate(self._input_processor.chat_prompts(messages, *options), sampling_params, use_tqdm)

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
        self._check_usable()
        return self.generate_stream(self._input_processor.chat_prompts(messages, *options), sampling_params)

    # --- step by step ---

    def add_request(self, prompt: str | list[int], sampling_params: SamplingParams | None = None) -> int:
        """Queue one prompt and return its seq_id; step() computes it. Raises ValueError as generate."""
        (request,) = self._make_requests([prompt], sampling_params)
        with self._lock:
            self._core.enqueue(request, self._requests.step_owner)
        return request.sequence.seq_id

    def step(self) -> StepOutput:
        """Compute one step. Returns each output of a request from add_request once.

        When the step fails, the exception is raised here, and the requests from add_request in that step end with
        finish_reason "abort"; others are computed again. With several ranks, the engine is closed.
        Raises RuntimeError once when the step of a generate call has failed in a way that loses such requests; their
        outputs, with finish_reason "abort", follow.
        """
        self._check_process()
        with self._lock:
            self._requests.step_owner.raise_error()
            batch = self._core.advance(self._requests.step_owner)
            finished = self._requests.pop_finished()
        num_tokens = batch.num_tokens
        return StepOutput(
            finished=tuple(request.output() for request in finished),
            num_prefill_tokens=num_tokens if batch.is_prefill else 0,
            num_decode_tokens=0 if batch.is_prefill else num_tokens,
        )

    def abort(self, seq_id: int) -> bool:
        """End a request. Its output, with finish_reason "abort", is returned like any other.

        Returns False if no waiting or running request has this id. Raises ValueError for what is no id.
        """
        self._check_process()
        require_int("seq_id", seq_id, 0, remedy="give the id that add_request or an item of a stream has")
        with self._lock:
            return self.scheduler.abort(seq_id)

    def is_finished(self) -> bool:
        """Whether no request is waiting, running, or finished with its output still to be returned."""
        self._check_process()
        with self._lock:
            self._core.remove_ended()
            return self._requests.is_empty

    # --- requests ---

    def _make_requests(
        self, prompts: list[Prompt], sampling_params: SamplingParams | list[SamplingParams] | None
    ) -> list[RequestState]:
        self._check_usable()
        return self._input_processor.make_requests(prompts, sampling_params)

    # --- close ---

    def close(self) -> None:
        """Abort all requests and free memory and processes. May be called twice, and after a failure.

        Waits for a step that another thread computes. Calls of generate in other threads raise RuntimeError.
        """
        if not self._is_own_process:
            return
        with self._lock:
            self._core.close()

    @property
    def _is_own_process(self) -> bool:
        return os.getpid() == self._pid

    def _check_process(self) -> None:
        """Raise RuntimeError in a forked child. Must come before the lock: no thread of the child may hold it."""
        if not self._is_own_process:
            raise RuntimeError(
                f"this engine belongs to process {self._pid}, and this is process {os.getpid()}, forked from it: "
                "make a new engine in the child"
            )

    def _check_usable(self) -> None:
        """Raise RuntimeError in a forked child, and when the engine is closed."""
        self._check_process()
        self._core.check_open()

    def __enter__(self) -> "LLMEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
