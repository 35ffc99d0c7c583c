"""Adds requests to a target's scheduler, with the checks of LLMEngine.add_request if that runs here."""

from types import SimpleNamespace
from typing import Any

from tests.conformance.components.adapters.construction import call_with
from tests.conformance.components.adapters.names import PROMPTS, WAITING
from tests.conformance.components.loading import NotRecognised
from tests.conformance.components.sizes import EOS


def add(adapter: Any, tokens: list[int], temperature: float, max_tokens: int, ignore_eos: bool) -> Any:
    """The sequence of the new request."""
    options: dict[str, Any] = {"temperature": temperature, "max_tokens": max_tokens, "ignore_eos": ignore_eos}
    params = _params(adapter, options)
    if not no_submit(adapter):
        return _submit(adapter, tokens, params)
    number = next(adapter.ids)
    values = options | {
        "token_ids": tokens,
        "prompt_token_ids": tokens,
        "sampling_params": params,
        "params": params,
        "block_size": adapter.setup.block_size,
        "seq_id": number,
        "request_id": str(number),
        "seed": 0,
    }
    seq = call_with(adapter.sequence_class, values, "Sequence", adapter.config)
    adapter.scheduler.add(seq)
    return seq


def _params(adapter: Any, options: dict[str, Any]) -> Any:
    params_class = adapter.found.get("SamplingParams")
    return None if params_class is None else call_with(params_class, options, "SamplingParams")


def no_submit(adapter: Any) -> str:
    """Why LLMEngine.add_request is not asked, "" if it is."""
    return adapter.once("no_submit", _reason_against_submit)


def _reason_against_submit(trial: Any) -> str:
    if "LLMEngine" not in trial.found:
        return trial.found["reasons"].get("LLMEngine", "") or "no class LLMEngine"
    try:
        seq = _submit(trial, [1, 1], _params(trial, {"temperature": 1.0, "max_tokens": 1, "ignore_eos": False}))
        return "" if len(seq) == 2 else "LLMEngine.add_request makes another sequence of the tokens"
    except (Exception, NotRecognised) as error:
        return f"LLMEngine.add_request does not run without an engine: {type(error).__name__}: {error}"


def _submit(adapter: Any, tokens: list[int], params: Any) -> Any:
    engine = object.__new__(adapter.found["LLMEngine"])
    engine.scheduler, engine.config = adapter.scheduler, adapter.config
    engine.tokenizer = SimpleNamespace(eos_token_id=EOS, encode=list)
    before = {id(seq) for seq in adapter.queue(WAITING)}
    values = dict.fromkeys(PROMPTS, tokens) | {"sampling_params": params, "params": params}
    call_with(engine.add_request, values, "add_request", adapter.config)
    added = [seq for seq in adapter.queue(WAITING) if id(seq) not in before]
    if len(added) != 1:
        raise NotRecognised(f"LLMEngine.add_request adds {len(added)} sequences to the waiting queue")
    return added[0]
