"""TokenDecoder: a tokenizer's decode method, special tokens and byte tokens."""

from typing import Any

_ANY_ASCII_BYTE = 0x41


class TokenDecoder:
    """What the detokenizer needs of a tokenizer of transformers. Immutable; shared by all requests.

    special_tokens: {token id: text} of the tokens that decoding leaves out.
    byte_tokens: {token id: byte, 128 .. 255} of a byte-fallback vocabulary, in which the token "<0xE2>" is that byte;
        empty for other vocabularies. ASCII bytes are left out: they are decoded like any other token.
    ascii_token: a token of a byte-fallback vocabulary whose text is one ASCII letter; None for other vocabularies.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._decode = tokenizer.decode
        candidates = {
            token_id: token.content
            for token_id, token in getattr(tokenizer, "added_tokens_decoder", {}).items()
            if token.special
        }
        for token_id in getattr(tokenizer, "all_special_ids", ()):
            candidates.setdefault(token_id, tokenizer.convert_ids_to_tokens(token_id))
        self.special_tokens: dict[int, str] = {i: text for i, text in candidates.items() if not self.decode([i])}
        tokens = self._read_byte_tokens(tokenizer)
        self.ascii_token: int | None = tokens.get(_ANY_ASCII_BYTE)
        is_byte_fallback = self.ascii_token is not None
        self.byte_tokens: dict[int, int] = {i: byte for byte, i in tokens.items() if is_byte_fallback and byte >= 0x80}

    def decode(self, token_ids: list[int]) -> str:
        """The tokenizer's text of `token_ids`. Special tokens are left out, spaces are kept as they are."""
        return self._decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _read_byte_tokens(self, tokenizer: Any) -> dict[int, int]:
        """{byte: token id} of the tokens "<0x00>" .. "<0xFF>", without those that decode to these six characters."""
        if not hasattr(tokenizer, "convert_tokens_to_ids"):
            return {}
        names = [f"<0x{byte:02X}>" for byte in range(256)]
        token_ids: list[Any] = tokenizer.convert_tokens_to_ids(names)
        found: dict[int, int] = {}
        for byte, (name, token_id) in enumerate(zip(names, token_ids, strict=True)):
            if token_id is None or tokenizer.convert_ids_to_tokens(token_id) != name:  # it is the unknown token
                continue
            if self.decode([token_id]) != name:
                found[byte] = token_id
        return found
