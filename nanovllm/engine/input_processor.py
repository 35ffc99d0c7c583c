"""InputProcessor: prompts and parameters as the user gives them -> checked requests."""

import logging
import struct
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import xxhash

from nanovllm.config import Config
from nanovllm.engine.chat import TWO_BOS_WARNING, begins_with_two_bos, chat_prompts
from nanovllm.engine.request_state import RequestState
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.token_decoder import TokenDecoder
from nanovllm.sampling_params import SamplingParams
from nanovllm.validation import as_ints, is_int, require_unicode

Prompt = str | list[int]

logger = logging.getLogger("nanovllm")


class InputProcessor:
    """Makes RequestStates with ids and seeds. Several threads may use it at once; one of them tokenizes at a time.

    tokenizer: None if the checkpoint has none.
    validate_request: raises ValueError for a sequence that can never finish.
    num_requests: counted since construction; the next request's seq_id.
    """

    def __init__(
        self, config: Config, tokenizer: Any, vocab_size: int, validate_request: Callable[[Sequence], None]
    ) -> None:
        self.num_requests = 0
        self._config = config
        self._tokenizer = tokenizer
        self._decoder = None if tokenizer is None else TokenDecoder(tokenizer)
        self._vocab_size = vocab_size
        self._validate_request = validate_request
        self._tokenizer_lock = threading.Lock()
        self._number_lock = threading.Lock()
        self._has_warned_of_two_bos = False

    def make_requests(
        self, prompts: list[Prompt], sampling_params: SamplingParams | list[SamplingParams] | None
    ) -> list[RequestState]:
        """Checked requests, not queued yet. Raises ValueError that names the prompt's index."""
        params_list = as_params_list(sampling_params, len(prompts))
        requests = []
        for index, (prompt, params) in enumerate(zip(prompts, params_list, strict=True)):
            try:
                seq = self._make_sequence(prompt, params)
            except ValueError as error:
                raise ValueError(f"prompt {index}: {error}") from error
            requests.append(RequestState(seq, self._decoder, index))
        with self._number_lock:  # only now: requests that are refused get no number
            for seq in (request.sequence for request in requests):
                seq.seq_id, seed = self.num_requests, seq.sampling_params.seed
                seq.seed = request_seed(self._config.seed, seq.seq_id) if seed is None else seed
                self.num_requests += 1
        return requests

    def chat_prompts(self, messages: Any, *options: Any) -> list[list[int]]:
        """Token ids of each conversation; see chat.chat_prompts."""
        with self._tokenizer_lock:
            return chat_prompts(self._tokenizer, messages, *options)

    def _make_sequence(self, prompt: Prompt, params: SamplingParams) -> Sequence:
        with self._tokenizer_lock if isinstance(prompt, str) else nullcontext():
            token_ids = as_token_ids(prompt, self._tokenizer, self._vocab_size)
            if not self._has_warned_of_two_bos and begins_with_two_bos(prompt, token_ids, self._tokenizer):
                self._has_warned_of_two_bos = True
                logger.warning(TWO_BOS_WARNING, self._tokenizer.bos_token)
        if params.stop and self._tokenizer is None:
            raise ValueError(f"stop strings need a tokenizer and the model has none, got stop={params.stop!r}")
        assert self._config.kv_cache_block_size is not None  # LLMEngine has set it to the executor's
        seq = Sequence(token_ids, params, block_size=self._config.kv_cache_block_size)
        self._validate_request(seq)
        return seq


