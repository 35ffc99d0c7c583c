"""input_processor: prompts and parameters in every form users give them, and what a request gets: number and seed."""

import struct
from array import array
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import xxhash

from nanovllm import Config, SamplingParams
from nanovllm.engine.chat import as_conversations
from nanovllm.engine.input_processor import InputProcessor, as_params_list, as_prompt_list, as_token_ids, request_seed

GREEDY = SamplingParams.greedy()


class WordTokenizer:
    """One token for each word: its length."""

    def encode(self, text: str, verbose: bool) -> list[int]:
        assert not verbose
        return [len(word) for word in text.split()]


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("a b", ["a b"]),
        ("", [""]),
        ([], []),
        (["a", "b"], ["a", "b"]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        (["a", [1]], ["a", [1]]),
        ([1, 2], [[1, 2]]),
        ([np.int64(1), 2], [[1, 2]]),
        ([[]], [[]]),
    ],
)
def test_prompt_lists(prompts: Any, expected: list[Any]) -> None:
    """D68: a str is one prompt, and so is a list of token ids."""
    assert as_prompt_list(prompts) == expected


# Words of a message -> what a user who follows them does to the value.
REMEDIES: dict[str, Callable[[Any], Any]] = {
    "; convert it with list(...)": list,
    "; convert it with .tolist()": lambda value: value.tolist(),
    "; decode it with .decode()": lambda value: value.decode(),
    "; give its value of 'prompt'": lambda value: value["prompt"],
    "; give its value of 'prompt_token_ids'": lambda value: value["prompt_token_ids"],
    "; give its value of 'input_ids'": lambda value: value["input_ids"],
    "; decode its bytes with the right encoding, or with errors='replace'": lambda value: value.encode(
        errors="surrogateescape"
    ).decode(errors="replace"),
}


def remedy(message: str, value: Any) -> Any:
    (follow,) = [follow for words, follow in REMEDIES.items() if message.endswith(words)]
    return follow(value)


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        (("a", "bb"), [[1], [2]]),
        (([1, 2], [3]), [[1, 2], [3]]),
        (((1, 2), (3,)), [[1, 2], [3]]),
        ((1, 2), [[1, 2]]),
        (b"a bb", [[1, 2]]),
        (bytearray(b"a bb"), [[1, 2]]),
        ([b"a bb", "a"], [[1, 2], [1]]),
        (np.array([1, 2]), [[1, 2]]),
        (array("q", [1, 2]), [[1, 2]]),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        ([np.array([1, 2]), np.array([3])], [[1, 2], [3]]),
        (range(3), [[0, 1, 2]]),
        (dict.fromkeys("ab").keys(), [[1], [1]]),  # no generator: mutmut runs a test more than once in a process
        ({"input_ids": [1, 2]}, [[1, 2]]),
        ({"input_ids": np.array([[1, 2]])}, [[1, 2]]),
        ([{"prompt_token_ids": [1, 2]}, {"prompt": "a"}], [[1, 2], [1]]),
        ("caf\udce9", [[4]]),
    ],
)
def test_remedies_work(prompts: Any, expected: list[list[int]]) -> None:
    """D93: following the message gives the prompts that were meant."""

    def checked(check: Callable[[Any], Any], value: Any) -> Any:
        for _ in range(3):
            try:
                return check(value)
            except ValueError as error:
                value = remedy(str(error), value)
        raise AssertionError(f"the remedies do not lead to valid prompts: {value!r}")

    prompts = checked(as_prompt_list, prompts)
    assert [checked(lambda prompt: as_token_ids(prompt, WordTokenizer(), 10), prompt) for prompt in prompts] == expected


@pytest.mark.parametrize("wrap", [lambda messages: messages, lambda messages: [messages], lambda messages: messages[0]])
def test_chat_messages_are_sent_to_chat(wrap: Callable[[Any], Any]) -> None:
    """D93: as one conversation, as several, or a single message."""
    messages = wrap([{"role": "user", "content": "a"}])
    with pytest.raises(ValueError, match=r"got (dict|{'role'.*); give chat messages to LLM\.chat$"):
        [as_token_ids(prompt, WordTokenizer(), 10) for prompt in as_prompt_list(messages)]
    if isinstance(messages, dict):
        with pytest.raises(ValueError, match=r"got dict; wrap the message in a list$"):
            as_conversations(messages)
        messages = [messages]
    assert as_conversations(messages)


@pytest.mark.parametrize("value", [np.int64(3), np.float32(1), np.array(1), 5, None, {"a": 1}])
def test_other_types_without_a_remedy_are_refused(value: Any) -> None:
    """D93: an array without dimensions is no prompt after .tolist() either."""
    with pytest.raises(ValueError, match=rf"prompts must be a str, .* got {type(value).__name__}$"):
        as_prompt_list(value)


