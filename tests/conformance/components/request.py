"""Request: what must happen to one sequence. Flight: a step with the tokens that come of it."""

from dataclasses import dataclass, field
from typing import Any

from tests.conformance.components.adapters.steps import Scheduled
from tests.conformance.components.sizes import EOS


@dataclass(eq=False)
class Request:
    """What must happen to one sequence.

    num_hit_tokens: found in the prefix cache at the latest admission. is_admitted: whether it holds blocks.
    """

    seq: Any
    prompt: list[int]
    max_tokens: int
    ignore_eos: bool
    temperature: float
    number: int
    output: list[int] = field(default_factory=list)
    num_hit_tokens: int = 0
    is_admitted: bool = False
    was_preempted: bool = False
    is_finished: bool = False
    is_swapped: bool = False  # its blocks are on the CPU
    num_in_flight: int = 0  # the last tokens of output, which postprocess() has not been given
    was_caught: bool = False  # preempted while a token was in flight
    was_aborted: bool = False

    @property
    def table(self) -> list[int]:
        """Its blocks in the KV cache."""
        return [] if self.is_swapped else list(self.seq.block_table)

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.output

    @property
    def known(self) -> list[int]:
        """The tokens without those in flight."""
        return self.tokens[: len(self.tokens) - self.num_in_flight]

    @property
    def must_end(self) -> str | None:
        """The contract that makes the request end with its last known token."""
        return self._ending(self.known[len(self.prompt) :])

    @property
    def has_ended_ahead(self) -> bool:
        """Whether a token in flight ends it, which the target cannot know."""
        return self._ending(self.output) is not None

    def _ending(self, output: list[int]) -> str | None:
        if len(output) >= self.max_tokens:
            return "C21"
        return "C22" if output and output[-1] == EOS and not self.ignore_eos else None


@dataclass(eq=False)
class Flight:
    """A submitted step: what schedule() returned, and its sequences with the token that each of them gets."""

    result: Any
    rows: list[tuple[Scheduled, int]]
