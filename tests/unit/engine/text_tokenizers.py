"""Tokenizers of the two kinds that split characters into bytes, from the tokenizers library, and their definition.

A KnownTokenizer says which bytes each token stands for, so that a text can be computed without any tokenizer.
"""

import functools
from dataclasses import dataclass
from typing import Any

SPECIAL = ("<s>", "</s>", "<|im_end|>")  # the last one has no role (bos, eos, ...)
WORDS = (" the", " a", "b", "é", "END", " ", "<", ">", "\n")


@dataclass(frozen=True)
class KnownTokenizer:
    """token_bytes: of each token id; None is a special token. strips_first_space: as SentencePiece does."""

    tokenizer: Any
    token_bytes: tuple[bytes | None, ...]
    strips_first_space: bool

    def id_of(self, token: str | bytes) -> int:
        """Id of a special token, given by its name, or of the bytes of another."""
        if isinstance(token, str):
            return self.tokenizer.convert_tokens_to_ids(token)
        return self.token_bytes.index(token)

    def text(self, token_ids: list[int]) -> str:
        """Definition: the bytes of all tokens, decoded as Python does it."""
        text = b"".join(self.token_bytes[token_id] or b"" for token_id in token_ids).decode(errors="replace")
        return text.removeprefix(" ") if self.strips_first_space else text

    def text_after(self, prompt: list[int], completion: list[int]) -> str:
        """Definition: what follows the prompt's text; a character that only the completion completes included."""
        before, whole = self.text(prompt), self.text(prompt + completion)
        return whole.removeprefix(before) if whole.startswith(before) else whole.removeprefix(before[:-1])


@functools.cache
def byte_fallback() -> KnownTokenizer:
    """As Llama 2 and TinyLlama: "▁" is a space, bytes that no token covers are "<0x00>" .. "<0xFF>"."""
    from tokenizers import Tokenizer, decoders, models

    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *(word.replace(" ", "▁") for word in WORDS)]
    vocab = {name: token_id for token_id, name in enumerate(names)}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    token_bytes = [None, *(bytes([byte]) for byte in range(256)), *(word.encode() for word in WORDS)]
    return _known(backend, token_bytes, strips_first_space=True)


@functools.cache
def byte_level() -> KnownTokenizer:
    """As GPT-2, Qwen and Llama 3: a token is any bytes, written with one letter a byte."""
    from tokenizers import Tokenizer, decoders, models
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    parts = [b"\xf0\x9f", b"\x99\x82", b"\x82a", b"\xe2\x82", *(word.encode() for word in WORDS if len(word) > 1)]
    token_bytes: list[bytes | None] = [*(bytes([byte]) for byte in range(256)), *parts]
    vocab = {"".join(letters[byte] for byte in item or b""): token_id for token_id, item in enumerate(token_bytes)}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.decoder = decoders.ByteLevel()
    return _known(backend, token_bytes, strips_first_space=False)


@functools.cache
def word_tokenizer(decoder: str | None) -> Any:
    """Five words; `decoder` is the name of a decoder of the tokenizers library."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = ["##s", "b", "▁a", "▁", "."]
    backend = Tokenizer(models.WordLevel({word: token_id for token_id, word in enumerate(words)}, unk_token="b"))
    if decoder is not None:
        backend.decoder = getattr(decoders, decoder)()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def _known(backend: Any, token_bytes: list[bytes | None], strips_first_space: bool) -> KnownTokenizer:
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    backend.add_special_tokens([AddedToken(name, special=True) for name in ("<unk>", *SPECIAL)])
    bos = ("<s>", backend.token_to_id("<s>"))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    num_special = backend.get_vocab_size() - len(token_bytes)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    return KnownTokenizer(tokenizer, (*token_bytes, *[None] * num_special), strips_first_space)
