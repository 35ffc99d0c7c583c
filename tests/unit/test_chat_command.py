"""nanovllm chat: what a conversation prints and remembers, at a terminal and through a pipe."""

import io
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams, cli
from nanovllm.commands.chat import HELP
from tests.support.tiny_models import copy_model, tiny_model

TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
LIMITS = {"device": "cpu", "max_model_len": 160, "num_kv_cache_blocks": 2}
OPTIONS = ["--greedy", "--max-tokens", "8", "--ignore-eos", "--device", "cpu", "--max-model-len", "160"]
OPTIONS += ["--num-kv-cache-blocks", "2"]
TOO_LONG = "How long may a message be? " * 8


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("chat") / "model"
    return copy_model(tiny_model("llama"), directory, tokenizer_config={"chat_template": TEMPLATE})


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    with LLM(str(model), **LIMITS) as llm:
        yield llm


def answers(llm: LLM, *messages: str, system: str | None = None) -> list[str]:
    """The definition: the answer to each of the user's messages, given all messages before it."""
    conversation = [{"role": "system", "content": system}] if system else []
    for message in messages:
        conversation.append({"role": "user", "content": message})
        params = SamplingParams.greedy(max_tokens=8, ignore_eos=True)
        text = llm.chat(conversation, params, use_tqdm=False)[0]["text"]
        conversation.append({"role": "assistant", "content": text})
    return [message["content"] for message in conversation if message["role"] == "assistant"]


def chat(monkeypatch: pytest.MonkeyPatch, model: Path, stdin: Any, *options: str) -> int:
    monkeypatch.setattr(sys, "stdin", stdin)
    return cli.main(["chat", "--model", str(model), *OPTIONS, *options])


def test_a_conversation_remembers_its_messages_up_to_new_and_ends_at_quit(model, llm, monkeypatch, capsys) -> None:
    script = io.StringIO("Hello\n\n  Why?  \n/new\nWhy?\n/quit\nnever read\n")
    assert chat(monkeypatch, model, script) == 0
    expected = [*answers(llm, "Hello", "Why?"), *answers(llm, "Why?")]
    assert expected[1] != expected[2], "the history makes a difference"
    assert capsys.readouterr().out == "".join(text + "\n" for text in expected)


def test_a_system_message_comes_first_and_survives_new(model, llm, monkeypatch, capsys) -> None:
    assert chat(monkeypatch, model, io.StringIO("Hello\n/new\nHello\n"), "--system", "Be brief.") == 0
    (text,) = answers(llm, "Hello", system="Be brief.")
    assert text != answers(llm, "Hello")[0]
    assert capsys.readouterr().out == f"{text}\n{text}\n"


def test_a_terminal_shows_a_prompt_the_commands_and_why_an_answer_ends(model, llm, monkeypatch, capsys) -> None:
    assert chat(monkeypatch, model, Terminal("Hello\n/exit\nWhy?\n")) == 0
    first, second = answers(llm, "Hello", "Why?")
    captured = capsys.readouterr()
    assert captured.out == f"> {first}\n> > {second}\n> \n"
    lines = captured.err.splitlines()
    cut = "the answer ends here because of --max-tokens or --max-model-len"
    assert [line for line in lines if HELP in line or line == cut] == [HELP, cut, f"/exit is no command: {HELP}", cut]


def test_a_refused_message_is_no_part_of_the_conversation_at_a_terminal(model, llm, monkeypatch, capsys) -> None:
    assert chat(monkeypatch, model, Terminal(f"Hello\n{TOO_LONG}\nWhy?\n")) == 0
    first, second = answers(llm, "Hello", "Why?")
    captured = capsys.readouterr()
    assert captured.out == f"> {first}\n> > {second}\n> \n"
    assert "nanovllm: error: prompt 0: a prompt must be shorter than --max-model-len 160 tokens" in captured.err
    assert "/new starts another one" in captured.err


class TerminalOfBytes(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def test_bytes_that_are_no_text_are_refused_at_a_terminal_and_the_conversation_goes_on(
    model, llm, monkeypatch, capsys
) -> None:
    terminal = TerminalOfBytes(io.BytesIO(b"Hello\n\xff\nWhy?\n"), encoding="utf-8", errors="surrogateescape")
    assert chat(monkeypatch, model, terminal) == 0
    first, second = answers(llm, "Hello", "Why?")
    captured = capsys.readouterr()
    assert captured.out == f"> {first}\n> > {second}\n> \n"
    assert "standard input must be text in utf-8, and byte 0xff in line 2 cannot be decoded" in captured.err


def test_a_refused_message_ends_a_chat_without_a_terminal(model, monkeypatch, capsys) -> None:
    assert chat(monkeypatch, model, io.StringIO(f"{TOO_LONG}\nWhy?\n")) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "must be shorter than --max-model-len 160" in captured.err.splitlines()[-1]


class InterruptedOutput(io.StringIO):
    """Standard output during which Ctrl-C is pressed: while the text of an answer is written, `times` times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def write(self, text: str) -> int:
        number = super().write(text)
        if text.strip():
            for _ in range(self.times):
                signal.raise_signal(signal.SIGINT)
            self.times = 0
        return number


def test_ctrl_c_ends_an_answer_and_the_conversation_goes_on(model, llm, monkeypatch) -> None:
    output = InterruptedOutput(times=1)
    monkeypatch.setattr(sys, "stdout", output)
    handler = signal.getsignal(signal.SIGINT)
    assert chat(monkeypatch, model, io.StringIO("Hello\nWhy?\n")) == 0
    whole = answers(llm, "Hello")[0]
    begun = output.getvalue().split("\n")[0]
    assert whole.startswith(begun)
    assert 0 < len(begun) < len(whole)
    conversation = [("user", "Hello"), ("assistant", begun), ("user", "Why?")]
    messages = [{"role": role, "content": content} for role, content in conversation]
    params = SamplingParams.greedy(max_tokens=8, ignore_eos=True)
    assert output.getvalue() == f"{begun}\n{llm.chat(messages, params, use_tqdm=False)[0]['text']}\n"
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_twice_ends_the_chat(model, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "stdout", InterruptedOutput(times=2))
    assert chat(monkeypatch, model, io.StringIO("Hello\nWhy?\n")) == cli.INTERRUPTED
    assert capsys.readouterr().err.endswith("nanovllm: interrupted\n")


def test_a_model_without_a_chat_template_is_refused(monkeypatch, capsys) -> None:
    assert chat(monkeypatch, tiny_model("llama"), io.StringIO("Hello\n")) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("nanovllm: error: --model must have a chat template")
    assert "nanovllm generate" in line


def test_the_bundled_model_has_no_template_so_a_model_must_be_named(capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["chat"])
    assert "required: --model" in capsys.readouterr().err
