"""Which kernels an LLM launches: counted on a GPU, and without one by an LLM on the CPU with interpreted kernels."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from nanovllm.engine import shared_prefix
from nanovllm.kernels import flash_attention
from reference.packing import varlen_attention
from reference.paged_attention import paged_attention
from tests.support.kernels.interpreting import INTERPRETER, recorded_functions

# Names of LLM configurations: (architecture, attention_backend, kv_cache_block_size).
CONFIGURATIONS = {
    "llama": ("llama", "triton", 16),  # in half precision, which skinny_linear is for; the others in float32
    "qwen3_moe": ("qwen3_moe", "triton", 16),
    "flash_attn": ("qwen3", "flash_attn", 256),
    "shared prefix": ("llama", "triton", 16),  # of prompts that begin alike
    "peer memory": ("llama", "triton", 16),  # of a single rank: for several, see tests/distributed/test_gpu_ranks.py
}
PROMPTS = [list(range(5, 45)), [7, 8, 9]]  # the first has keys enough to be split in decode
PROMPTS_THAT_BEGIN_ALIKE = [list(range(5, 45)), [*range(5, 40), 7, 8, 9]]
LONG_PROMPT = [5 + index % 300 for index in range(600)]  # long enough for the kernels of long prompts


def kernels_of_interpreted_llm(configuration: str) -> frozenset[str]:
    """Names of the @triton.jit functions that run, in the process that interprets. Compares tokens with PyTorch's."""
    names = INTERPRETER.call(_run_interpreted, configuration)
    assert isinstance(names, frozenset), names
    return names


def _run_interpreted(configuration: str) -> frozenset[str]:
    from nanovllm.layers.select_ops import flash_attn_ops
    from nanovllm.layers.torch_ops import TORCH_OPS
    from nanovllm.layers.triton_ops import TRITON_OPS
    from nanovllm.worker import model_runner

    dtype = "float16" if configuration == "llama" else "float32"
    ops = flash_attn_ops(TRITON_OPS, is_fused=False) if configuration == "flash_attn" else TRITON_OPS
    with (
        flash_attn_stand_in(),
        patch.object(model_runner, "select_ops", lambda *args: ops),
        recorded_functions() as names,
    ):
        tokens = _generate(configuration, "cpu", dtype, 32)
    with patch.object(model_runner, "select_ops", lambda *args: TORCH_OPS):
        assert tokens == _generate(configuration, "cpu", dtype, 32)
    return frozenset(names)


def kernels_of_llm_on_a_gpu(configuration: str) -> frozenset[str]:
    """Names of the @triton.jit functions that are launched."""
    from triton.runtime.jit import JITFunction

    names = set()
    run = JITFunction.run

    def note(self, *args, **kwargs):
        names.add(self.fn.__name__)
        return run(self, *args, **kwargs)

    with patch.object(JITFunction, "run", note):
        _generate(configuration, "cuda", "bfloat16", 128, [LONG_PROMPT])
    return frozenset(names)


def _generate(
    configuration: str, device: str, dtype: str, head_dim: int, *more_steps: list[list[int]]
) -> list[list[int]]:
    """The generated token ids of all prompts, one call's prompts after the other's."""
    from nanovllm import LLM, SamplingParams
    from nanovllm.executor import uniproc
    from nanovllm.worker.model_runner import ModelRunner
    from tests.support.tiny_models import tiny_model

    architecture, backend, block_size = CONFIGURATIONS[configuration]
    is_shared = configuration == "shared prefix"
    prompts_of_steps = [PROMPTS_THAT_BEGIN_ALIKE, PROMPTS_THAT_BEGIN_ALIKE] if is_shared else [PROMPTS, *more_steps]
    model_dir = tiny_model(architecture, head_dim=head_dim, max_position_embeddings=1024)
    outputs = []
    runner = partial(ModelRunner, tp=_rank_with_peer_memory(device)) if configuration == "peer memory" else ModelRunner
    with patch.object(uniproc, "ModelRunner", runner), patch.object(shared_prefix, "MIN_SAVED_TOKENS", 1), LLM(
        str(model_dir), device=device, dtype=dtype, attention_backend=backend, kv_cache_block_size=block_size,
        num_kv_cache_blocks=1280 // block_size, max_num_seqs=2,
        enforce_eager=is_shared,
    ) as llm:  # fmt: skip
        for prompts in prompts_of_steps:
            params = [SamplingParams(max_tokens=3, ignore_eos=True, seed=index) for index in range(len(prompts))]
            outputs += llm.generate(prompts, params, use_tqdm=False)
    return [output["token_ids"] for output in outputs]


def _rank_with_peer_memory(device: str) -> Any:
    from nanovllm.distributed.tensor_parallel import TensorParallel
    from tests.kernels.all_reduce_cases import empty_buffers, peer_buffers

    buffers = empty_buffers(1, device)
    return TensorParallel(peers=SimpleNamespace(buffers=peer_buffers(0, buffers), memory=buffers))


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    block_table=None,
):  # fmt: skip
    """flash-attn's, over our references, with its documented parameters."""
    lens = cu_seqlens_k.diff()
    assert causal
    assert max_seqlen_q >= cu_seqlens_q.diff().max()
    assert max_seqlen_k >= lens.max()
    if block_table is None:
        return varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale)
    return paged_attention(q, k, v, block_table, lens, cu_seqlens_q, softmax_scale)


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, cache_seqlens=None, block_table=None, softmax_scale=None, causal=False
):
    """flash-attn's, over our references, with its documented parameters."""
    assert (q.dim(), q.shape[1], causal, k, v) == (4, 1, True, None, None)
    assert cache_seqlens.dtype == block_table.dtype == torch.int32
    return paged_attention(q[:, 0], k_cache, v_cache, block_table, cache_seqlens, scale=softmax_scale)[:, None]


@contextmanager
def flash_attn_stand_in() -> Iterator[None]:
    """kernels.flash_attention calls the two functions above instead of flash-attn's. Nothing else sees them."""
    module: Any = ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    module.flash_attn_with_kvcache = flash_attn_with_kvcache
    with ExitStack() as stack:
        for name in ("flash_attention_prefill", "flash_attention_decode"):
            function = patch.dict(sys.modules, flash_attn=module)(getattr(flash_attention, name))
            stack.enter_context(patch.object(flash_attention, name, function))
        yield
