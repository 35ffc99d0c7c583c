"""step_model: times against sums that can be checked by hand, and its counts against the limit's and a model's."""

import dataclasses
from typing import Any

import pytest
import torch

from benchmarks.step_model import (
    BATCHES,
    BYTES_PER_TOKEN,
    Batch,
    Cluster,
    Costs,
    Link,
    StepTimes,
    paper_table,
    step_times,
)
from nanovllm.bench.limits import Ceilings, decode_works
from nanovllm.context import Context, set_context
from nanovllm.layers.sampler import Sampler
from nanovllm.layers.torch_ops import TORCH_OPS
from nanovllm.models.decoder import build_model
from nanovllm.models.registry import architectures
from tests.support.checkpoints import counted_by_hand, small_config
from tests.support.parallel_ranks import PartialRank
from tests.support.source_tree import ROOT


@pytest.mark.parametrize(
    ("num_ranks", "matmul", "times"),  # 2 sequences: 4 (3 x (8 x 8 + 2 x 4 x 4 + 3 x 16) + 4 x 8) bytes of activations
    [
        # 2 (1728 + 80) bytes at 4 a second; 2 sequences x 5 tokens x 2 x 3 layers x 4 x 2 bytes; 9 x 3 + 8 kernels
        (1, 1e9, StepTimes(904.0, 120.0, 464.0, 35 * 3.0, 6.0, 0.0, 0.0)),
        (1, 4.0, StepTimes(1808.0, 120.0, 464.0, 105.0, 6.0, 0.0, 0.0)),  # 2 x 2 x (1728 + 80) operations take longer
        # Each rank holds the only key/value head: 4 (3 x (8 x 8 + 2 x 3 x 4 + 3 x 8) + 4 x 8) bytes of activations.
        (2, 1e9, StepTimes(452.0, 120.0, 368.0, 105.0, 6.0, 7 * 10.0, 20.0)),
    ],
)
def test_times_of_a_small_model(num_ranks: int, matmul: float, times: StepTimes) -> None:
    costs = Costs(Ceilings(4.0, matmul), kernel=3.0, sampling=6.0, all_reduce=10.0, gather=20.0)
    found = step_times(counted_by_hand(), "float16", Batch(2, 5), num_ranks, costs)
    assert found == times
    assert found.seconds == sum(times)


def test_key_value_heads_are_divided_among_ranks() -> None:
    """Two heads: a half for each of two ranks, and no less for each of four."""
    model, costs = (
        dataclasses.replace(counted_by_hand(), num_key_value_heads=2),
        Costs(Ceilings(4.0, 1e9), 0.0, 0.0, 0.0, 0.0),
    )
    one, two, four = (step_times(model, "float16", Batch(2, 5), ranks, costs).attention for ranks in (1, 2, 4))
    assert (one, two, four) == (240.0, 120.0, 120.0)


@pytest.mark.parametrize("model_type", architectures())
def test_one_rank_moves_the_bytes_of_the_limit(model_type: str) -> None:
    """Two sequences that attend to five tokens each, at a byte a second."""
    model = small_config(model_type)
    (work,) = decode_works(model, "float32", [(4, 2), (4, 2)], 0)
    times = step_times(model, "float32", Batch(2, 5), 1, Costs(Ceilings(1.0, 1e15), 0.0, 0.0, 0.0, 0.0))
    assert times.matrices + times.attention == pytest.approx(work.num_bytes)


@pytest.mark.parametrize("model_type", architectures())
def test_a_forward_pass_has_so_many_collectives(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted on one of two ranks: 2 L + 1 all-reduces of hidden states, and one all-gather."""
    calls: list[tuple[str, Any]] = []

    def counted(name: str) -> Any:
        def collective(self: Any, x: torch.Tensor) -> torch.Tensor:
            calls.append((name, x.numel() * (x.itemsize if name == "all_gather" else 1)))
            return torch.stack([x, x]) if name == "all_gather" else x

        return collective

    for name in ("all_reduce", "all_gather", "gather"):
        monkeypatch.setattr(PartialRank, name, counted(name))
    config = small_config(model_type, vocab_size=32, num_attention_heads=4, num_key_value_heads=2)
    tp, bounds = PartialRank(0, 2), torch.tensor([0, 3]).int()
    model = build_model(config, TORCH_OPS, tp)
    context = Context(True, torch.full((3,), -1), bounds, bounds, 3, 3, torch.tensor([3]).int(), None)
    with set_context(context), torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        logits = model.compute_logits(model(torch.arange(3), torch.arange(3)))
        number = torch.arange(3)
        Sampler(TORCH_OPS.sample_unfiltered, tp).sample_unfiltered(logits, torch.ones(3), *[number] * 3, number < 0)
    costs = Costs(Ceilings(1.0, 1.0), kernel=0.0, sampling=0.0, all_reduce=1.0, gather=1.0)
    times = step_times(config, "float32", Batch(3, 3), 2, costs)
    assert calls.count(("all_reduce", 3 * config.hidden_size)) == times.all_reduce
    assert calls.count(("all_gather", 3 * BYTES_PER_TOKEN)) == times.gather
    assert len(calls) == times.all_reduce + times.gather


INSIDE, BETWEEN = Link(latency=1.0, bandwidth=10.0), Link(latency=5.0, bandwidth=2.0)
ONE_SHOT = Link(latency=0.5, bandwidth=8.0)


@pytest.mark.parametrize(
    ("ranks", "machines", "all_reduce", "all_gather"),
    [
        (1, 1, 0.0, 0.0),
        (4, 1, 0.5 + 3 * 80 / 8, 1 + 3 * 80 / 10),
        (4, 2, 1 + 12 + (2 * 5 + 2 * 1 / 2 * 20 / 2), 5 + 80 / 2 + 1 + 3 * 160 / 10),  # a ring of two
        # A tree, since a ring has 14 messages; the all-gather is a ring of eight.
        (4, 8, 1 + 12 + (2 * 3 * 5 + 2 * 20 / 2), 7 * (5 + 80 / 2) + 1 + 3 * 640 / 10),
        (1, 2, 2 * 5 + 2 * 1 / 2 * 80 / 2, 5 + 80 / 2),
    ],
)
def test_collectives_of_80_bytes(ranks: int, machines: int, all_reduce: float, all_gather: float) -> None:
    cluster = Cluster(ranks, machines, INSIDE, ONE_SHOT, BETWEEN)
    assert cluster.all_reduce(80.0) == pytest.approx(all_reduce)
    assert cluster.all_gather(80.0) == pytest.approx(all_gather)


def test_an_all_reduce_of_many_bytes_goes_through_nccl() -> None:
    cluster, few, many = Cluster(4, 1, INSIDE, ONE_SHOT, BETWEEN), 2.0**20, 2.0**20 + 1
    assert cluster.all_reduce(few) == 0.5 + 3 * few / 8
    assert cluster.all_reduce(many) == 1 + 2 * 3 / 4 * many / 10


@pytest.mark.parametrize("name", BATCHES)
def test_the_tables_of_the_document_are_those_of_the_model(name: str) -> None:
    assert paper_table(BATCHES[name]) in (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
