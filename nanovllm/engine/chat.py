"""chat_prompts: chat messages -> token ids, rendered by the tokenizer's chat template."""

from collections.abc import Mapping
from typing import Any

from nanovllm.validation import require_bool, require_unicode

TWO_BOS_WARNING = (
    "a text prompt begins with %r and the tokenizer puts another one before it, so the model reads two; leave it out "
    "of the text, or give chat messages to LLM.chat (--chat at the command line), which renders the chat template "
    "without a second one"
)
_EXAMPLE = '{"role": "user", "content": "Hello"}'
_SET_BY_CHAT = ("conversation", "tools", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize")


def chat_prompts(
    tokenizer: Any,
    messages: Any,
    chat_template: str | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: list[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """Token ids of each conversation. LLMEngine.chat documents the arguments.

    Raises ValueError for messages, options and templates that cannot be rendered.
    """
    _check_options(tokenizer, chat_template, add_generation_prompt, continue_final_message, chat_template_kwargs)
    prompts = []
    for index, conversation in enumerate(as_conversations(messages)):
        try:
            text = tokenizer.apply_chat_template(
                conversation,
                tools=tools,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **(chat_template_kwargs or {}),
            )
        except Exception as error:  # an expression of the template may raise anything
            reason = str(error) or type(error).__name__
            raise ValueError(
                f"the chat template cannot render conversation {index}: {reason}; check the order of the roles and the "
                "keys of the messages against the template of the model"
            ) from error
        require_unicode("a message", text)
        token_ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)  # the template contains them
        if not token_ids:
            raise ValueError(f"the chat template must render at least one token, got {text!r} for conversation {index}")
        prompts.append(list(token_ids))
    return prompts


def as_conversations(messages: Any) -> list[list[dict[str, Any]]]:
    """The conversations in `messages`: one list of messages, or a list of such lists. Raises ValueError otherwise."""
    if not isinstance(messages, (list, tuple)):
        remedy = "wrap the message in a list" if isinstance(messages, Mapping) else f"write [{_EXAMPLE}]"
        raise ValueError(f"messages must be a list of messages, got {type(messages).__name__}; {remedy}")
    if messages and not isinstance(messages[0], (list, tuple)):
        return [_as_conversation(messages, "messages")]
    return [_as_conversation(conversation, f"messages[{index}]") for index, conversation in enumerate(messages)]


def _as_conversation(messages: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(messages, (list, tuple)):
        raise ValueError(f"{name} must be a list of messages as the others, got {type(messages).__name__}")
    if not messages:
        raise ValueError(f"{name} must hold at least one message, got []; write [{_EXAMPLE}]")
    return [_as_message(message, f"{name}[{index}]") for index, message in enumerate(messages)]


def _as_message(message: Any, name: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"{name} must be a dict such as {_EXAMPLE}, got {message!r}")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise ValueError(f"{name} must have a 'role', such as 'user', got {dict(message)!r}")
    if content is None and message.get("tool_calls"):
        return dict(message)
    if not isinstance(content, str):
        problem = f"got {content!r}" if "content" in message else f"got {dict(message)!r}"
        remedy = "; join the texts of its parts to one str" if isinstance(content, (list, tuple)) else ""
        raise ValueError(f"{name} must have a 'content' that is a str, {problem}{remedy}")
    return dict(message)


def begins_with_two_bos(prompt: Any, token_ids: list[int], tokenizer: Any) -> bool:
    """Whether the tokenizer added its beginning-of-sequence token to a text that already begins with it."""
    if not isinstance(prompt, str) or len(token_ids) < 2:
        return False
    return token_ids[0] == token_ids[1] == getattr(tokenizer, "bos_token_id", None)


def _check_options(
    tokenizer: Any, chat_template: Any, add_generation_prompt: Any, continue_final_message: Any, kwargs: Any
) -> None:
    if tokenizer is None:
        raise ValueError(
            "chat needs a tokenizer and the model directory has none; add tokenizer.json, or give token ids to generate"
        )
    if chat_template is not None and not isinstance(chat_template, str):
        raise ValueError(
            f"chat_template must be a str, the text of a Jinja template, got {type(chat_template).__name__}"
        )
    if chat_template is None and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "the model has no chat template; pass one as chat_template, or write the prompt as a text for generate"
        )
    require_bool("add_generation_prompt", add_generation_prompt)
    require_bool("continue_final_message", continue_final_message)
    if add_generation_prompt and continue_final_message:
        raise ValueError(
            "continue_final_message=True continues the last message and add_generation_prompt=True begins another; "
            "pass add_generation_prompt=False"
        )
    if kwargs is None:
        return
    if not isinstance(kwargs, Mapping):
        raise ValueError(f"chat_template_kwargs must be a dict, got {type(kwargs).__name__}")
    clash = sorted(set(_SET_BY_CHAT) & set(kwargs))
    if clash:
        raise ValueError(f"chat_template_kwargs must not hold {clash[0]!r}, which chat passes to the template itself")
