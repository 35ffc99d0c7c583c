"""ModelRunner's steps with several ranks, without a model: how the tokens of one step reach the next on each rank."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nanovllm.worker import model_runner
from nanovllm.worker.model_runner import ModelRunner


class Sampled:
    """In place of the sampler, and of its token ids."""

    def __call__(self, logits: object, rows: object) -> torch.Tensor:
        return torch.tensor([7, 8])

    def sample_filtered(self, *_: object) -> None: ...


def runner_of(tp: Any, **parts: Any) -> Any:
    runner: Any = ModelRunner.__new__(ModelRunner)
    vars(runner).update(
        tp=tp,
        device=torch.device("cpu"),
        num_threads=None,
        sampler=Sampled(),
        _shared_tokens=None,
        _unchecked_dir=None,
        **parts,
    )
    return runner


@pytest.mark.parametrize("is_filtered", [False, True])
@pytest.mark.parametrize("has_graph", [False, True])
def test_only_tokens_of_steps_with_filtered_rows_are_broadcast(
    has_graph: bool, is_filtered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only rank 0 has the tokens of filtered rows; every rank has those of any other step before."""
    calls: list[str] = []
    graphs = SimpleNamespace(
        can_replay=lambda model_input: model_input.is_replayed,
        replay=lambda model_input, previous: (None, calls.append(f"replay after {previous}") or torch.tensor([7, 8])),
    )
    tp = SimpleNamespace(broadcast=lambda x: calls.append("broadcast") or x + 1)
    runner = runner_of(tp, graphs=graphs)
    monkeypatch.setattr(ModelRunner, "_compute_logits", lambda *_: "logits")
    monkeypatch.setattr(model_runner, "to_device", lambda sampling, device: sampling)

    def step(is_replayed: bool, filtered_rows: list[int], previous: torch.Tensor | None = None) -> None:
        sampling = SimpleNamespace(filtered_rows=filtered_rows)
        source = None if previous is None else np.array([0, 1])
        runner._execute(SimpleNamespace(is_replayed=is_replayed, sampling=sampling, input_ids_source=source), previous)

    step(not has_graph, [])  # its tokens are not those of the step before
    step(has_graph, [1] if is_filtered else [])
    calls.clear()
    step(True, [], torch.zeros(2, dtype=torch.int64))
    assert calls == (["broadcast", "replay after tensor([1, 1])"] if is_filtered else ["replay after tensor([7, 8])"])
