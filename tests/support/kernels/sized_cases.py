"""A case of the sizes and the dtype that a Definition of FlashInfer-Trace fixes, for a launcher that --kernel replaces.

Our declared cases have other sizes, mostly small ones, which such a Definition excludes.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from reference.sampling import allowed_mask
from tests.support.kernels.registry import REPLACED, Check
from tests.support.kernels.trace_solutions import TraceFunction
from tests.support.statistics import check_counts

NAME = "sizes of the definition"
LETTERS = {  # FlashInfer's names of axes
    "num_qo_heads": "H",
    "num_q_heads": "H",
    "num_kv_heads": "K",
    "head_dim": "D",
    "head_size": "D",
    "page_size": "block_size",
    "hidden_size": "E",
    "intermediate_size": "F",
    "num_experts": "N",
    "vocab_size": "V",
}
NUM_DRAWS = 1000
Sizes = Mapping[str, int]


def sized_case(name: str, function: TraceFunction) -> Check | None:
    """The case for our launcher `name`; None if there is none for it, or the Definition leaves a size of it open."""
    sizes = {LETTERS.get(axis, axis): size for axis, size in function.constants.items()}
    try:
        return _CASES[name](sizes, function.dtype)
    except KeyError:
        return None


def _paged_attention(sizes: Sizes, dtype: torch.dtype) -> Check:
    from tests.kernels.paged_attention_cases import Case, decode

    return Case(decode(1, 33, 0, 70), max(16, sizes["block_size"]), sizes["H"], sizes["K"], sizes["D"], dtype)


def _varlen_attention(sizes: Sizes, dtype: torch.dtype) -> Check:
    from tests.kernels.varlen_attention_cases import CACHED, Case

    block_size = max(16, sizes["block_size"]) if "block_size" in sizes else 0
    return Case(CACHED, block_size, sizes["H"], sizes["K"], sizes["D"], dtype)


def _rms_norm(sizes: Sizes, dtype: torch.dtype) -> Check:
    from tests.kernels.rms_norm_cases import check_norm

    shape = (5, sizes["heads"], sizes["E"]) if "heads" in sizes else (7, sizes["E"])
    return check_norm(shape, dtype)


def _add_rms_norm(sizes: Sizes, dtype: torch.dtype) -> Check:
    from tests.kernels.rms_norm_cases import check_norm

    return check_norm((7, sizes["E"]), dtype, ("dense", "dense"))


def _rotary_embedding(sizes: Sizes, dtype: torch.dtype) -> Check:
    from tests.kernels.rotary_embedding_cases import check_shape

    return check_shape((5, sizes.get("H", 4), sizes.get("K", 2), sizes["D"]), dtype)


def _silu_and_mul(sizes: Sizes, dtype: torch.dtype) -> Check:
    from tests.kernels.silu_and_mul_cases import check_shape

    return check_shape((7, sizes["F"]), dtype)


def _store_kvcache(sizes: Sizes, dtype: torch.dtype) -> Check:
    from tests.kernels.store_kvcache_cases import check_slots

    return check_slots(sizes["K"], sizes["D"], (7, -1, 0, 15), block_size=sizes["block_size"], dtype=dtype)


def _grouped_gemm(sizes: Sizes, dtype: torch.dtype) -> Check:
    from tests.kernels.grouped_gemm_cases import check

    return check(3, sizes["N"], sizes["top_k"], sizes["E"], sizes["F"], dtype, tiles=(16, 32, 32))


def _sampling(sizes: Sizes, _: torch.dtype) -> Check:
    return _Draws(sizes["V"])


class _Draws:
    """Draws from probabilities: none that top_k and top_p drop, and the others as often as their probability says."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def __str__(self) -> str:
        return f"draws from probabilities of {self.vocab_size} tokens"

    def __call__(self, device: str) -> None:
        own: Any = REPLACED["sampling.sampling"]
        names = own.raw.definition["inputs"]
        generator = torch.Generator().manual_seed(0)
        scores = torch.full((self.vocab_size,), -torch.inf)
        likely = torch.randperm(self.vocab_size, generator=generator)[:12]
        scores[likely] = torch.randn(len(likely), generator=generator)
        probs = scores.softmax(dim=0)
        for top_k, top_p in ((1, 1.0), (4, 1.0), (self.vocab_size, 0.7), (6, 0.6), (self.vocab_size, 1.0)):
            if (top_k < self.vocab_size and "top_k" not in names) or (top_p < 1 and "top_p" not in names):
                continue
            inputs = {
                "probs": probs.expand(NUM_DRAWS, -1).contiguous(),
                "top_k": torch.full((NUM_DRAWS,), top_k, dtype=torch.int32),
                "top_p": torch.full((NUM_DRAWS,), top_p),
            }
            samples = own.call_raw(**{name: value.to(device) for name, value in inputs.items() if name in names})
            is_allowed = allowed_mask(scores, top_k, top_p)
            counts = torch.bincount(samples.cpu(), minlength=self.vocab_size)
            dropped = counts.masked_fill(is_allowed, 0)
            message = f"top_k {top_k}, top_p {top_p}: token {int(dropped.argmax())} was drawn, which is dropped"
            assert not dropped.any(), message
            expected = probs.double().where(is_allowed, 0)
            kept = expected.nonzero().flatten()
            shares = (expected / expected.sum())[kept].tolist()
            check_counts(counts[kept].tolist(), NUM_DRAWS, shares, f"top_k {top_k}, top_p {top_p}")


_CASES: dict[str, Callable[[Sizes, torch.dtype], Check]] = {
    "paged_attention": _paged_attention,
    "varlen_attention": _varlen_attention,
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "rotary_embedding": _rotary_embedding,
    "silu_and_mul": _silu_and_mul,
    "store_kvcache": _store_kvcache,
    "grouped_gemm": _grouped_gemm,
    "sampling": _sampling,
}