def as_prompt_list(prompts: Any) -> list[Prompt]:
    """The prompts as a list: a str, or a list of token ids, is one prompt. Raises ValueError for other types."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, list):
        raise ValueError(
            "prompts must be a str, a list of str or a list of lists of token ids, got "
            f"{type(prompts).__name__}{_remedy(prompts)}"
        )
    if prompts and as_ints(prompts) is not None:
        return [prompts]
    return prompts


def as_params_list(sampling_params: Any, num_prompts: int) -> list[SamplingParams]:
    """One SamplingParams for each prompt, from one for all, a list, or None for the defaults. Raises ValueError."""
    if sampling_params is None or isinstance(sampling_params, SamplingParams):
        return [sampling_params or SamplingParams()] * num_prompts
    if not isinstance(sampling_params, (list, tuple)):
        raise ValueError(
            "sampling_params must be a SamplingParams or a list with one for each prompt, got "
            f"{type(sampling_params).__name__}"
        )
    if len(sampling_params) != num_prompts:
        raise ValueError(
            f"sampling_params must be one SamplingParams or one for each of the {num_prompts} prompts, got a list of "
            f"{len(sampling_params)}"
        )
    for index, params in enumerate(sampling_params):
        if not isinstance(params, SamplingParams):
            raise ValueError(f"sampling_params[{index}] must be a SamplingParams, got {params!r}")
    return list(sampling_params)


def as_token_ids(prompt: Any, tokenizer: Any, vocab_size: int) -> list[int]:
    """Token ids of one prompt, as a new list of int.

    Raises ValueError for another type, for an empty prompt, and for an id outside of the vocabulary.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError(
                "a text prompt needs a tokenizer and the model directory has none; give a list of token ids or add "
                "tokenizer.json"
            )
        require_unicode("a text prompt", prompt)
        token_ids = _encoded(prompt, tokenizer)
    elif isinstance(prompt, list):
        token_ids = prompt
    else:
        raise ValueError(f"a prompt must be a str or a list of token ids, got {type(prompt).__name__}{_remedy(prompt)}")
    if not token_ids:
        raise ValueError(f"a prompt must have at least one token, got {prompt!r}")
    plain = as_ints(token_ids)
    if plain is not None and _are_below(vocab_size, plain):
        return plain
    wrong = (item for item in enumerate(token_ids) if not is_int(item[1]) or not 0 <= item[1] < vocab_size)
    position, token_id = next(wrong)
    raise ValueError(
        f"a token id must be an integer from 0 to {vocab_size - 1} (the model's vocabulary), got {token_id!r} "
        f"at position {position}{_remedy(token_id) if isinstance(token_id, Mapping) else ''}"
    )


def _encoded(text: str, tokenizer: Any) -> list[int]:
    # verbose=False: no warning about the tokenizer's own length limit; the engine checks max_model_len
    try:
        return list(tokenizer.encode(text, verbose=False))
    except (RuntimeError, MemoryError):  # "Already borrowed" of a tokenizer that another thread uses, and the machine's
        raise
    except Exception as error:  # of broken files that can be read, such as a vocabulary without the unknown token
        reason = str(error) or type(error).__name__
        raise ValueError(
            f"the model's tokenizer cannot encode a text prompt: {reason}; download the tokenizer's files again"
        ) from error


def _are_below(limit: int, values: list[int]) -> bool:
    """Whether all are from 0 to limit - 1. An array finds out in a third of the time of min() and max()."""
    try:
        array = np.fromiter(values, np.int64, len(values))
    except OverflowError:
        return False
    return bool(array.min() >= 0 and array.max() < limit)


def _remedy(value: Any) -> str:
    """What to do with a value that is no prompt, as the end of a message; empty if there is no advice."""
    if isinstance(value, (bytes, bytearray)):
        return "; decode it with .decode()"
    if isinstance(value, Mapping):
        if "role" in value:
            return "; give chat messages to LLM.chat"
        keys = [key for key in ("prompt_token_ids", "input_ids", "prompt") if key in value]
        return f"; give its value of {keys[0]!r}" if keys else ""
    if hasattr(value, "tolist"):  # an array or a tensor; without dimensions it would become a number
        return "; convert it with .tolist()" if getattr(value, "ndim", 1) > 0 else ""
    if isinstance(value, Iterable) and not isinstance(value, (str, list)):
        return "; convert it with list(...)"
    return ""


def request_seed(engine_seed: int, arrival_number: int) -> int:
    """Sampling seed of a request without one, 0 .. 2**64-1: XXH64 of the two numbers as 8 bytes each."""
    return xxhash.xxh64_intdigest(struct.pack("<QQ", engine_seed, arrival_number))