def test_one_for_all_and_one_for_each() -> None:
    """D68."""
    other = SamplingParams(max_tokens=3)
    assert as_params_list(GREEDY, 3) == [GREEDY] * 3
    assert as_params_list(None, 2) == [SamplingParams()] * 2
    assert as_params_list([GREEDY, other], 2) == [GREEDY, other]
    assert as_params_list((GREEDY, other), 2) == [GREEDY, other]
    assert as_params_list([], 0) == []


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([GREEDY], "one for each of the 2 prompts, got a list of 1"),
        ([GREEDY] * 3, "one for each of the 2 prompts, got a list of 3"),
        ([], "one for each of the 2 prompts, got a list of 0"),
        ([GREEDY, None], r"sampling_params\[1\] must be a SamplingParams, got None"),
        ([[GREEDY, GREEDY], GREEDY], r"sampling_params\[0\] must be a SamplingParams"),
        ({"max_tokens": 3}, "sampling_params must be a SamplingParams or a list .* got dict"),
        ("greedy", "got str"),
    ],
)
def test_params_that_do_not_match_are_refused(params: Any, message: str) -> None:
    """D68."""
    with pytest.raises(ValueError, match=message):
        as_params_list(params, 2)


@pytest.mark.parametrize(
    ("prompt", "expected"), [("a bb ccc", [1, 2, 3]), ([0, 9], [0, 9]), ([np.int64(4), np.uint8(5)], [4, 5])]
)
def test_token_ids_are_plain_ints_in_a_list_of_their_own(prompt: Any, expected: list[int]) -> None:
    token_ids = as_token_ids(prompt, WordTokenizer(), 10)
    assert token_ids == expected
    assert token_ids is not prompt
    assert {type(item) for item in token_ids} == {int}


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], r"at least one token, got \[\]"),
        ("", "at least one token, got ''"),
        ([1, 2**70], "got 1180591620717411303424 at position 1"),
        ([np.int64(1), np.uint64(2**63)], "at position 1$"),
        ([1, [2]], r"got \[2\] at position 1$"),
        ([1, np.bool_(True)], "at position 1$"),
        ([1, True], "got True at position 1"),
        ([0, 10], r"from 0 to 9 \(the model's vocabulary\), got 10 at position 1"),
        ([-1], "got -1 at position 0"),
        ([1, 2.0], "got 2.0 at position 1"),
        ([1, "2"], "got '2' at position 1"),
        ([[1]], r"got \[1\] at position 0"),
        ([np.array([1, 2])], "at position 0"),
        ("a bbbbbbbbbbbb", "got 12 at position 1"),
        (
            "caf\udce9",
            r"^a text prompt must be valid Unicode, got 'caf\\udce9' with a lone surrogate at position 3; .*'replace'",
        ),
        ([np.float64(2)], r"at position 0$"),
        (7, "got int$"),
        (None, "got NoneType$"),
    ],
)
def test_bad_prompts_are_refused(prompt: Any, message: str) -> None:
    """D12."""
    with pytest.raises(ValueError, match=message):
        as_token_ids(prompt, WordTokenizer(), 10)


def test_a_text_needs_a_tokenizer() -> None:
    with pytest.raises(ValueError, match=r"a text prompt needs a tokenizer .* add tokenizer\.json"):
        as_token_ids("text", None, 10)
    assert as_token_ids([1], None, 10) == [1]


@pytest.mark.parametrize("error", [Exception("Missing [UNK] token"), TypeError("'>' not supported"), KeyError("a")])
def test_a_tokenizer_that_can_be_read_and_not_used_is_named(error: Exception) -> None:
    """tokenizers raises a bare Exception for a vocabulary without its unknown token: nanovllm has no bug then."""

    def encode(text: str, verbose: bool) -> list[int]:
        raise error

    tokenizer = SimpleNamespace(encode=encode)
    with pytest.raises(ValueError, match=r"^the model's tokenizer cannot encode a text prompt: .*; download the"):
        as_token_ids("text", tokenizer, 10)


def test_a_request_has_the_next_number_and_its_own_seed_or_one_of_the_engines() -> None:
    """D58: a request that is refused takes no number."""
    processor = InputProcessor(Config("a model", seed=7, kv_cache_block_size=256), None, 10, lambda seq: None)
    params = [GREEDY, SamplingParams(seed=5), GREEDY]
    with pytest.raises(ValueError, match="prompt 2: a token id must be an integer from 0 to 9 "):
        processor.make_requests([[1], [2], [10]], params)
    sequences = [request.sequence for request in processor.make_requests([[1], [2], [3]], params)]
    assert [(seq.seq_id, seq.seed) for seq in sequences] == [(0, request_seed(7, 0)), (1, 5), (2, request_seed(7, 2))]
    assert [(seq.token_ids, seq.block_size) for seq in sequences] == [([1], 256), ([2], 256), ([3], 256)]
    with pytest.raises(ValueError, match=r"^prompt 0: stop strings need a tokenizer .* got stop=\('x',\)$"):
        processor.make_requests([[1]], SamplingParams(stop="x"))


def test_the_seed_of_a_request_is_a_hash_of_engine_seed_and_arrival() -> None:
    """D58: reproducible, and different for every request."""
    assert request_seed(7, 3) == xxhash.xxh64(struct.pack("<Q", 7) + struct.pack("<Q", 3)).intdigest()
    seeds = {request_seed(engine, arrival) for engine in range(20) for arrival in range(20)}
    assert len(seeds) == 400
    assert 0 <= request_seed(2**64 - 1, 2**64 - 1) < 2**64
