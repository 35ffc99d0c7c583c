"""Streaming chat: one line of standard input is one message; the answer appears while it is generated.

    python -m examples.streaming_chat [MODEL]

The whole conversation is sent with each message. The whole KV blocks of its beginning are found in the prefix cache, so
each message computes only the new tokens and a part of a block.
"""

import sys

from nanovllm import LLM, SamplingParams, bundled_model_path

# For models without a chat template, such as the bundled one, which continues any text.
PLAIN_TEMPLATE = "{% for message in messages %}{{ message.content }}{% if not loop.last %}\n{% endif %}{% endfor %}"
PARAMS = SamplingParams(temperature=0.7, max_tokens=40, seed=0)


def main(model: str) -> None:
    messages: list[dict[str, str]] = []
    with LLM(model) as llm:
        template = None if getattr(llm.tokenizer, "chat_template", None) else PLAIN_TEMPLATE
        print("a line is a message; an empty line or Ctrl-D ends", file=sys.stderr)
        while line := sys.stdin.readline().strip():
            messages.append({"role": "user", "content": line})
            answer = ""
            for piece in llm.chat_stream(messages, PARAMS, chat_template=template):
                print(piece["text"], end="", flush=True)
                answer += piece["text"]
            print()
            messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(bundled_model_path()))
