"""chat: the chat template renders messages to token ids; what it cannot render is refused with a remedy."""

import copy
from typing import Any

import pytest

from nanovllm.engine.chat import as_conversations, begins_with_two_bos, chat_prompts
from tests.unit.engine.text_tokenizers import byte_fallback

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' and not loop.first %}{{ raise_exception('system comes first') }}{% endif %}"
    "<{{ message['role'] }}>{{ message['content'] }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
USER = {"role": "user", "content": "b"}
ASSISTANT = {"role": "assistant", "content": "bb"}


def chat_tokenizer(template: str | None = TEMPLATE) -> Any:
    tokenizer = copy.copy(byte_fallback().tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def rendered(messages: Any, template: str = TEMPLATE, **options: Any) -> str:
    """The text of the last conversation, special tokens included."""
    tokenizer = chat_tokenizer(template)
    return tokenizer.decode(chat_prompts(tokenizer, messages, **options)[-1])


def test_messages_and_options_are_rendered_by_the_template_without_further_special_tokens() -> None:
    """D96: under the names that vLLM's LLM.chat has."""
    assert rendered([USER]) == "<s><user>b</s><assistant>"
    assert rendered([USER], add_generation_prompt=False) == "<s><user>b</s>"
    assert rendered([USER], chat_template="{{ messages[0]['content'] }}!") == "b!"
    options: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    assert rendered([USER, ASSISTANT], **options) == "<s><user>b</s><assistant>bb"
    template = "{{ tools[0]['name'] }}{{ mood }}"
    assert rendered([USER], template, tools=[{"name": "b"}], chat_template_kwargs={"mood": "END"}) == "bEND"


def test_one_conversation_and_many() -> None:
    assert as_conversations([USER]) == [[USER]]
    assert as_conversations([[USER], [USER, ASSISTANT]]) == [[USER], [USER, ASSISTANT]]
    assert as_conversations((USER,)) == [[USER]]
    assert as_conversations([]) == []
    assert len(chat_prompts(chat_tokenizer(), [[USER], [USER, ASSISTANT]])) == 2
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "b", "arguments": {}}}]}
    assert as_conversations([call, {**call, "content": None}]) == [[call, {**call, "content": None}]]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("Hello", r"messages must be a list of messages, got str; write \[{\"role\": \"user\""),
        (USER, "messages must be a list of messages, got dict; wrap the message in a list"),
        (None, "got NoneType"),
        ([[]], r"messages\[0\] must hold at least one message"),
        (["Hello"], r"messages\[0\] must be a dict such as .* got 'Hello'"),
        ([USER, "Hello"], r"messages\[1\] must be a dict"),
        ([[USER], USER], r"messages\[1\] must be a list of messages as the others, got dict"),
        ([[USER], [USER, {}]], r"messages\[1\]\[1\] must have a 'role', such as 'user', got {}"),
        ([{"role": 1, "content": "b"}], "must have a 'role'"),
        ([{"role": "user"}], "must have a 'content' that is a str, got {'role': 'user'}"),
        ([{"role": "user", "content": None}], "must have a 'content' that is a str, got None$"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "b"}]}],
            "must have a 'content' that is a str, .*; join the texts of its parts to one str$",
        ),
        ([{"role": "user", "content": "caf\udce9"}], "^a message must be valid Unicode"),
    ],
)
def test_wrong_messages_are_refused(messages: Any, message: str) -> None:
    """D96."""
    with pytest.raises(ValueError, match=message):
        chat_prompts(chat_tokenizer(), messages)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"continue_final_message": True},
            "^continue_final_message=True continues the last message and add_generation_prompt=True begins another; "
            "pass add_generation_prompt=False$",
        ),
        ({"add_generation_prompt": 1}, "add_generation_prompt must be True or False, got 1"),
        (
            {"continue_final_message": "yes", "add_generation_prompt": False},
            "^continue_final_message must be True or False, got 'yes'",
        ),
        ({"chat_template": 5}, "chat_template must be a str, the text of a Jinja template, got int"),
        ({"chat_template_kwargs": "thinking"}, "chat_template_kwargs must be a dict, got str"),
        ({"chat_template_kwargs": {"tokenize": True}}, "must not hold 'tokenize'"),
        ({"chat_template": "{{ bos"}, "the chat template cannot render conversation 0: "),
        ({"chat_template": "{{ messages[0]['content'] + 1 }}"}, "the chat template cannot render conversation 0: "),
        (
            {"chat_template": "{{ raise_exception('') }}"},
            "cannot render conversation 0: TemplateError; check the order",
        ),
        ({"chat_template": ""}, "must render at least one token, got '' for conversation 0"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    """D96."""
    with pytest.raises(ValueError, match=message):
        chat_prompts(chat_tokenizer(), [USER], **options)


def test_what_a_template_raises_names_its_message_and_the_conversation() -> None:
    """D96."""
    system = {"role": "system", "content": "b"}
    remedy = "check the order of the roles and the keys of the messages against the template of the model"
    with pytest.raises(ValueError, match=f"cannot render conversation 1: system comes first; {remedy}$"):
        chat_prompts(chat_tokenizer(), [[USER], [USER, system]])
    assert chat_prompts(chat_tokenizer(), [system, USER]), "the remedy: another order"


def test_a_model_without_a_tokenizer_or_a_template_is_refused() -> None:
    """D96."""
    with pytest.raises(
        ValueError, match=r"^chat needs a tokenizer .* add tokenizer\.json, or give token ids to generate$"
    ):
        chat_prompts(None, [USER])
    with pytest.raises(
        ValueError, match=r"^the model has no chat template; pass one as chat_template, or write .* for generate$"
    ):
        chat_prompts(chat_tokenizer(None), [USER])
    with pytest.raises(ValueError, match="the model has no chat template"):
        chat_prompts(object(), [USER])  # of a library that knows no chat templates
    assert chat_prompts(chat_tokenizer(None), [USER], chat_template="b")


@pytest.mark.parametrize(
    ("prompt", "token_ids", "is_doubled"),
    [
        ("<s>b", [1, 1, 2], True),
        ("b", [1, 2], False),
        ("b", [2, 1], False),
        ("", [1], False),
        ([1, 1, 2], [1, 1, 2], False),
        ("bb", [2, 2], False),
    ],
)
def test_two_beginnings_of_a_text_prompt(prompt: Any, token_ids: list[int], is_doubled: bool) -> None:
    """D96: token ids are the user's own choice."""

    class Tokenizer:
        bos_token_id = 1

    assert begins_with_two_bos(prompt, token_ids, Tokenizer()) is is_doubled
    Tokenizer.bos_token_id = None  # type: ignore[assignment]
    assert not begins_with_two_bos(prompt, token_ids, Tokenizer())
