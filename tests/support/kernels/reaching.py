"""Which kernels an LLM launches: counted on a GPU, and without one by an LLM whose layers have interpreted kernels."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from unittest.mock import patch

from tests.support.kernels.interpreting import recorded_functions

PROMPTS = [list(range(5, 45)), [7, 8, 9]]  # the first has keys enough to be split in decode
LONG_PROMPT = [5 + index % 300 for index in range(600)]  # long enough for the kernels of long prompts


def kernels_of_interpreted_llm(architecture: str) -> frozenset[str]:
    """Names of @triton.jit functions. For a process in which Triton interprets (interpreting.Interpreter.call)."""
    with _layers_with_kernels(), recorded_functions() as names:
        _generate(architecture, "cpu", "float32", 32, PROMPTS)
    return frozenset(names)


@cache
def kernels_of_llm_on_a_gpu(architecture: str) -> frozenset[str]:
    from triton.runtime.jit import JITFunction

    names = set()
    run = JITFunction.run

    def note(self, *args, **kwargs):
        names.add(self.fn.__name__)
        return run(self, *args, **kwargs)

    with patch.object(JITFunction, "run", note):
        _generate(architecture, "cuda", "bfloat16", 128, PROMPTS, [LONG_PROMPT])
    return frozenset(names)


def _generate(architecture: str, device: str, dtype: str, head_dim: int, *steps: list[list[int]]) -> None:
    from nanovllm import LLM, SamplingParams
    from tests.support.tiny_models import tiny_model

    model_dir = tiny_model(architecture, head_dim=head_dim, max_position_embeddings=1024)
    with LLM(
        str(model_dir), device=device, dtype=dtype, attention_backend="triton", num_kv_cache_blocks=80,
        kv_cache_block_size=16, max_num_seqs=2,
    ) as llm:  # fmt: skip
        for prompts in steps:
            params = [SamplingParams(max_tokens=2, ignore_eos=True, seed=index) for index in range(len(prompts))]
            llm.generate(prompts, params, use_tqdm=False)


@contextmanager
def _layers_with_kernels() -> Iterator[None]:
    """Layers on the CPU choose kernels, as they would on a GPU."""
    from nanovllm.attention.triton import TritonAttentionBackend
    from nanovllm.worker import model_runner  # imports all layers

    with ExitStack() as stack:
        make_backend = lambda *args, **kwargs: TritonAttentionBackend()  # noqa: E731
        stack.enter_context(patch.object(model_runner, "choose_attention_backend", make_backend))
        for name, module in list(sys.modules.items()):
            if name.startswith("nanovllm.") and hasattr(module, "has_kernels"):
                stack.enter_context(patch.object(module, "has_kernels", lambda x: True))
        yield
