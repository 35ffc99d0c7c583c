"""Measures the parts of a decode step one by one, on the ranks that share a model: the Costs of step_model.py.

The all-reduce of hidden states and the all-gather of tokens are measured in new processes, one per rank, with the
engine's own functions. If each rank has a GPU, a CUDA graph holds many calls, as in decode; otherwise the calls are
timed one by one. A rank that fails ends the others, and the error names it.
"""

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks.step_model import Costs
from nanovllm.bench.limits import Ceilings
from nanovllm.distributed import torch
from nanovllm.distributed.placement import RankPlacement, local_placements
from nanovllm.distributed.process_group import destroy_process_group
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.executor.worker_main import join_local_group
from nanovllm.layers.torch_ops import TORCH_OPS
from nanovllm.model_config import ModelConfig

CALLS = 64  # in a graph
ROUNDS = 15


class Collectives(NamedTuple):
    """Seconds of one call. smallest: an all-reduce of one row of hidden states, which is nearly all latency."""

    smallest: float
    all_reduce: float
    gather: float


def measure_costs(
    model: ModelConfig, device: torch.device, ceilings: Ceilings, batch_sizes: Sequence[int], num_ranks: int
) -> list[tuple[Costs, Collectives]]:
    """The costs for each batch size. ceilings: those of one device. No engine may be open."""
    dtype: torch.dtype = getattr(torch, model.dtype)
    rank_ceilings = ceilings.scaled(1 / local_placements(device, num_ranks)[0].num_ranks_per_device)
    collectives = [Collectives(0.0, 0.0, 0.0)] * len(batch_sizes)
    if num_ranks > 1:
        collectives = measure_collectives(model, device, dtype, batch_sizes, num_ranks)
    kernel, sampling = _kernel_seconds() if device.type == "cuda" else 0.0, 0.0
    costs = []
    for size, collective in zip(batch_sizes, collectives, strict=True):
        if device.type == "cuda":
            rank_ceilings = Ceilings(rank_ceilings.memory, _product_speed(model, dtype, size, num_ranks, kernel))
            sampling = _sampling_seconds(model.vocab_size // num_ranks, dtype, size)
        costs.append((Costs(rank_ceilings, kernel, sampling, collective.all_reduce, collective.gather), collective))
    if device.type == "cuda":
        torch.cuda.empty_cache()  # an engine sizes its cache from free memory
    return costs


def _kernel_seconds() -> float:
    """The least seconds that one more kernel adds to a graph."""
    from benchmarks.timing import Replay

    one = torch.ones(1, device="cuda")
    replay = Replay([lambda: one.add_(1.0)] * 1000)
    return median(replay.seconds() for _ in range(ROUNDS))


def _sampling_seconds(num_columns: int, dtype: torch.dtype, num_rows: int) -> float:
    """Seconds in which the engine samples a token from each row of logits."""
    from benchmarks.timing import Replay
    from nanovllm.layers.triton_ops import TRITON_OPS

    logits = torch.randn(num_rows, num_columns, device="cuda").to(dtype)
    numbers = torch.arange(num_rows, device="cuda")
    columns = (torch.ones(num_rows, device="cuda"), numbers, numbers, numbers, numbers < 0)
    replay = Replay([lambda: TRITON_OPS.sample_unfiltered(logits, *columns)] * CALLS)
    return median(replay.seconds() for _ in range(ROUNDS))


def _product_speed(model: ModelConfig, dtype: torch.dtype, num_rows: int, num_ranks: int, kernel: float) -> float:
    """Operations a second of the engine's matrix products: num_rows rows by a rank's shard of each matrix of a layer.

    Without experts' matrices. The weights are not in the L2 cache. kernel: seconds of a kernel's start, which are
    subtracted, since step_model counts them.
    """
    from benchmarks.timing import Replay, choose_num_sets
    from nanovllm.layers.triton_ops import linear

    operations = total = 0.0
    for out_features, in_features in _matrices(model, num_ranks):
        rows = torch.randn(num_rows, in_features, device="cuda").to(dtype)
        num_sets = choose_num_sets(dtype.itemsize * out_features * in_features, 16)
        weights = [torch.randn(out_features, in_features, device="cuda").to(dtype) for _ in range(num_sets)]
        replay = Replay([lambda rows=rows, weight=weight: linear(rows, weight, None) for weight in weights])
        seconds = median(replay.seconds() for _ in range(ROUNDS))
        total += max(seconds - kernel, seconds / 2)  # a tiny product takes little more than its start
        operations += 2 * num_rows * out_features * in_features
    return operations / total


def _matrices(model: ModelConfig, num_ranks: int) -> list[tuple[int, int]]:
    """(output features, input features) of one rank's shards."""
    hidden, head_dim = model.hidden_size, model.head_dim
    num_heads = model.num_attention_heads // num_ranks
    num_kv_heads = max(1, model.num_key_value_heads // num_ranks)
    attention = [((num_heads + 2 * num_kv_heads) * head_dim, hidden), (hidden, num_heads * head_dim)]
    if model.moe is not None:
        return attention
    intermediate = model.intermediate_size // num_ranks
    return [*attention, (2 * intermediate, hidden), (hidden, intermediate)]


def measure_collectives(
    model: ModelConfig, device: torch.device, dtype: torch.dtype, batch_sizes: Sequence[int], num_ranks: int
) -> list[Collectives]:
    """The collectives for each batch size, on ranks of this machine that are placed as the engine places its own."""
    shapes = [((1, model.hidden_size), (size, model.hidden_size), (2, size)) for size in batch_sizes]
    with tempfile.TemporaryDirectory(prefix="nanovllm-collectives-") as folder:
        arguments = (local_placements(device, num_ranks), folder, shapes, dtype)
        torch.multiprocessing.spawn(_measure_rank, arguments, num_ranks, daemon=True)
        return [Collectives(*seconds) for seconds in json.loads((Path(folder) / "seconds.json").read_text())]


def _measure_rank(rank: int, placements: list[RankPlacement], folder: str, shapes: list[Any], dtype: Any) -> None:
    """Measure on one rank; rank 0 writes folder/seconds.json. shapes: those of the collectives, for each batch size."""
    torch.set_num_threads(1)
    tp = join_local_group(placements[rank], f"{folder}/store")
    device, all_reduce = "cpu", TORCH_OPS.all_reduce
    if placements[rank].gpu is not None:
        from nanovllm.layers.triton_ops import TRITON_OPS

        device, all_reduce = "cuda", TRITON_OPS.all_reduce
    measured = []
    for batch_shapes in shapes:
        row, hidden_states, tokens = [torch.randn(shape, device=device).to(dtype) for shape in batch_shapes]
        tokens = tokens.double()  # as Sampler sends them
        calls = [lambda x=x: all_reduce(x, tp) for x in (row, hidden_states)] + [lambda x=tokens: tp.all_gather(x)]
        measured.append([_seconds(tp, call) for call in calls])
    if rank == 0:
        (Path(folder) / "seconds.json").write_text(json.dumps(measured))
    tp.barrier()
    destroy_process_group(tp)


def _seconds(tp: TensorParallel, call: Callable[[], Any]) -> float:
    """Seconds of one call on this rank: the median over rounds, which all ranks begin together."""
    for _ in range(3):
        call()  # the first one opens the connections
    if tp.is_nccl:
        return _seconds_in_graph(tp, call)
    seconds = []
    for _ in range(ROUNDS):
        tp.barrier()
        start = time.perf_counter()
        call()  # gloo's collectives return when they are complete
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def _seconds_in_graph(tp: TensorParallel, call: Callable[[], Any]) -> float:
    """As _seconds, in a graph. A small kernel precedes each call, as in decode, so the change between them counts."""
    torch.cuda.synchronize()
    one = torch.ones(1, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # as CUDAGraphRunner does
        for _ in range(CALLS):
            one.add_(1.0)
            call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    seconds = []
    for _ in range(ROUNDS):
        tp.barrier()
        call()  # the GPUs leave a collective closer together than the ranks' programs leave the barrier
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) * 1e-3 / CALLS)
    graph.reset()  # before the group is destroyed
    return median(seconds)
