"""LLM.chat and chat_stream: messages in, the next message out; and a rendered chat template as a text prompt."""

import copy
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.engine.tokenizer import load_tokenizer
from tests.e2e.conftest import BUNDLED_OPTIONS
from tests.support.tiny_models import tiny_model

GREEDY = SamplingParams.greedy(max_tokens=20, ignore_eos=True)
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    "[{{ message['role'] }}]{{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
USER = {"role": "user", "content": "How many angels dance on the head of a pin?"}


def model_with_bos(directory: Path) -> Path:
    """A tiny model whose tokenizer puts <s> before every text, has a chat template, and claims a limit of 8 tokens."""
    from tokenizers import AddedToken, Tokenizer, processors

    shutil.copytree(tiny_model("llama"), directory)
    backend = Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    bos = ("<s>", backend.token_to_id("<s>"))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    backend.save(str(directory / "tokenizer.json"))
    path = directory / "tokenizer_config.json"
    settings = {"bos_token": "<s>", "chat_template": TEMPLATE, "model_max_length": 8}
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_with_bos(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture
def llm(model: Path) -> Iterator[LLM]:
    with LLM(str(model), **BUNDLED_OPTIONS) as llm:
        yield llm
        assert llm.is_finished()


def rendered(llm: LLM, messages: list[Any], **options: Any) -> list[int]:
    """The definition: as transformers tokenizes a conversation."""
    options = {"add_generation_prompt": True, **options}
    return llm.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"]


def test_chat_generates_from_the_rendered_conversation(llm: LLM) -> None:
    """D96: one <s>, though the tokenizer would add one more."""
    prompt = rendered(llm, [USER])
    assert prompt.count(llm.tokenizer.bos_token_id) == 1
    (expected,) = llm.generate([prompt], GREEDY, use_tqdm=False)
    (output,) = llm.chat([USER], GREEDY, use_tqdm=False)
    assert output["token_ids"] == expected["token_ids"]
    assert output["text"] == expected["text"]
    assert output["num_cached_tokens"] == len(prompt) // 16 * 16, "the same tokens: their blocks were cached"


def test_chat_stream_gives_the_text_of_chat(llm: LLM) -> None:
    """D96."""
    conversations = [[USER], [{"role": "user", "content": "Why?"}]]
    texts = ["", ""]
    for item in llm.chat_stream(conversations, GREEDY):
        texts[item["index"]] += item["text"]
    assert texts == [output["text"] for output in llm.chat(conversations, GREEDY, use_tqdm=False)]


def test_a_continued_conversation_finds_its_beginning_in_the_prefix_cache(llm: LLM) -> None:
    """D96."""
    (first,) = llm.chat([USER], GREEDY, use_tqdm=False)
    assert first["num_cached_tokens"] == 0
    messages = [USER, {"role": "assistant", "content": "Seven."}, {"role": "user", "content": "Why?"}]
    (second,) = llm.chat(messages, GREEDY, use_tqdm=False)
    num_common = len(rendered(llm, [USER]))
    assert second["num_cached_tokens"] == num_common // 16 * 16 > 0


def test_options_of_chat(llm: LLM) -> None:
    """D96: both ways take them, and a list of parameters is one for each conversation."""
    messages = [USER, {"role": "assistant", "content": "Sev"}]
    options: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    (expected,) = llm.generate([rendered(llm, messages, **options)], GREEDY, use_tqdm=False)
    (output,) = llm.chat(messages, GREEDY, use_tqdm=False, **options)
    assert output["token_ids"] == expected["token_ids"]
    assert "".join(item["text"] for item in llm.chat_stream(messages, GREEDY, **options)) == output["text"]
    options = {"chat_template": "{{ mood }}{{ tools[0]['name'] }}", "tools": [{"name": "b"}]}
    options["chat_template_kwargs"] = {"mood": "glad"}
    (expected,) = llm.generate([llm.tokenizer.encode("gladb", add_special_tokens=False)], GREEDY, use_tqdm=False)
    assert llm.chat([USER], GREEDY, use_tqdm=False, **options)[0]["token_ids"] == expected["token_ids"]
    assert "".join(item["text"] for item in llm.chat_stream([USER], GREEDY, **options)) == expected["text"]
    params = [SamplingParams.greedy(max_tokens=count, ignore_eos=True) for count in (2, 3)]
    outputs = llm.chat([[USER], [USER]], params, use_tqdm=False)
    assert [len(output["token_ids"]) for output in outputs] == [2, 3]


def test_messages_that_cannot_be_rendered_are_refused_and_nothing_is_queued(llm: LLM) -> None:
    """D96."""
    wrong: list[Any] = [[USER], [{"role": "system", "content": "Be brief."}]]
    for call in (llm.chat, llm.chat_stream):
        with pytest.raises(ValueError, match="cannot render conversation 1: no system message"):
            call(wrong, GREEDY)
    with pytest.raises(ValueError, match=r"got dict; give chat messages to LLM\.chat"):
        llm.generate([USER], GREEDY, use_tqdm=False)  # type: ignore[list-item]
    assert llm.is_finished()


def test_a_rendered_template_as_a_text_prompt_is_warned_about_once(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    """D96: the tokenizer puts a second <s> before it."""
    text = llm.tokenizer.decode(rendered(llm, [USER]))
    with caplog.at_level(logging.WARNING, "nanovllm"):
        llm.chat([USER], GREEDY, use_tqdm=False)
        llm.generate(["How many?"], GREEDY, use_tqdm=False)
        assert caplog.messages == []
        llm.generate([text, text], GREEDY, use_tqdm=False)
        llm.generate(text, GREEDY, use_tqdm=False)
    (message,) = caplog.messages
    assert "begins with '<s>'" in message
    assert "LLM.chat" in message
    assert text.startswith("<s>")
    with caplog.at_level(logging.WARNING, "nanovllm"):
        caplog.clear()
        llm._input_processor._has_warned_of_two_bos = False
        llm.generate(text.removeprefix("<s>"), GREEDY, use_tqdm=False)  # the remedy
    assert caplog.messages == []


@pytest.fixture
def library_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What transformers logs from WARNING on; it does not reach the root logger."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.WARNING)
    yield caplog
    logger.setLevel(level)
    logger.removeHandler(caplog.handler)


def test_no_false_warning_of_a_library_reaches_the_user(llm: LLM, library_log: pytest.LogCaptureFixture) -> None:
    """D95: the engine checks max_model_len itself; model_max_length of tokenizer_config.json says nothing about it."""
    long = "How many angels dance on the head of a pin?"
    llm.generate(long, GREEDY, use_tqdm=False)
    list(llm.generate_stream(long, SamplingParams.greedy(max_tokens=4, stop="<eos>")))
    llm.chat([USER], GREEDY, use_tqdm=False)
    assert library_log.messages == []
    load_tokenizer(Path(llm.config.model)).encode(long)
    assert "will result in indexing errors" in library_log.text, "without our option, the library does warn"


def test_loading_a_tokenizer_leaves_the_logging_of_libraries_as_it_was(model: Path) -> None:
    """D95."""
    logger = logging.getLogger("transformers")
    before = (logger.level, copy.copy(logger.handlers), copy.copy(logger.filters))
    load_tokenizer(model)
    assert (logger.level, logger.handlers, logger.filters) == before
