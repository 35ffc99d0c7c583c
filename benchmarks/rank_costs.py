"""What the parts of a decode step take alone, on as many ranks as share the model: the Costs of step_model.py.

The all-reduce of hidden states and the gather of logits are measured in processes of their own, one a rank, through the
engine's TensorParallel: over NCCL in a CUDA graph of many calls, as in decode, and elsewhere one by one. A rank that
fails ends the others, and the error names it.
"""

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks.step_model import Costs
from nanovllm.bench.limits import Ceilings, layer_parameters
from nanovllm.bench.scenarios import times
from nanovllm.distributed import torch
from nanovllm.distributed.placement import RankPlacement, local_placements
from nanovllm.distributed.process_group import destroy_process_group
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.executor.worker_main import join_local_group
from nanovllm.model_config import ModelConfig

CALLS = 16  # of a graph
ROUNDS = 15


class Collectives(NamedTuple):
    """Seconds of one call. smallest: an all-reduce of one row of hidden states, which is nearly all latency."""

    smallest: float
    all_reduce: float
    gather: float


def measure_costs(
    model: ModelConfig, device: torch.device, ceilings: Ceilings, batch_sizes: Sequence[int], num_ranks: int
) -> list[tuple[Costs, Collectives]]:
    """For each batch size. ceilings: of one device. No engine may be open."""
    dtype: torch.dtype = getattr(torch, model.dtype)
    of_rank = times(ceilings, 1 / local_placements(device, num_ranks)[0].num_ranks_per_device)
    collectives = [Collectives(0.0, 0.0, 0.0)] * len(batch_sizes)
    if num_ranks > 1:
        collectives = measure_collectives(model, device, dtype, batch_sizes, num_ranks)
    kernel = _kernel_seconds() if device.type == "cuda" else 0.0
    costs = []
    for size, collective in zip(batch_sizes, collectives, strict=True):
        if device.type == "cuda":
            of_rank = Ceilings(of_rank.memory, _product_speed(model, dtype, size, num_ranks, kernel))
        costs.append((Costs(of_rank, kernel, collective.all_reduce, collective.gather), collective))
    if device.type == "cuda":
        torch.cuda.empty_cache()  # an engine sizes its cache from free memory
    return costs


def _kernel_seconds() -> float:
    """Seconds that each further kernel of a graph takes at least."""
    from benchmarks.timing import Replay

    one = torch.ones(1, device="cuda")
    replay = Replay([lambda: one.add_(1.0)] * 1000)
    return median(replay.seconds() for _ in range(ROUNDS))


def _product_speed(model: ModelConfig, dtype: torch.dtype, num_rows: int, num_ranks: int, kernel: float) -> float:
    """Operations a second of a product of num_rows rows with a matrix as large as a rank's are on average, read from
    memory; without the start of its kernel, which step_model counts.
    """
    from benchmarks.timing import Replay, choose_num_sets

    mean_size = layer_parameters(model, 1) / model.num_hidden_layers / 4 / num_ranks  # a layer has four products
    size = max(128, 128 * round(mean_size**0.5 / 128))
    counts = [num_rows, *[size] * choose_num_sets(dtype.itemsize * size * size, 16)]
    rows, *weights = [torch.randn(count, size, device="cuda").to(dtype) for count in counts]
    replay = Replay([lambda weight=weight: torch.nn.functional.linear(rows, weight) for weight in weights])
    seconds = median(replay.seconds() for _ in range(ROUNDS))
    return 2 * num_rows * size * size / max(seconds - kernel, seconds / 2)  # a tiny product takes little else


def measure_collectives(
    model: ModelConfig, device: torch.device, dtype: torch.dtype, batch_sizes: Sequence[int], num_ranks: int
) -> list[Collectives]:
    """For each batch size, on ranks of this machine that are placed as the engine's."""
    hidden, vocab = model.hidden_size, model.vocab_size // num_ranks
    shapes = [((1, hidden), (size, hidden), (size, vocab)) for size in batch_sizes]
    with tempfile.TemporaryDirectory(prefix="nanovllm-collectives-") as folder:
        arguments = (local_placements(device, num_ranks), folder, shapes, dtype)
        torch.multiprocessing.spawn(_measure_rank, arguments, num_ranks, daemon=True)
        return [Collectives(*seconds) for seconds in json.loads((Path(folder) / "seconds.json").read_text())]


def _measure_rank(rank: int, placements: list[RankPlacement], folder: str, shapes: list[Any], dtype: Any) -> None:
    """Rank 0 writes the seconds to folder/seconds.json. shapes: of the three collectives, for each batch size."""
    torch.set_num_threads(1)
    tp = join_local_group(placements[rank], f"{folder}/store")
    device = "cpu" if placements[rank].gpu is None else "cuda"
    measured = []
    for of_batch in shapes:
        row, hidden_states, logits = [torch.randn(shape, device=device).to(dtype) for shape in of_batch]
        calls = [lambda x=x: tp.all_reduce(x) for x in (row, hidden_states)] + [lambda x=logits: tp.gather(x)]
        measured.append([_seconds(tp, call) for call in calls])
    if rank == 0:
        (Path(folder) / "seconds.json").write_text(json.dumps(measured))
    tp.barrier()
    destroy_process_group(tp)


def _seconds(tp: TensorParallel, call: Callable[[], Any]) -> float:
    """The median over rounds, which all ranks begin together, of one call's seconds on this rank."""
    for _ in range(3):
        call()  # the first one connects
    if tp.is_nccl:
        return _seconds_in_graph(tp, call)
    seconds = []
    for _ in range(ROUNDS):
        tp.barrier()
        start = time.perf_counter()
        call()  # gloo's collectives wait
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def _seconds_in_graph(tp: TensorParallel, call: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # as CUDAGraphRunner does
        for _ in range(CALLS):
            call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    seconds = []
    for _ in range(ROUNDS):
        tp.barrier()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) * 1e-3 / CALLS)
    graph.reset()  # before the group is destroyed
    return median(seconds)
