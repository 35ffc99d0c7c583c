"""Forty prompts for a real model: chats, Chinese, code, emoji, other texts, and long contexts."""

# ruff: noqa: RUF001  Chinese punctuation is what these prompts are about

from typing import Any

from tests.support.source_tree import ROOT

QUESTIONS = [
    "What is the capital of France?",
    "Name the first three planets from the Sun.",
    "Write a haiku about autumn rain.",
    "How many days has a leap year, and why?",
    "Explain gravity to a child in two sentences.",
    "Translate 'good morning' into Spanish.",
    "Is 91 a prime number? Show your steps.",
    "What is 12 * 12 + 7?   Answer with one number.",
    "List five fruits, separated by commas.",
    "Tell me a very short story about a lighthouse.",
    "Say nothing but the word yes.",
    "Who wrote Hamlet?",
]
CHINESE = [
    "你好，请介绍一下你自己。",
    "中国的首都是哪里？",
    "把“谢谢”翻译成英语。",
    "春天来了，花儿开了，",
    "一二三四五六七",
    "日本語と中文 mixed text，怎么办？",
]
CODE = [
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "for (int i = 0; i < 10; i++) {\n\tprintf(",
    "SELECT name, COUNT(*) FROM users\nWHERE age > 21\nGROUP BY",
    '{"name": "Ada", "born": 1815, "languages": [',
    "#!/bin/sh\nset -eu\nfor file in *.txt; do\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "<html>\n  <body>\n    <h1>Title</h1>\n",
]
EMOJI = [
    "🙂🙂🙂",
    "I love pizza 🍕 and",
    "👨‍👩‍👧‍👦 is a family, and 🏳️‍🌈 is",
    "Weather: ☀️ 25°C, 🌧️ 12°C,",
    "🎉 Happy birthday! 🎂",
]
OTHER_TEXTS = [
    "Once upon a time",
    "The",
    " ",
    "\n\n",
    "1 1 2 3 5 8   13",
    "Zażółć gęślą jaźń — naïve café, Straße, Ωμέγα",
]
PLAIN_TEXTS = CHINESE[3:] + CODE + EMOJI + OTHER_TEXTS
# Slices of a text, of which two begin alike, with a question after each.
LONG = [((0, 1100), "Who made the light?"), ((0, 1100), "What was on the third day?")]
LONG += [((1100, 2000), "Summarise this in one sentence."), ((3000, 3600), "Which animals are named?")]


def forty_prompts(tokenizer: Any) -> list[list[int]]:
    """Token ids of chats of one to three messages, of long contexts, and of texts without the chat template."""
    text = tokenizer.encode((ROOT / "tools/bundled_model/text.txt").read_text(encoding="utf-8"))
    contexts = [f"{tokenizer.decode(text[slice(*part)])}\n\n{question}" for part, question in LONG]
    chats = [[{"role": "user", "content": content}] for content in QUESTIONS + CHINESE[:3] + contexts]
    chats[0] += [{"role": "assistant", "content": "Paris."}, {"role": "user", "content": "And of Italy?"}]
    chats[1].insert(0, {"role": "system", "content": "You are a pirate. Answer in the voice of one."})
    options = {"add_generation_prompt": True, "return_dict": True}
    prompts = [tokenizer.apply_chat_template(chat, **options)["input_ids"] for chat in chats]
    return prompts + [tokenizer.encode(prompt) for prompt in PLAIN_TEXTS]
