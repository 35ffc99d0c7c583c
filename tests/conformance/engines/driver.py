"""Driver: drives an engine by executing lines of Python. They are the script that a broken contract prints.

So the script is what ran, and not a second description of it.
"""

import gc
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tests.conformance.engines.adapters import Target
from tests.conformance.engines.models import source_of
from tests.conformance.engines.oracle import are_greedy_choices
from tests.support.counts import count_comparisons


class Broken(AssertionError):
    """A contract is broken. script: Python source that shows it. The engine's exception, if any, is the cause."""

    def __init__(self, expected: object, got: object, script: str) -> None:
        super().__init__(f"expected {expected}, got {got}")
        self.expected, self.got, self.script = expected, got, script

    def traceback(self) -> str:
        """Of the engine's exception, from the line of the script on; empty without one."""
        cause = self.__cause__
        if cause is None or cause.__traceback__ is None:
            return ""
        return "".join(traceback.format_exception(type(cause), cause, cause.__traceback__.tb_next))


class NotApplicable(Exception):
    """This engine cannot be held to the contract; the message is the reason."""


@dataclass(frozen=True)
class Request:
    """prompt: token ids or a text. params: of SamplingParams; without a seed and a temperature it is greedy."""

    prompt: Sequence[int] | str
    params: Mapping[str, Any]

    @property
    def is_greedy(self) -> bool:
        return not self.params.keys() & {"seed", "temperature"}


def request(prompt: Sequence[int] | str, max_tokens: int = 12, **params: Any) -> Request:
    return Request(prompt, {"max_tokens": max_tokens, "ignore_eos": True, **params})


@dataclass(frozen=True)
class Output:
    """request: what it answers. token_ids_source, text_source: the expressions of the script that give the two."""

    request: Request
    token_ids: list[int]
    text: str
    token_ids_source: str
    text_source: str


