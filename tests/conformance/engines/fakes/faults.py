"""FAULTS: engines that break one contract each, in ways that engines of this kind have broken it."""

import contextlib
import itertools
import json
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from tests.conformance.engines.fakes.plain import PlainLLM, SamplingParams


class PaddingIsRead(PlainLLM, breaks="E01"):
    def context(self, index: int, generated: list[int]) -> list[int]:
        padding = max(map(len, self.prompts)) - len(self.prompts[index])
        return [0] * padding + super().context(index, generated)


class OneSampledRequestSamplesAll(PlainLLM, breaks="E01"):
    def run(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[Any]:
        top_k = 1 if all(one.top_k == 1 for one in params) else None
        return super().run(prompts, [replace(one, top_k=top_k) for one in params])


class OutputsAsTheyFinish(PlainLLM, breaks="E02"):
    def run(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[Any]:
        return sorted(super().run(prompts, params), key=lambda output: len(output["token_ids"]))


class OutputsInReverse(PlainLLM, breaks=""):  # E02 and others
    def run(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[Any]:
        return super().run(prompts, params)[::-1]


class ChunkLosesItsFirstToken(PlainLLM, breaks="E03"):
    def context(self, index: int, generated: list[int]) -> list[int]:
        first = sum(map(len, self.prompts[:index]))  # number of tokens computed before
        context = super().context(index, generated)
        boundary = -first % self.max_num_batched_tokens
        return context[:boundary] + context[boundary + 1 :] if 0 < boundary < len(self.prompts[index]) else context


class BlocksAreFoundByTheirTokensAlone(PlainLLM, breaks="E04"):
    """D09: the tokens before a block are not compared."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.cached: dict[tuple[int, ...], list[int]] = {}  # tokens of a block -> all up to its end, as first seen

    def context(self, index: int, generated: list[int]) -> list[int]:
        prompt, size = self.prompts[index], self.block_size
        for end in range(size, len(prompt) + 1, size):
            first_seen = self.cached.setdefault(tuple(prompt[end - size : end]), prompt[:end])
            if len(first_seen) == end:
                prompt = first_seen + prompt[end:]
        return [*prompt, *generated]


class PromptThatIsFullyCachedLosesItsLastToken(PlainLLM, breaks="E04"):
    """D05: nothing is left to compute."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.cached: set[tuple[int, ...]] = set()

    def complete(self, index: int) -> dict[str, Any]:
        output = super().complete(index)
        self.cached.add(tuple(self.prompts[index]))
        return output

    def context(self, index: int, generated: list[int]) -> list[int]:
        prompt = self.prompts[index]
        is_full = len(prompt) % self.block_size == 0 and tuple(prompt) in self.cached
        return [*(prompt[:-1] if is_full else prompt), *generated]


class PreemptedTextStartsAgain(PlainLLM, breaks="E05"):
    def run(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[Any]:
        outputs = super().run(prompts, params)
        if sum(map(self.blocks_of, prompts, params)) > self.num_blocks:
            token_ids = outputs[-1]["token_ids"]
            token_ids[10:] = token_ids[:-10]
        return outputs


class ForgetsTheBeginningAfterEightTokens(PlainLLM, breaks="E06"):
    def context(self, index: int, generated: list[int]) -> list[int]:
        return super().context(index, generated)[len(generated) > 8 :]


class CutsLongPrompts(PlainLLM, breaks="E06"):
    def context(self, index: int, generated: list[int]) -> list[int]:
        return [*self.prompts[index][-64:], *generated]


class IgnoresTheSeed(PlainLLM, breaks="E07"):
    numbers = itertools.count()

    def seed(self, index: int) -> int:
        return next(self.numbers)


class SeedOfThePlaceInTheBatch(PlainLLM, breaks="E07"):
    def seed(self, index: int) -> int:
        return super().seed(index) + 100 * index


class TemperaturesLeaveGreedyRowsOut(PlainLLM, breaks="E07"):
    """D57: the temperatures of the sampled requests are taken from the first rows of the batch."""

    def run(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[Any]:
        sampled = [one.temperature for one in params if one.top_k is None]
        sampled += [1.0] * (len(params) - len(sampled))
        return super().run(prompts, [replace(one, temperature=t) for one, t in zip(params, sampled, strict=True)])


class OneSeedForAll(PlainLLM, breaks="E07"):
    def seed(self, index: int) -> int:
        return 5


class OneTokenMore(PlainLLM, breaks="E08"):
    def complete(self, index: int) -> dict[str, Any]:
        output = super().complete(index)
        if len(output["token_ids"]) == self.params[index].max_tokens:
            output["token_ids"].append(self.next_token(index, output["token_ids"]))
        return output


class CutsTheLastToken(PlainLLM, breaks="E08"):
    def complete(self, index: int) -> dict[str, Any]:
        output = super().complete(index)
        del output["token_ids"][self.params[index].max_tokens - 1 :]
        return output


class OutgrowsMaxModelLen(PlainLLM, breaks="E08"):
    """D11"""

    def max_tokens_that_fit(self, index: int) -> int:
        return self.params[index].max_tokens


class RunsOn(PlainLLM, breaks="E09", changes={"ignore_eos": True}):
    pass


class NeverIgnoresTheEnd(PlainLLM, breaks="E09", changes={"ignore_eos": False}):
    pass


class IgnoresStopTokens(PlainLLM, breaks="E10", changes={"stop_token_ids": ()}):
    pass


class EndsAtTheFirstTokenOnly(PlainLLM, breaks="E09"):
    """D70"""

    place = 0

    @property
    def ends(self) -> set[int]:
        ids = json.loads((Path(self.model) / "config.json").read_text())["eos_token_id"]
        return {ids[self.place] if isinstance(ids, list) else ids}


class EndsAtTheLastTokenOnly(EndsAtTheFirstTokenOnly):
    place = -1


class KeepsTheStopString(PlainLLM, breaks="E11"):
    def complete(self, index: int) -> dict[str, Any]:
        output, params = super().complete(index), self.params[index]
        return output if params.stop is None else {**output, "text": output["text"] + params.stop}


class AnswersOldRequestsAfterAnError(PlainLLM, breaks="E12"):
    """D18: those of the call that failed are still in the queue."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.queue: list[tuple[list[int], SamplingParams]] = []

    def run(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[Any]:
        self.queue += zip(prompts, params, strict=True)
        outputs = super().run(*map(list, zip(*self.queue, strict=True)))
        self.queue.clear()
        return outputs[: len(prompts)]


class IsLostAfterAnError(PlainLLM, breaks="E12"):
    is_lost = False

    def run(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[Any]:
        if self.is_lost:
            raise RuntimeError("the engine has stopped")
        self.is_lost = True
        outputs = super().run(prompts, params)
        self.is_lost = False
        return outputs


class LeaksABlock(PlainLLM, breaks="E13"):
    def run(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[Any]:
        self.num_free_blocks -= 1
        return super().run(prompts, params)


class CloseLeavesAProcess(PlainLLM, breaks="E14"):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        process = subprocess.Popen([sys.executable, "-S", "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
        weakref.finalize(self, process.communicate)


class CloseLeavesAFile(PlainLLM, breaks="E14"):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        weakref.finalize(self, os.close, os.open(os.devnull, os.O_RDONLY))


class CloseKeepsTheTensors(PlainLLM, breaks="E14"):
    def close(self) -> None:
        pass


class IsHeldUntilItIsClosed(PlainLLM, breaks="E15"):
    """D34: something global, as an atexit handler, refers to the engine."""

    held: ClassVar[list[PlainLLM]] = []

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.held.append(self)

    def close(self) -> None:
        super().close()
        with contextlib.suppress(ValueError):
            self.held.remove(self)


class AcceptsWhatNeverFits(PlainLLM, breaks="E16", accepted="more blocks than exist"):
    pass


class AcceptsNoTokens(PlainLLM, breaks="E17", accepted="max_tokens of 0"):
    pass


class AcceptsNegativeIds(PlainLLM, breaks="E17", accepted="a negative token id"):
    pass


class CutsPromptsThatAreTooLong(PlainLLM, breaks="E17", accepted="a prompt longer than max_model_len"):
    pass


class DropsPromptsWithoutParams(PlainLLM, breaks="E17"):
    """D68"""

    def check_call(self, prompts: list[list[int]], params: list[SamplingParams]) -> None:
        del prompts[len(params) :]


class EmptyPromptIsAnIndexError(PlainLLM, breaks="E17", accepted="an empty prompt"):
    """D12"""


class RefusalLeavesTheOthersInTheQueue(AnswersOldRequestsAfterAnError, breaks="E17"):
    """The requests before a wrong one are queued when it is refused, and answered by the next call."""

    def check(self, prompt: list[int], params: SamplingParams) -> None:
        try:
            super().check(prompt, params)
        except ValueError as error:
            if "vocabulary" in str(error):
                self.queue.append(([1, 2, 3], params))
            raise

    def run(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[Any]:
        try:
            return super().run(prompts, params)
        finally:
            self.queue.clear()


FAULTS: list[Any] = [value for value in [*globals().values()] if getattr(value, "breaks", "")]
