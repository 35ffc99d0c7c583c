"""LLM.chat and chat_stream: messages in, the next message out; and a rendered chat template as a text prompt.

tests/unit/engine/test_chat.py has the options of rendering and what is refused.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.engine.tokenizer import load_tokenizer
from tests.e2e.conftest import bundled_llm, contents, joined, tokens
from tests.support.tiny_models import copy_model, tiny_model

GREEDY = SamplingParams.greedy(max_tokens=20, ignore_eos=True)
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    "[{{ message['role'] }}]{{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
USER = {"role": "user", "content": "How many angels dance on the head of a pin?"}
CONTINUED = [USER, {"role": "assistant", "content": "Seven."}, {"role": "user", "content": "Why?"}]


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose tokenizer puts <s> before every text, has a chat template, and claims a limit of 8 tokens."""
    from tokenizers import AddedToken, Tokenizer, processors

    settings = {"bos_token": "<s>", "chat_template": TEMPLATE, "model_max_length": 8}
    directory = copy_model(tiny_model("llama"), tmp_path_factory.mktemp("chat") / "model", tokenizer_config=settings)
    backend = Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    bos = ("<s>", backend.token_to_id("<s>"))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    backend.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture
def llm(chat_model: Path) -> Iterator[LLM]:
    with bundled_llm(chat_model) as llm:
        yield llm
        assert llm.is_finished()


def rendered(llm: LLM, messages: list[Any], **options: Any) -> list[int]:
    """The definition: as transformers tokenizes a conversation."""
    options = {"add_generation_prompt": True, **options}
    return llm.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"]


def test_chat_generates_from_the_rendered_conversations(llm: LLM) -> None:
    """D96: one <s>, though the tokenizer would add one more. chat_stream gives the same, each with its own params."""
    prompts = [rendered(llm, [USER]), rendered(llm, CONTINUED)]
    assert prompts[0].count(llm.tokenizer.bos_token_id) == 1
    params = [SamplingParams.greedy(max_tokens=count, ignore_eos=True) for count in (5, 20)]
    expected = contents(llm.generate(prompts, params, use_tqdm=False))
    assert contents(llm.chat([[USER], CONTINUED], params, use_tqdm=False)) == expected
    assert joined(llm.chat_stream([[USER], CONTINUED], params)) == expected
    assert [len(output["token_ids"]) for output in expected] == [5, 20]


@pytest.mark.parametrize("options", [
    {"add_generation_prompt": False, "continue_final_message": True},
    {"chat_template": "{{ mood }}{{ tools[0]['name'] }}", "tools": [{"name": "b"}],
     "chat_template_kwargs": {"mood": "glad"}},
], ids=["continue_final_message", "chat_template"])  # fmt: skip
def test_both_calls_pass_the_options_of_rendering_on(llm: LLM, options: dict[str, Any]) -> None:
    """D96."""
    named = {name: value for name, value in options.items() if name != "chat_template_kwargs"}
    prompt = rendered(llm, CONTINUED[:2], **named, **options.get("chat_template_kwargs", {}))
    expected = tokens(llm, [prompt], GREEDY)
    assert [output["token_ids"] for output in llm.chat(CONTINUED[:2], GREEDY, use_tqdm=False, **options)] == expected
    assert [output["token_ids"] for output in joined(llm.chat_stream(CONTINUED[:2], GREEDY, **options))] == expected


def test_a_rendered_template_as_a_text_prompt_is_warned_about_once(llm: LLM, warnings: Callable[[], list[str]]) -> None:
    """D96: the tokenizer puts a second <s> before it."""
    text = llm.tokenizer.decode(rendered(llm, [USER]))
    llm.chat([USER], GREEDY, use_tqdm=False)
    tokens(llm, ["How many?", text.removeprefix("<s>")])  # the latter is the remedy
    assert warnings() == []
    tokens(llm, [text, text])
    tokens(llm, text)
    (message,) = warnings()
    assert "begins with '<s>'" in message
    assert "LLM.chat" in message


def test_no_false_warning_of_a_library_reaches_the_user(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """D95: the engine checks max_model_len itself; model_max_length of tokenizer_config.json says nothing about it."""
    logger = logging.getLogger("transformers")
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.WARNING, "transformers")
    before = (logger.level, copy.copy(logger.handlers), copy.copy(logger.filters))
    long = "How many angels dance on the head of a pin?"
    llm.generate(long, GREEDY, use_tqdm=False)
    list(llm.generate_stream(long, SamplingParams.greedy(max_tokens=4, stop="<eos>")))
    llm.chat([USER], GREEDY, use_tqdm=False)
    assert [record.message for record in caplog.records if record.name.startswith("transformers")] == []
    load_tokenizer(Path(llm.config.model)).encode(long)
    assert "will result in indexing errors" in caplog.text, "without our option, the library does warn"
    assert (logger.level, logger.handlers, logger.filters) == before
