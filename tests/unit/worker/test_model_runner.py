"""ModelRunner's steps with several ranks, without a model: how the tokens of one step reach the next on each rank."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.layers.torch_ops import TORCH_OPS
from nanovllm.worker.cuda_graph import GraphSizes
from nanovllm.worker.model_runner import ModelRunner
from tests.support.parallel_ranks import run_over_gloo

LARGEST = 151935  # beyond what half precision holds


def runner_of(tp: Any, **parts: Any) -> Any:
    runner: Any = ModelRunner.__new__(ModelRunner)
    vars(runner).update(
        tp=tp,
        device=torch.device("cpu"),
        num_threads=None,
        model_config=SimpleNamespace(vocab_size=LARGEST + 1),
        ops=TORCH_OPS,
        sampler=SimpleNamespace(sample_unfiltered=lambda logits, *columns: logits.argmax(dim=1) + columns[0].long()),
        prefill_graphs=None,
        _has_shared_tokens=False,
        **parts,
    )
    return runner


def test_every_rank_gets_the_tokens_that_rank_0_samples(tmp_path: Path) -> None:
    def work(tp: TensorParallel) -> list[int]:
        logits = torch.eye(3)[:2] if tp.rank == 0 else None
        token_ids = runner_of(tp)._sample_for_all_ranks(logits, torch.tensor([LARGEST, 0]))
        assert token_ids.dtype == torch.int64
        return token_ids.tolist()

    assert run_over_gloo(tmp_path, work) == [[LARGEST, 1]] * 2


def test_a_vocabulary_beyond_what_graphs_exchange_is_refused() -> None:
    runner = runner_of(SimpleNamespace(size=2))
    runner.model_config.vocab_size = 2**24 + 1
    with pytest.raises(ValueError, match=r"vocab_size must be at most 16777216 .* got 16777217; set enforce_eager"):
        runner.capture_graphs(GraphSizes([1], [], []))


@pytest.mark.parametrize(
    ("before", "is_broadcast"),
    [("graph", False), ("graph with a filtered row", True), ("no graph", True), ("graph, then no graph", True)],
)
def test_only_tokens_that_no_graph_has_shared_are_broadcast(
    before: str, is_broadcast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    graphs = SimpleNamespace(
        sampled=torch.tensor([7, 8, 9]),
        can_replay=lambda model_input: model_input.has_graph,
        replay=lambda model_input, previous: (None, calls.append(f"replay after {previous}")),
    )
    tp = SimpleNamespace(broadcast=lambda x: calls.append("broadcast") or x + 1)
    runner = runner_of(tp, graphs=graphs)
    monkeypatch.setattr(ModelRunner, "_compute_logits", lambda *_: None)

    def step(has_graph: bool, filtered_rows: list[int], previous: torch.Tensor | None = None) -> None:
        sampling = SimpleNamespace(filtered_rows=filtered_rows)
        source = None if previous is None else np.array([0, 1])
        runner._execute(SimpleNamespace(has_graph=has_graph, sampling=sampling, input_ids_source=source), previous)

    if before != "no graph":
        step(True, [1] if before == "graph with a filtered row" else [])
    if before.endswith("no graph"):
        step(False, [])
    calls.clear()
    step(True, [], torch.zeros(2, dtype=torch.int64))
    assert calls == (["broadcast", "replay after tensor([1, 1])"] if is_broadcast else ["replay after tensor([7, 8])"])