class Driver:
    """One scenario with engines of one target. Use it in a `with` statement, which closes the last engine."""

    def __init__(self, target: Target) -> None:
        self.target, self.adapter = target, target.adapter
        self.lines: list[str] = []
        self.names: dict[str, Any] = {}
        self.model_dir = Path()  # of the last engine
        self._num_calls = 0
        (engine_module, self._engine), (params_module, self._params) = target.engine_class, target.sampling_params_class
        if engine_module == params_module:
            self.run(f"from {engine_module} import {self._engine}, {self._params}")
        else:
            self.run(f"from {engine_module} import {self._engine}")
            self.run(f"from {params_module} import {self._params}")
        self.run("from tests.conformance.engines.models import bundled, tiny")

    def __enter__(self) -> "Driver":
        return self

    def __exit__(self, *_: object) -> None:
        if "llm" in self.names:
            self.close()
        self.names.clear()
        if not self.adapter.close:
            gc.collect()  # deleting it is how such an engine is closed

    # --- lines ---

    def run(self, code: str, expected: str = "no exception") -> None:
        """Execute `code` and add it to the script. Raises Broken if it raises an exception."""
        self.lines.append(code)
        try:
            exec(compile(code, "<the scenario>", "exec"), self.names)
        except Exception as error:
            self.fail(expected, "".join(traceback.format_exception_only(error)).strip(), error)

    def value(self, expression: str) -> Any:
        return eval(expression, self.names)

    def fail(self, expected: object, got: object, cause: BaseException | None = None) -> NoReturn:
        raise Broken(expected, got, "\n".join(self.lines) + "\n") from cause

    # --- engines ---

    def constructor(self, model_dir: Path, num_blocks: int | None = None, **options: Any) -> str:
        """Source that constructs an engine. num_blocks and options override Adapter.options."""
        if num_blocks is not None:
            options[str(self.adapter.num_blocks)] = num_blocks
        options = {**self.adapter.options, **options, **self.target.options}
        arguments = [source_of(model_dir), *(f"{name}={value!r}" for name, value in options.items())]
        return f"{self._engine}({', '.join(arguments)})"

    def open(self, model_dir: Path, **options: Any) -> None:
        """Construct an engine as `llm`, after closing the one before."""
        if "llm" in self.names:
            self.close()
        self.model_dir = model_dir
        self.run(f"llm = {self.constructor(model_dir, **options)}")

    def close(self) -> None:
        self.run(f"{self.adapter.close.format('llm')}; del llm" if self.adapter.close else "del llm")

    # --- calls ---

    def call(self, requests: Sequence[Request], num_params: int | None = None) -> str:
        """Source of a call of generate, with the parameters of the first num_params requests if that is given."""
        prompts = [self._prompt(one.prompt) for one in requests]
        params = [self._sampling_params(one) for one in requests[:num_params]]
        many = f"[{params[0]}] * {len(params)}" if len(params) > 1 and len({*params}) == 1 else f"[{', '.join(params)}]"
        return self.adapter.generate.format("llm", f"[{', '.join(prompts)}]", many)

    def generate(self, requests: Sequence[Request], code: str = "{}") -> list[Output]:
        """Call generate. code: the statement around the assignment. Raises Broken if the number of outputs is wrong."""
        self._num_calls += 1
        name = f"call_{self._num_calls}"
        self.run(code.format(f"{name} = {self.call(requests)}"))
        sources = [f"{name}[{index}]" for index in range(len(requests))]
        try:
            outputs = [self._output(one, source) for one, source in zip(requests, sources, strict=True)]
            number = len(self.names[name])
        except Exception as error:
            self.fail(f"{len(requests)} outputs in the style of {self.adapter.name}", repr(self.names[name]), error)
        if number != len(requests):
            self.run(f"assert len({name}) == {len(requests)}, len({name})", f"{len(requests)} outputs, not {number}")
        return outputs

    def refuse(self, call: str) -> None:
        """Run a call that must raise ValueError or TypeError."""
        code = (
            f"try:\n    {call}\nexcept (ValueError, TypeError):\n    pass\nelse:\n    raise AssertionError('accepted')"
        )
        self.run(code, "ValueError or TypeError")

    def _output(self, one: Request, source: str) -> Output:
        token_ids, text = self.adapter.token_ids.format(source), self.adapter.text.format(source)
        return Output(one, self.value(token_ids), self.value(text), token_ids, text)

    def _prompt(self, prompt: Sequence[int] | str) -> str:
        return repr(prompt) if isinstance(prompt, str) else self.adapter.prompt.format(list(prompt))

    def _sampling_params(self, one: Request) -> str:
        params = {**(self.adapter.greedy if one.is_greedy else {"temperature": 1.0}), **one.params}
        return f"{self._params}({', '.join(f'{name}={value!r}' for name, value in params.items())})"

    # --- comparisons ---

    def same_tokens(self, got: Output, expected: Output | Sequence[int]) -> None:
        """Raises Broken if the tokens differ, but where both continue as rounding permits a greedy request to."""
        is_output = isinstance(expected, Output)
        tokens = expected.token_ids if is_output else list(expected)
        count_comparisons("engine contracts: tokens against those that the contract expects", len(tokens))
        if got.token_ids == tokens or self._is_near_tie(got, tokens):
            return
        self.same(got.token_ids_source, expected.token_ids_source if is_output else repr(tokens))

    def same(self, got: str, expected: str) -> None:
        """Raises Broken if the values of two expressions differ."""
        values = self.value(got), self.value(expected)
        if values[0] != values[1]:
            self.lines.append(f"got, expected = {got}, {expected}")
            self.lines.append('assert got == expected, f"\\ngot      {got}\\nexpected {expected}"')
            self.fail(values[1], values[0])

    def require(self, event: str) -> None:
        """Fail if `event` has not happened in this engine, as far as it shows that: the scenario tests nothing then."""
        if event in self.adapter.events:
            number = self.value(self.adapter.events[event].format("llm"))
            assert number > 0, f"the scenario needs a {event}, and there was none:\n" + "\n".join(self.lines)

    def _is_near_tie(self, got: Output, expected: list[int]) -> bool:
        if not got.request.is_greedy or isinstance(got.request.prompt, str):
            return False
        pairs = zip(got.token_ids, expected, strict=False)
        same = next((index for index, (one, other) in enumerate(pairs) if one != other), None)
        return same is not None and all(
            are_greedy_choices(self.model_dir, got.request.prompt, tokens[: same + 1], self.adapter.dtype)
            for tokens in (got.token_ids, expected)
        )
