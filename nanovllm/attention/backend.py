"""The interface of attention backends, and the choice among them."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol

import torch

from nanovllm.config import FLASH_ATTENTION_BLOCK_SIZE, MIN_TRITON_BLOCK_SIZE
from nanovllm.context import Context
from nanovllm.kernels import flash_attention

logger = logging.getLogger("nanovllm")

# Head sizes that were verified with flash-attn, by dtype.
FLASH_ATTENTION_HEAD_DIMS = {torch.bfloat16: (32, 64, 128), torch.float16: (64, 128)}
# What kernels/varlen_attention.py and kernels/paged_attention.py take.
TRITON_HEAD_DIMS = (32, 64, 128, 256)
MIN_COMPUTE_CAPABILITY = (8, 0)  # Ampere: of both
# Where triton was faster than flash_attn in every shape of `pytest --benchmark-only`, prefill and decode. Elsewhere
# nobody has measured, and flash_attn is the one that its authors tuned.
TRITON_IS_FASTER_ON = (9, 0)  # compute capability of an H100 and an H200
TRITON_IS_FASTER_AT = (64, 128)  # head_dim


class AttentionBackend(Protocol):
    """Stores keys and values in the paged cache and attends over it. Only slots of the sequences' own tokens are read.

    query: [num_tokens, num_heads, head_dim]; key, value: [num_tokens, num_kv_heads, head_dim];
    k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim]; outputs are shaped as the query.
    is_graph_safe: whether store and decode may be recorded in a CUDA graph: they never wait for the device.
    """

    name: str
    is_graph_safe: bool

    def store(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write key and value [num_tokens, num_kv_heads, head_dim] to their slots; slot -1 is skipped."""
        ...

    def prefill(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        k_cache: torch.Tensor | None,
        v_cache: torch.Tensor | None,
        context: Context,
        scale: float,
    ) -> torch.Tensor:
        """Causal attention of packed queries; over the cache if context.block_tables is set, else over key and value.

        k_cache and v_cache may be None in the second case.
        """
        ...

    def decode(
        self, query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, context: Context, scale: float
    ) -> torch.Tensor:
        """Attention of one query a sequence over its context_lens cached keys."""
        ...


@dataclass(frozen=True)
class _Demand:
    """What a backend is asked to do."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    block_size: int


@dataclass(frozen=True)
class _Candidate:
    """reason_against says why the backend cannot do what is asked, None if it can; make imports and builds it."""

    reason_against: Callable[[_Demand], str | None]
    make: Callable[[], AttentionBackend]


def choose_attention_backend(
    requested: str, device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int
) -> AttentionBackend:
    """The backend named `requested`; for "auto" the first in order of preference that fits. Logs choice and reason.

    Raises ValueError, with the reason and a remedy, for an unknown name and for a named backend that cannot work here.
    """
    demand = _Demand(device, dtype, head_dim, block_size)
    if requested == "auto":
        name, reason = _first_that_fits(demand)
    elif requested in _CANDIDATES:
        name, reason = requested, "as requested"
        objection = _CANDIDATES[requested].reason_against(demand)
        if objection is not None:
            raise ValueError(
                f"attention_backend={requested!r} cannot be used: {objection}; use attention_backend='torch', "
                "which runs everywhere"
            )
    else:
        names = ", ".join(map(repr, ("auto", *_CANDIDATES)))
        raise ValueError(f"attention_backend must be one of {names}, got {requested!r}")
    logger.info("attention backend: %s (%s)", name, reason)
    return _CANDIDATES[name].make()


def _first_that_fits(demand: _Demand) -> tuple[str, str]:
    """Its name, and why it is the first choice or those before it were passed over."""
    names = list(_CANDIDATES)
    preference = "the first choice"
    if _is_triton_faster(demand):
        names.sort(key=lambda name: name != "triton")
        preference = f"measured to be faster than flash_attn on such a GPU at head_dim {demand.head_dim}"
    objections = []
    for name in names:
        objection = _CANDIDATES[name].reason_against(demand)
        if objection is None:
            return name, "; ".join(objections) or preference
        objections.append(f"not {name}: {objection}")
    raise AssertionError("the torch backend takes everything")


def _is_triton_faster(demand: _Demand) -> bool:
    return (
        demand.device.type == "cuda"
        and demand.dtype in FLASH_ATTENTION_HEAD_DIMS
        and torch.cuda.get_device_capability(demand.device) == TRITON_IS_FASTER_ON
        and demand.head_dim in TRITON_IS_FASTER_AT
    )


def _against_flash_attention(demand: _Demand) -> str | None:
    if demand.device.type != "cuda":
        return f"it needs an NVIDIA GPU, the device is {demand.device}"
    if demand.dtype not in FLASH_ATTENTION_HEAD_DIMS:
        return f"it computes in bfloat16 or float16, the dtype is {_short(demand.dtype)}"
    head_dims = FLASH_ATTENTION_HEAD_DIMS[demand.dtype]
    if demand.head_dim not in head_dims:
        return f"with {_short(demand.dtype)} it takes a head_dim in {head_dims}, the model's is {demand.head_dim}"
    if demand.block_size % FLASH_ATTENTION_BLOCK_SIZE:
        return f"kv_cache_block_size must be a multiple of {FLASH_ATTENTION_BLOCK_SIZE}, got {demand.block_size}"
    objection = _against_gpu(demand)
    if objection is not None:
        return objection
    error = flash_attention.import_error()
    if error is not None:
        return f"flash-attn cannot be imported ({error}), see `pip install flash-attn`"
    if find_spec("triton") is None:
        return "triton, which stores its keys and values, is not installed, see `pip install triton`"
    return None


def _against_gpu(demand: _Demand) -> str | None:
    capability = torch.cuda.get_device_capability(demand.device)
    if capability < MIN_COMPUTE_CAPABILITY:
        return f"it needs compute capability {MIN_COMPUTE_CAPABILITY}, the GPU has {capability}"
    return None


def _make_flash_attention() -> AttentionBackend:
    from nanovllm.attention.flash_attn import FlashAttentionBackend

    return FlashAttentionBackend()


def _against_triton(demand: _Demand) -> str | None:
    if demand.device.type != "cuda":
        return f"it needs an NVIDIA GPU, the device is {demand.device}"
    if demand.head_dim not in TRITON_HEAD_DIMS:
        return f"it takes a head_dim in {TRITON_HEAD_DIMS}, the model's is {demand.head_dim}"
    size = demand.block_size
    if size < MIN_TRITON_BLOCK_SIZE or size & (size - 1):
        return f"kv_cache_block_size must be a power of two from {MIN_TRITON_BLOCK_SIZE}, got {size}"
    if find_spec("triton") is None:
        return "triton is not installed, see `pip install triton`"
    return _against_gpu(demand)


def _make_triton() -> AttentionBackend:
    from nanovllm.attention.triton import TritonAttentionBackend

    return TritonAttentionBackend()


def _make_torch() -> AttentionBackend:
    from nanovllm.attention.torch import TorchAttentionBackend

    return TorchAttentionBackend()


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# In order of preference for "auto", but for _is_triton_faster.
_CANDIDATES = {
    "flash_attn": _Candidate(_against_flash_attention, _make_flash_attention),
    "triton": _Candidate(_against_triton, _make_triton),
    "torch": _Candidate(lambda demand: None, _make_torch),
}
