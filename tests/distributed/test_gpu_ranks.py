"""Ranks on GPUs: over NCCL where each has its own, over gloo where they share one. Not part of `make test`.

Those over NCCL say how many blocks they need, so that they can run side by side (-n 2).
"""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.demo_prompts import DEMO_PROMPTS
from nanovllm.distributed.placement import RankPlacement
from nanovllm.distributed.process_group import FileStore, destroy_process_group, init_process_group, new_nccl_group
from nanovllm.executor.base import RankError
from tests.support.counts import record_error
from tests.support.rank_engines import MAX_SECONDS
from tests.support.rank_faults import WARM_UP, Fault, plant
from tests.support.shared_gpus import share_gpus
from tests.support.tiny_models import tiny_model

ARCHITECTURES = ["llama", "qwen2", "qwen3", "qwen3_moe"]
PARAMS = [  # the filtered ones end first, so that the ranks first broadcast tokens and then share them in the graph
    SamplingParams.greedy(max_tokens=24, ignore_eos=True),
    SamplingParams(seed=5, max_tokens=24, ignore_eos=True),
    SamplingParams(seed=6, top_p=0.9, max_tokens=9, ignore_eos=True),
]
PROMPTS = [list(prompt.encode()) for prompt in DEMO_PROMPTS[:8]]
NUM_FAILURES = 3  # one after the other: what one of them does to the GPU depends on the moment
NUM_BLOCKS = 32  # of 256 tokens, max_model_len: enough for max_num_seqs; no free memory is measured


@pytest.fixture(autouse=True)
def share(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --share-gpus, tests of more ranks than there are GPUs run too."""
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if params.get("size", 0) > torch.cuda.device_count():
        share_gpus(monkeypatch)


def is_reachable(size: int) -> bool:
    """Whether rank 0's GPU can write into the memory of all GPUs on which `size` ranks compute."""
    others = {rank % torch.cuda.device_count() for rank in range(size)} - {0}
    return all(torch.cuda.can_device_access_peer(0, gpu) for gpu in others)


def tokens(architecture: str, size: int, **options: Any) -> list[list[int]]:
    """Greedy and sampled, in float32, with eight heads so that eight ranks can share them."""
    model_dir = tiny_model(architecture, head_dim=32, num_heads=8, num_kv_heads=2)
    with LLM(
        str(model_dir), tensor_parallel_size=size, dtype="float32", attention_backend="triton", max_model_len=256,
        max_num_seqs=16, max_num_batched_tokens=64, **options,
    ) as llm:  # fmt: skip
        if size > 1:
            tp = llm._core.executor._tp  # type: ignore[attr-defined]
            if options.get("async_scheduling") is None:
                assert llm.config.async_scheduling is tp.is_nccl
            if tp.is_nccl and is_reachable(size):
                assert tp.peers is not None, "the kernel all_reduce is launched by no rank"
        params = [PARAMS[index % 3] for index in range(len(PROMPTS))]
        return [output["token_ids"] for output in llm.generate(PROMPTS, params, use_tqdm=False)]


@pytest.mark.gpu
def test_one_rank_with_nccl(tmp_path: Any) -> None:
    """D35: device first, graphs freed before the group; a recorded all-reduce is replayed."""
    tp = init_process_group(
        RankPlacement(0, 1, num_ranks_per_device=1, gpu=0), FileStore(str(tmp_path / "store"), 1), new_nccl_group
    )
    x, total = torch.arange(6.0, device="cuda"), torch.empty(6, device="cuda")
    graph = torch.cuda.CUDAGraph()
    tp.group.allreduce([x.clone()]).wait()
    with torch.cuda.graph(graph):
        total.copy_(x)
        tp.group.allreduce([total]).wait()
    for factor in (2.0, 3.0):
        x.mul_(factor)
        graph.replay()
        assert torch.equal(total, x)
    assert tp.is_nccl
    graph.reset()
    destroy_process_group(tp)


@pytest.mark.gpu
@pytest.mark.whole_gpu
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_two_ranks_on_one_gpu_give_what_one_gives(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over gloo, since NCCL wants a GPU for each; the cache is sized for both."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # also where there are more
    assert tokens(architecture, 2, gpu_memory_utilization=0.3) == tokens(architecture, 1, gpu_memory_utilization=0.3)


@pytest.mark.parametrize("is_async", [None, False], ids=["async", "sync"])
@pytest.mark.parametrize("enforce_eager", [False, True])
@pytest.mark.parametrize("size", [pytest.param(size, marks=pytest.mark.multi_gpu(size)) for size in (2, 4, 8)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ranks_over_nccl_give_what_one_gives(
    architecture: str, size: int, enforce_eager: bool, is_async: bool | None
) -> None:
    """D35 D37: with NCCL's collectives inside the decode graphs, and without graphs; with and without async_scheduling,
    which is the default.
    """
    options = {"enforce_eager": enforce_eager, "async_scheduling": is_async}
    several = tokens(architecture, size, num_kv_cache_blocks=NUM_BLOCKS, **options)
    assert several == tokens(architecture, 1, num_kv_cache_blocks=NUM_BLOCKS)


@pytest.mark.parametrize("place", [WARM_UP, "decode"])
@pytest.mark.parametrize("what", ["raise", "kill"])
@pytest.mark.parametrize("size", [pytest.param(size, marks=pytest.mark.multi_gpu(size)) for size in (2, 4, 8)])
def test_a_rank_that_fails_over_nccl(
    size: int, what: str, place: str, monkeypatch: pytest.MonkeyPatch, log: Path
) -> None:
    """D33: rank 0, whose GPU waits inside a collective, is unblocked in time and names the rank; its memory is freed,
    and a new engine starts.
    """
    expected = tokens("llama", 1, num_kv_cache_blocks=NUM_BLOCKS)
    before = torch.cuda.memory_allocated()  # with what libraries keep for each stream until the process ends
    with monkeypatch.context() as planted:
        fault = Fault(size - 1, place, what, log)
        plant(planted, fault)
        for _ in range(NUM_FAILURES):
            with pytest.raises(RankError, match=f"rank {fault.rank} of {size}"):
                tokens("llama", size, num_kv_cache_blocks=NUM_BLOCKS)
            seconds = fault.seconds_since()
            record_error("seconds from a rank's failure to the error", seconds, MAX_SECONDS)
            assert seconds < MAX_SECONDS
            torch.cuda.synchronize()  # raises if the GPU is lost to this process
            assert torch.cuda.memory_allocated() == before
            assert not multiprocessing.active_children()
    assert tokens("llama", size, num_kv_cache_blocks=NUM_BLOCKS) == expected
