"""What is measured: four architectures, how many sequences decode or are prefilled at once, and the points of each
benchmark of a kernel."""

import random
from typing import Any, NamedTuple


class Shape(NamedTuple):
    """num_experts is 0 for a dense model; intermediate_size is one expert's for the others."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_experts: int = 0
    top_k: int = 0
    has_head_norm: bool = False


SHAPES = {
    "qwen3-0.6b": Shape(16, 8, 128, 1024, 3072, 151936, has_head_norm=True),
    "llama-3-8b": Shape(32, 8, 128, 4096, 14336, 128256),
    "qwen2.5-0.5b": Shape(14, 2, 64, 896, 4864, 151936),
    "qwen3-30b-a3b": Shape(32, 4, 128, 2048, 768, 151936, num_experts=128, top_k=8, has_head_norm=True),
}
NUM_SEQS = (1, 8, 64, 256)
NUM_TOKENS = (*NUM_SEQS, 16384)  # of a decode step, and of a full prefill step


def draw_lens(num_seqs: int, low: int, high: int) -> list[int]:
    """Lengths drawn evenly, both ends included; the same at every call."""
    rng = random.Random(num_seqs)
    return [rng.randint(low, high) for _ in range(num_seqs)]


Points = dict[str, tuple[Any, ...]]  # a point's name, and the arguments of the function that the kernel declares


def steps_of_models() -> Points:
    """(shape, number of tokens)"""
    return {f"{name}, {n} tokens": (shape, n) for name, shape in SHAPES.items() for n in NUM_TOKENS}


def rows_of_logits() -> Points:
    """(number of rows, vocabulary, is greedy)"""
    sizes = sorted({shape.vocab_size for shape in SHAPES.values()})
    kinds = {"drawn": False, "greedy": True}
    return {f"{n} x {size}, {kind}": (n, size, kinds[kind]) for size in sizes for n in NUM_SEQS for kind in kinds}


def tokens_of_experts() -> Points:
    """(shape, number of tokens)"""
    return {f"{n} tokens, 8 of 128 experts": (SHAPES["qwen3-30b-a3b"], n) for n in (*NUM_SEQS, 4096)}


def decodes() -> Points:
    """(context lengths, H, K, D, block size)"""
    named = {
        "256 x 100-1800": (draw_lens(256, 100, 1800), 16, 8, (16, 64, 256)),
        "64 x 500-4000": (draw_lens(64, 500, 4000), 32, 8, (256,)),
        "64 x 100-1800": (draw_lens(64, 100, 1800), 16, 8, (256,)),
        "1 x 16000": ([16000], 32, 8, (256,)),
        "8 x 1000": ([1000] * 8, 16, 8, (16, 256)),
        "16 x 1000": ([1000] * 16, 16, 8, (256,)),
        "1 x 400": ([400], 16, 8, (256,)),
    }
    points: Points = {
        f"{name}, {heads}/{kv_heads}, block {size}": (lens, heads, kv_heads, 128, size)
        for name, (lens, heads, kv_heads, sizes) in named.items()
        for size in sizes
    }
    for name, shape in SHAPES.items():
        if name != "qwen3-0.6b":  # the named ones have its heads
            for num_seqs in NUM_SEQS:
                points[f"{name}, {num_seqs} seqs"] = (draw_lens(num_seqs, 100, 1800), *shape[:3], 256)
    return points


def named_prefills() -> Points:
    """(query lengths, cached tokens before each, H, K, D)"""
    return {
        "16 x 1024, 16/8": ([1024] * 16, 0, 16, 8, 128),
        "2 x 8192, 32/8": ([8192] * 2, 0, 32, 8, 128),
        "4 x 1024 after 4096, 16/8": ([1024] * 4, 4096, 16, 8, 128),
        "256 x 100 after 2000, 16/8": ([100] * 256, 2000, 16, 8, 128),
    }


def prefills_of_models() -> Points:
    lengths = {1: 4096, 8: 1024, 64: 256, 256: 64}  # by the number of sequences
    return {
        f"{name}, {num_seqs} x {length}": ([length] * num_seqs, 0, *shape[:3])
        for name, shape in SHAPES.items()
        for num_seqs, length in lengths.items()
    }


def decode_steps_of_models() -> Points:
    """(shape, number of sequences)"""
    return {f"{name}, {n} tokens": (shape, n) for name, shape in SHAPES.items() for n in NUM_SEQS}


def few_rows() -> Points:
    """(number of rows, output features, input features) of qwen3-0.6b's matrices"""
    matrices = {"qkv": (4096, 1024), "o": (1024, 2048), "down": (1024, 3072)}
    return {f"{n} rows, {name}": (n, *matrix) for name, matrix in matrices.items() for n in (1, 8, 16)}


def few_rows_after_norm() -> Points:
    """(number of rows, output features, input features, whether silu_and_mul follows) of qwen3-0.6b's matrices."""
    matrices = {"qkv": (4096, 1024, False), "gate_up": (6144, 1024, True)}
    return {f"{n} rows, {name}": (n, *matrix) for name, matrix in matrices.items() for n in (1, 8)}


def shared_prefixes() -> Points:
    """(sequences, tokens that all share, tokens of each alone, H, K)"""
    return {
        "256 x (2048 + 256), 16/8": (256, 2048, 256, 16, 8),
        "64 x (1024 + 256), 16/8": (64, 1024, 256, 16, 8),
        "64 x (1024 + 256), 32/8": (64, 1024, 256, 32, 8),
    }


# A benchmark of tests/kernels/*_cases.py -> its points.
POINTS: dict[str, Points] = {
    "add_rms_norm": steps_of_models(),
    "all_reduce": decode_steps_of_models(),
    "grouped_gemm": tokens_of_experts(),
    "moe_routing": tokens_of_experts(),
    "norm_skinny_linear": few_rows_after_norm(),
    "paged_attention": decodes(),
    "prefill": prefills_of_models(),
    "qk_norm_rope_store": steps_of_models(),
    "rms_norm": steps_of_models(),
    "rotary_embedding": steps_of_models(),
    "sampling": rows_of_logits(),
    "silu_and_mul": steps_of_models(),
    "shared_prefix_attention": shared_prefixes(),
    "skinny_linear": few_rows(),
    "store_kvcache": steps_of_models(),
    "varlen_attention": named_prefills(),
    "varlen_attention_hopper": named_prefills(),
}
