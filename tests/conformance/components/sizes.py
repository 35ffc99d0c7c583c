"""Setup: the sizes of one engine."""

from dataclasses import dataclass, fields
from typing import Any

EOS = 2  # the end-of-sequence token of every engine


@dataclass(frozen=True)
class Setup:
    block_size: int = 2
    num_blocks: int = 8
    max_num_seqs: int = 4
    max_num_batched_tokens: int = 64
    max_model_len: int = 0  # 0: one more than the cache holds
    weak_hash: bool = False
    is_async: bool = False  # each step is scheduled before the tokens of the one in front of it are known

    @property
    def num_slots(self) -> int:
        return self.num_blocks * self.block_size

    @property
    def longest(self) -> int:
        """How many tokens a sequence may have."""
        return self.max_model_len or self.num_slots + 1

    @property
    def given(self) -> dict[str, Any]:
        """The sizes that are no defaults."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) != field.default}
