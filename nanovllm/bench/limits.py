"""The physical limit of a scenario: how fast any engine could serve it on a device with given ceilings.

docs/performance.md, "The physical limit", has the formulas, what they leave out and what they assume. A multiplication
and an addition are two operations.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from nanovllm.bench.workload import Requests
from nanovllm.model_config import ModelConfig
from nanovllm.parameter_counts import layer_parameters, mlp_parameters, parameters_per_token

BYTES_PER_VALUE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Ceilings:
    """What the device reached in this run: memory in bytes a second, matmul in operations a second."""

    memory: float
    matmul: float

    def scaled(self, factor: float) -> "Ceilings":
        """Those of `factor` devices together."""
        return Ceilings(factor * self.memory, factor * self.matmul)


class StepWork(NamedTuple):
    """The least bytes that a step moves, and the least operations that it computes."""

    num_bytes: float
    operations: float


@dataclass(frozen=True)
class Limit:
    """The least seconds of prefill and decode, and which ceiling sets most of each: "memory" or "matmul"."""

    prefill_seconds: float
    decode_seconds: float
    prefill_ceiling: str
    decode_ceiling: str

    @property
    def seconds(self) -> float:
        return self.prefill_seconds + self.decode_seconds


def limit(model: ModelConfig, dtype: str, requests: Requests, num_shared: int, ceilings: Ceilings) -> Limit:
    """The limit of `requests` that are all present at the start and generate max_tokens each.

    dtype: of weights and KV cache. num_shared: length of the prefix that all prompts share.
    """
    lengths = [(len(prompt), params.max_tokens) for prompt, params in zip(*requests, strict=True)]
    prefill = _seconds([prefill_work(model, dtype, lengths, num_shared)], ceilings)
    decode = _seconds(decode_works(model, dtype, lengths, num_shared), ceilings)
    return Limit(prefill[0], decode[0], prefill[1], decode[1])


def _seconds(works: Iterable[StepWork], ceilings: Ceilings) -> tuple[float, str]:
    """The seconds of all steps, and the ceiling that sets most of them."""
    by_ceiling = {"memory": 0.0, "matmul": 0.0}
    for work in works:
        moving, computing = work.num_bytes / ceilings.memory, work.operations / ceilings.matmul
        by_ceiling["memory" if moving >= computing else "matmul"] += max(moving, computing)
    return sum(by_ceiling.values()), max(by_ceiling, key=by_ceiling.__getitem__)


def prefill_work(model: ModelConfig, dtype: str, lengths: list[tuple[int, int]], num_shared: int) -> StepWork:
    """One step over all prompts. lengths: (prompt, output) tokens of each request."""
    num_tokens = num_shared + sum(prompt - num_shared for prompt, _ in lengths)
    pairs = _causal_pairs(num_shared) + sum(_causal_pairs(p) - _causal_pairs(num_shared) for p, _ in lengths)
    sampled_pairs = sum(prompt for prompt, _ in lengths)
    return _work(model, dtype, num_tokens, len(lengths), num_tokens, pairs, sampled_pairs)


def decode_works(model: ModelConfig, dtype: str, lengths: list[tuple[int, int]], num_shared: int) -> Iterator[StepWork]:
    """The decode steps. Step t computes generated token t of each request that has more than t output tokens."""
    for step in range(1, max(output for _, output in lengths)):
        contexts = [prompt + step for prompt, output in lengths if output > step]
        own_keys = sum(contexts) - num_shared * len(contexts)
        num_seqs, pairs = len(contexts), sum(contexts)
        yield _work(model, dtype, num_seqs, num_seqs, num_shared + own_keys, pairs, pairs)


def _causal_pairs(length: int) -> int:
    """Pairs of a query and a key that it attends to: 1 + 2 + ... + length."""
    return length * (length + 1) // 2


def _work(
    model: ModelConfig,
    dtype: str,
    num_tokens: int,
    num_rows: int,
    num_keys_moved: int,
    num_pairs: int,
    num_sampled_pairs: int,
) -> StepWork:
    """The work of one step.

    num_rows: rows of logits that are sampled. num_keys_moved: tokens whose key and value are read or written in each
        layer. num_pairs: pairs of a query and a key in a layer. num_sampled_pairs: those whose query is sampled.
    """
    bytes_per_value = BYTES_PER_VALUE[dtype]
    lm_head = model.hidden_size * model.vocab_size
    keys = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * num_keys_moved
    all_pairs = (model.num_hidden_layers - 1) * num_pairs + num_sampled_pairs
    attention = 4 * model.num_attention_heads * model.head_dim * all_pairs
    last = _parameters_after_last_keys(model)
    products = num_tokens * (parameters_per_token(model) - last) + num_rows * (last + lm_head)
    return StepWork(
        num_bytes=bytes_per_value * (layer_parameters(model, num_tokens) + lm_head + keys),
        operations=2 * products + attention,
    )


def _parameters_after_last_keys(model: ModelConfig) -> float:
    """Parameters of the last layer with which a token is multiplied, without the key and value projections."""
    experts = 0 if model.moe is None else model.moe.num_experts_per_tok
    query_and_output = 2 * model.hidden_size * model.num_attention_heads * model.head_dim
    return query_and_output + mlp_parameters(model, model.num_hidden_layers - 1, experts)
