"""Config: the options of an engine. What the engine finds out later (model, memory, device) is not part of it."""

import os
from dataclasses import dataclass
from typing import Any

from nanovllm.validation import (
    convert_numpy_integers,
    reject_unknown_options,
    require_bool,
    require_choice,
    require_int,
    require_number,
)

ATTENTION_BACKENDS = ("auto", "torch", "triton", "flash_attn")
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
FLASH_ATTENTION_BLOCK_SIZE = 256  # flash_attn's paged cache takes multiples of this
MIN_TRITON_BLOCK_SIZE = 16
MAX_TENSOR_PARALLEL_SIZE = 8
MAX_KV_CACHE_BLOCKS = 2**31 - 1  # block tables are int32
NANO_VLLM_NAMES = {"kvcache_block_size": "kv_cache_block_size", "num_kvcache_blocks": "num_kv_cache_blocks"}


@reject_unknown_options
@dataclass(frozen=True)
class Config:
    """Frozen and validated; a wrong value raises a ValueError, an unknown name a TypeError that names the nearest.

    model: a local directory, or a model id of the Hugging Face hub.
    max_num_batched_tokens: the most tokens that one step computes; longer prompts are prefilled in chunks.
    max_num_seqs: the most sequences that hold KV cache at a time.
    max_model_len: the longest sequence, prompt and output together; lowered to what the model supports.
    gpu_memory_utilization: part of the GPU's memory for weights, activations and KV cache, in (0, 1].
    tensor_parallel_size: number of GPUs (or CPU processes) over which the model is divided, 1 to 8.
    enforce_eager: True never captures CUDA graphs.
    async_scheduling: True begins a decode step while the one before is still being computed, so that the GPU does not
        wait for the host. None does so where it gains time: on a GPU, with several ranks where each has its own.
    kv_cache_block_size: number of tokens in a KV block. A multiple of 256 for "flash_attn"; "auto" and "triton" also
        take powers of two from 16, "torch" powers of two from 1. None takes the attention backend's own: 64 for triton,
        since the prefix cache finds whole blocks; else, or with num_kv_cache_blocks, 256. LLM accepts nano-vllm's name
        kvcache_block_size too.
    num_kv_cache_blocks: number of KV blocks; None sizes the cache from free memory. LLM accepts nano-vllm's name
        num_kvcache_blocks too, and -1 for None under that name.
    attention_backend: "auto" is the fastest one that is installed and supports the device, dtype and sizes.
        "flash_attn" by name also computes norm, rotation and store of queries and keys in one kernel each, as
        nano-vllm does; the others compute all three in one fused kernel.
    dtype: of weights, activations and KV cache; "auto" is the checkpoint's.
    seed: 0 .. 2**64-1, from which requests without a seed get theirs.
    device: "auto" is cuda if a GPU is available, else cpu.
    """

    model: str
    max_num_batched_tokens: int = 16384
    max_num_seqs: int = 512
    max_model_len: int = 4096
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1
    enforce_eager: bool = False
    async_scheduling: bool | None = None
    kv_cache_block_size: int | None = None
    num_kv_cache_blocks: int | None = None
    attention_backend: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.model, (str, os.PathLike)) or not str(self.model):
            raise ValueError(f"model must be a directory or a hub id such as 'Qwen/Qwen3-0.6B', got {self.model!r}")
        object.__setattr__(self, "model", str(self.model))
        require_int("max_num_seqs", self.max_num_seqs, 1)
        require_int(
            "max_num_batched_tokens",
            self.max_num_batched_tokens,
            self.max_num_seqs,
            remedy=f"a decode step computes one token for each of max_num_seqs={self.max_num_seqs} sequences: "
            "raise this or lower max_num_seqs",
        )
        require_int("max_model_len", self.max_model_len, 2, remedy="one prompt token and one generated token")
        require_number(
            "gpu_memory_utilization", self.gpu_memory_utilization, "a number in (0, 1]", lambda value: 0 < value <= 1
        )
        require_int("tensor_parallel_size", self.tensor_parallel_size, 1, MAX_TENSOR_PARALLEL_SIZE)
        require_bool("enforce_eager", self.enforce_eager)
        if self.async_scheduling is not None:
            require_bool("async_scheduling", self.async_scheduling)
        require_choice("attention_backend", self.attention_backend, ATTENTION_BACKENDS)
        require_choice("dtype", self.dtype, DTYPES)
        require_choice("device", self.device, DEVICES)
        require_int("seed", self.seed, 0, 2**64 - 1)
        if self.num_kv_cache_blocks is not None:
            remedy = "use None to size it from memory"
            require_int("num_kv_cache_blocks", self.num_kv_cache_blocks, 1, MAX_KV_CACHE_BLOCKS, remedy)
        if self.kv_cache_block_size is not None:
            _check_block_size(self.kv_cache_block_size, self.attention_backend)
        convert_numpy_integers(self)


def accept_nano_vllm_names(options: dict[str, Any]) -> dict[str, Any]:
    """`options` with nano-vllm's names replaced by ours, and None for num_kvcache_blocks=-1, nano-vllm's default.

    A positive num_kvcache_blocks is used, although nano-vllm itself replaces it by what it measures. Raises TypeError
    for an option that is given under both names.
    """
    for name, our_name in NANO_VLLM_NAMES.items():
        if name in options and our_name in options:
            raise TypeError(f"{name} and {our_name} are one option under two names; give one of them")
    if options.get("num_kvcache_blocks") == -1:
        options = options | {"num_kvcache_blocks": None}
    return {NANO_VLLM_NAMES.get(name, name): value for name, value in options.items()}


def _check_block_size(block_size: int, backend: str) -> None:
    require_int("kv_cache_block_size", block_size, 1)
    if block_size % FLASH_ATTENTION_BLOCK_SIZE == 0:
        return
    is_power_of_two = block_size & (block_size - 1) == 0
    if is_power_of_two and (
        backend == "torch" or (backend in ("auto", "triton") and block_size >= MIN_TRITON_BLOCK_SIZE)
    ):
        return
    raise ValueError(
        f"kv_cache_block_size must be a multiple of {FLASH_ATTENTION_BLOCK_SIZE} with attention_backend={backend!r}, "
        f"got {block_size}; attention_backend='triton' also takes powers of two from {MIN_TRITON_BLOCK_SIZE}, as "
        "'auto' does, attention_backend='torch' powers of two from 1"
    )
