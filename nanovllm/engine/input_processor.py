"""What the user passes to generate, checked and in one form: token ids, one SamplingParams a prompt, a seed."""

import struct
from collections.abc import Iterable, Mapping
from typing import Any

import xxhash

from nanovllm.sampling_params import SamplingParams
from nanovllm.validation import is_int, require_unicode

Prompt = str | list[int]


def as_prompt_list(prompts: Any) -> list[Prompt]:
    """A str, or a list of token ids, is one prompt; a list of those is that many. Raises ValueError for other types."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, list):
        raise ValueError(
            "prompts must be a str, a list of str or a list of lists of token ids, got "
            f"{type(prompts).__name__}{_remedy(prompts)}"
        )
    if prompts and all(is_int(item) for item in prompts):
        return [prompts]
    return prompts


def as_params_list(sampling_params: Any, num_prompts: int) -> list[SamplingParams]:
    """One SamplingParams for all prompts (None: the defaults), or a list with one each. Raises ValueError otherwise."""
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
    """Token ids of one prompt. Raises ValueError for another type, an empty one, or an id outside the vocabulary."""
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError(
                "a text prompt needs a tokenizer and the model directory has none; give a list of token ids or add "
                "tokenizer.json"
            )
        require_unicode("a text prompt", prompt)
        # verbose=False: no warning about the tokenizer's own length limit; the engine checks max_model_len
        token_ids = list(tokenizer.encode(prompt, verbose=False))
    elif isinstance(prompt, list):
        token_ids = prompt
    else:
        raise ValueError(f"a prompt must be a str or a list of token ids, got {type(prompt).__name__}{_remedy(prompt)}")
    if not token_ids:
        raise ValueError(f"a prompt must have at least one token, got {prompt!r}")
    for position, token_id in enumerate(token_ids):
        if not is_int(token_id) or not 0 <= token_id < vocab_size:
            raise ValueError(
                f"a token id must be an integer from 0 to {vocab_size - 1} (the model's vocabulary), got {token_id!r} "
                f"at position {position}{_remedy(token_id) if isinstance(token_id, Mapping) else ''}"
            )
    return [int(token_id) for token_id in token_ids]


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
    """Sampling seed, 0 .. 2**64-1, of a request that brings none: XXH64 of the two numbers as 8 bytes each."""
    return xxhash.xxh64_intdigest(struct.pack("<QQ", engine_seed, arrival_number))
