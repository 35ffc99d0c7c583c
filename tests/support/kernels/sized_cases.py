"""A case of the sizes and the dtype that a Definition of FlashInfer-Trace fixes, for a launcher that --kernel replaces.

Our declared cases have other sizes, mostly small ones, which such a Definition excludes.
"""

import importlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from reference.sampling import allowed_mask
from tests.support.kernels.registry import REPLACED, Check, case
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
        return _make(name, sizes, function.dtype)
    except KeyError:
        return None


def _make(name: str, sizes: Sizes, dtype: torch.dtype) -> Check | None:
    """Raises KeyError for a size that is missing."""
    cases = partial(importlib.import_module, package="tests.kernels")
    block_size = max(16, sizes["block_size"]) if "block_size" in sizes else 0
    match name:
        case "paged_attention":
            module = cases(".paged_attention_cases")
            lengths = module.decode(1, 33, 0, 70)
            return module.Case(lengths, max(16, sizes["block_size"]), sizes["H"], sizes["K"], sizes["D"], dtype)
        case "varlen_attention":
            module = cases(".varlen_attention_cases")
            return module.Case(module.CACHED, block_size, sizes["H"], sizes["K"], sizes["D"], dtype)
        case "rms_norm":
            shape = (5, sizes["heads"], sizes["E"]) if "heads" in sizes else (7, sizes["E"])
            return cases(".rms_norm_cases").check_norm(shape, dtype)
        case "add_rms_norm":
            return cases(".rms_norm_cases").check_norm((7, sizes["E"]), dtype, ("dense", "dense"))
        case "rotary_embedding":
            shape = (5, sizes.get("H", 4), sizes.get("K", 2), sizes["D"])
            return cases(".rotary_embedding_cases").check_shape(shape, dtype)
        case "silu_and_mul":
            return cases(".silu_and_mul_cases").check_shape((7, sizes["F"]), dtype)
        case "store_kvcache":
            slots, size = (7, -1, 0, 15), sizes["block_size"]
            check_slots = cases(".store_kvcache_cases").check_slots
            return check_slots(sizes["K"], sizes["D"], slots, block_size=size, dtype=dtype)
        case "grouped_gemm":
            experts = sizes["N"], sizes["top_k"], sizes["E"], sizes["F"]
            return cases(".grouped_gemm_cases").check(3, *experts, dtype, tiles=(16, 32, 32))
        case "sampling":
            return draws(sizes["V"])
    return None


@case
def draws(device: str, vocab_size: int) -> None:
    """Draws from probabilities: none that top_k and top_p drop, and the others as often as their probability says."""
    own: Any = REPLACED["sampling.sampling"]
    names = own.raw.definition["inputs"]
    generator = torch.Generator().manual_seed(0)
    scores = torch.full((vocab_size,), -torch.inf)
    likely = torch.randperm(vocab_size, generator=generator)[:12]
    scores[likely] = torch.randn(len(likely), generator=generator)
    probs = scores.softmax(dim=0)
    for top_k, top_p in ((1, 1.0), (4, 1.0), (vocab_size, 0.7), (6, 0.6), (vocab_size, 1.0)):
        if (top_k < vocab_size and "top_k" not in names) or (top_p < 1 and "top_p" not in names):
            continue
        inputs = {
            "probs": probs.expand(NUM_DRAWS, -1).contiguous(),
            "top_k": torch.full((NUM_DRAWS,), top_k, dtype=torch.int32),
            "top_p": torch.full((NUM_DRAWS,), top_p),
        }
        samples = own.call_raw(**{name: value.to(device) for name, value in inputs.items() if name in names})
        is_allowed = allowed_mask(scores, top_k, top_p)
        counts = torch.bincount(samples.cpu(), minlength=vocab_size)
        dropped = counts.masked_fill(is_allowed, 0)
        assert not dropped.any(), (
            f"top_k {top_k}, top_p {top_p}: token {int(dropped.argmax())} was drawn, which is dropped"
        )
        expected = probs.double().where(is_allowed, 0)
        kept = expected.nonzero().flatten()
        shares = (expected / expected.sum())[kept].tolist()
        check_counts(counts[kept].tolist(), NUM_DRAWS, shares, f"top_k {top_k}, top_p {top_p}")
