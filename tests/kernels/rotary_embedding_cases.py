"""Cases of rotary_embedding against the layer's formula, which tests/unit/layers hold against reference. D52

Positions are none of the kernel's business: it is given cos and sin, for which the formula in float64 is exact.
"""

from itertools import product

import torch
from hypothesis import strategies as st

from benchmarks.kernels.rotary_embedding import measured
from benchmarks.shapes import SHAPES
from nanovllm.layers.torch_ops import apply_rotary_embedding
from reference.rotary_embedding import inverse_frequencies
from tests.support.kernels.accuracy import assert_like_reference
from tests.support.kernels.guards import Guards
from tests.support.kernels.registry import DTYPES, Compilation, Kernel, Limits, Refused, Steps, case, each, lazy, meta

rotary_embedding = lazy("rotary_embedding.rotary_embedding")


def tables(num_tokens: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [T, D/2] in float32, as the layer gives them, of positions that do not follow one another."""
    angle = (torch.arange(num_tokens) * 37 % 101)[:, None] * inverse_frequencies(head_dim, 10000.0, {})[0]
    return angle.cos().float(), angle.sin().float()


@case
def check_shape(device: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """shape: tokens, heads, kv heads, head_dim. Query and key are views of a packed qkv."""
    guards, (num_tokens, num_heads, num_kv_heads, head_dim) = Guards(device), shape
    packed = guards.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype)
    inputs = packed.split([num_heads, num_kv_heads, num_kv_heads], dim=1)[:2]
    cos, sin = (guards.read(table) for table in tables(num_tokens, head_dim))
    with guards:
        outputs = rotary_embedding(*inputs, cos, sin)
    for actual, x in zip(outputs, inputs, strict=True):
        axes = ("token", "head", "dimension")
        assert_like_reference("rotary_embedding", actual, apply_rotary_embedding, (x, cos, sin), axes)


@case
def check_far(device: str, shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
    """D52: heads or tokens whose elements lie beyond 2**31; at position 0 nothing turns."""
    x = torch.empty(2**31 + 64, dtype=torch.float16, device=device).as_strided(shape, stride)
    x.copy_(torch.arange(shape[0] * shape[1]).view(*shape[:2], 1) + 1)
    cos, sin = torch.ones(shape[0], 32, device=device), torch.zeros(shape[0], 32, device=device)
    first = 1 if shape[1] > 1 else 0
    query, key = rotary_embedding(x, x[:, first:], cos, sin)
    assert torch.equal(query, x)
    assert torch.equal(key, x[:, first:])


def launch(num_tokens: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> None:
    """Views of a packed qkv, on meta tensors."""
    packed = meta(num_tokens, heads[0] + 2 * heads[1], head_dim, dtype=dtype)
    query, key, _ = packed.split([*heads, heads[1]], dim=1)
    table = meta(num_tokens, head_dim // 2, dtype=torch.float32)
    rotary_embedding(query, key, table, table)


KERNEL = Kernel(
    name="rotary_embedding",
    launched={"rotary_embedding_kernel": Limits(max_shared_bytes=1024)},
    cases=each(
        check_shape,
        shape=[(1, 1, 1, 2), (5, 3, 1, 16), (3, 6, 2, 24), (4, 4, 4, 80), (0, 2, 1, 16)],
        dtype=(torch.float32, torch.float16),
    )
    | {
        "far head": check_far((2, 3, 64), (64, 2**30 - 64, 1)),
        "far token": check_far((3, 1, 64), (2**30, 64, 1)),
    },
    on_gpu=each(
        check_shape, shape=[(n, *shape[:3]) for n, shape in product((1, 257, 4096), SHAPES.values())], dtype=DTYPES
    ),
    drawn=st.builds(
        check_shape,
        st.tuples(
            st.integers(1, 100),
            st.sampled_from([1, 3, 14]),
            st.sampled_from([1, 2, 5]),
            st.sampled_from([2, 32, 80, 256]),
        ),
        st.sampled_from(DTYPES),
    ),
    compiled={
        f"{heads[0]}+{heads[1]} x {head_dim}": Compilation(
            lambda dtype, _, heads=heads, head_dim=head_dim: launch(9, heads, head_dim, dtype)
        )
        for heads, head_dim in [((16, 8), 128), ((32, 8), 128), ((14, 2), 64), ((8, 8), 256), ((4, 2), 80)]
    },
    refused=Refused(
        rotary_embedding,
        lambda: {
            "query": torch.empty(3, 4, 16),
            "key": torch.empty(3, 2, 16),
            "cos": torch.empty(3, 8),
            "sin": torch.empty(3, 8),
        },
        (
            ({"query": torch.empty(3, 32)}, "query must be"),
            ({"query": torch.empty(3, 2, 16, dtype=torch.float64)}, "query must be"),
            ({"key": torch.empty(2, 16, 3).transpose(0, 2).transpose(1, 2)}, "key must be"),
            ({"key": torch.empty(3, 2, 32)}, "key must be .* as query is"),
            ({"cos": torch.empty(3, 16)}, "cos must be"),
            ({"sin": torch.empty(3, 8, dtype=torch.float16)}, "sin must be"),
        ),
    ),
    steps={"": Steps(lambda size: launch(size, (16, 8), 128, torch.bfloat16), met_at_start=True)},
    measured={"rotary_embedding": measured},
    reached_by="flash_attn",
)
