"""Cases of rotary_embedding against the layer's formula, which tests/unit/layers hold against reference. D52

Positions are none of the kernel's business: it is given cos and sin, for which the formula in float64 is exact.
"""

from functools import partial

import torch
from hypothesis import strategies as st

from benchmarks.arithmetic import Work
from benchmarks.kernels.inputs import randn
from benchmarks.measuring import Measured
from benchmarks.shapes import SHAPES, Shape
from nanovllm.layers.torch_ops import apply_rotary_embedding
from reference.rotary_embedding import inverse_frequencies
from tests.support.kernels.accuracy import assert_within_twice_the_error_of_plain_torch
from tests.support.kernels.guards import Guards
from tests.support.kernels.registry import Compilation, Kernel, Limits, Refusals, Steps, lazy, meta

rotary_embedding = lazy("rotary_embedding.rotary_embedding")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def tables(num_tokens: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [T, D/2] in float32, as the layer gives them, of positions that do not follow one another."""
    angle = (torch.arange(num_tokens) * 37 % 101)[:, None] * inverse_frequencies(head_dim, 10000.0, {})[0]
    return angle.cos().float(), angle.sin().float()


def check_shape(num_tokens: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, device: str) -> None:
    """Query and key are views of a packed qkv."""
    guards, generator = Guards(device), torch.Generator().manual_seed(0)
    num_heads, num_kv_heads = heads
    packed = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim, generator=generator).to(dtype)
    inputs = guards.read(packed).split([num_heads, num_kv_heads, num_kv_heads], dim=1)[:2]
    cos, sin = (guards.read(table) for table in tables(num_tokens, head_dim))
    with guards:
        outputs = rotary_embedding(*inputs, cos, sin)
    guards.assert_intact()
    for actual, x in zip(outputs, inputs, strict=True):
        plain = apply_rotary_embedding(x, cos, sin)
        exact = apply_rotary_embedding(x.double(), cos.double(), sin.double())
        axes = ("token", "head", "dimension")
        assert_within_twice_the_error_of_plain_torch("rotary_embedding", actual, plain, exact, axes)


def check_far(shape: tuple[int, ...], stride: tuple[int, ...], device: str) -> None:
    """D52: heads or tokens whose elements lie beyond 2**31; at position 0 nothing turns."""
    x = torch.empty(2**31 + 64, dtype=torch.float16, device=device).as_strided(shape, stride)
    x.copy_(torch.arange(shape[0] * shape[1]).view(*shape[:2], 1) + 1)
    cos, sin = torch.ones(shape[0], 32, device=device), torch.zeros(shape[0], 32, device=device)
    first = 1 if shape[1] > 1 else 0
    query, key = rotary_embedding(x, x[:, first:], cos, sin)
    assert torch.equal(query, x)
    assert torch.equal(key, x[:, first:])


def case_name(num_tokens: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> str:
    return f"{num_tokens} x {heads[0]}+{heads[1]} x {head_dim} {str(dtype).removeprefix('torch.')}"


def cases_of(shapes: list[tuple[int, tuple[int, int], int]], dtypes: tuple[torch.dtype, ...]) -> dict[str, partial]:
    return {case_name(*shape, dtype): partial(check_shape, *shape, dtype) for shape in shapes for dtype in dtypes}


def launch(num_tokens: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> None:
    """Views of a packed qkv, on meta tensors."""
    packed = meta(num_tokens, (heads[0] + 2 * heads[1]) * head_dim, dtype=dtype)
    query, key, _ = packed.unflatten(1, (-1, head_dim)).split([heads[0], heads[1], heads[1]], dim=1)
    table = meta(num_tokens, head_dim // 2, dtype=torch.float32)
    rotary_embedding(query, key, table, table)


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def angles(index: int, num_tokens: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin), each [num_tokens, head_dim / 2] float32."""
    angle = 1000 * randn(index, num_tokens, head_dim // 2).float()
    return angle.cos(), angle.sin()


def measured(shape: Shape, num_tokens: int) -> Measured:
    num_heads, num_kv_heads, head_dim = shape[:3]
    num_bytes = num_tokens * (num_heads + num_kv_heads) * head_dim * 2

    def make(index: int) -> tuple[torch.Tensor, ...]:
        qkv = randn(index, num_tokens, num_heads + 2 * num_kv_heads, head_dim)
        query, key, _ = qkv.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        return query, key, *angles(index, num_tokens, head_dim)

    return Measured(
        make=make,
        run=rotary_embedding,
        expected=lambda query, key, cos, sin: (turn(query.double(), cos, sin), turn(key.double(), cos, sin)),
        # besides, a float32 cosine and sine for each pair of a token
        work=Work(num_bytes + num_tokens * head_dim * 4, num_bytes),
        peers={"torch": plain},
    )


def plain(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return turn(query.float(), cos, sin).bfloat16(), turn(key.float(), cos, sin).bfloat16()


REAL = [(shape[:2], shape.head_dim) for shape in SHAPES.values()]
KERNEL = Kernel(
    name="rotary_embedding",
    launched={"rotary_embedding_kernel": Limits(max_shared_bytes=1024)},
    cases=cases_of(
        [(1, (1, 1), 2), (5, (3, 1), 16), (3, (6, 2), 24), (4, (4, 4), 80), (0, (2, 1), 16)],
        (torch.float32, torch.float16),
    )
    | {
        "far head": partial(check_far, (2, 3, 64), (64, 2**30 - 64, 1)),
        "far token": partial(check_far, (3, 1, 64), (2**30, 64, 1)),
    },
    on_gpu=cases_of([(num_tokens, *heads) for num_tokens in (1, 257, 4096) for heads in REAL], DTYPES),
    drawn=st.builds(
        partial,
        st.just(check_shape),
        st.integers(1, 100),
        st.tuples(st.sampled_from([1, 3, 14]), st.sampled_from([1, 2, 5])),
        st.sampled_from([2, 32, 80, 256]),
        st.sampled_from(DTYPES),
    ),
    compiled={
        f"{heads[0]}+{heads[1]} x {head_dim}": Compilation(
            lambda dtype, _, heads=heads, head_dim=head_dim: launch(9, heads, head_dim, dtype)
        )
        for heads, head_dim in [((16, 8), 128), ((32, 8), 128), ((14, 2), 64), ((8, 8), 256), ((4, 2), 80)]
    },
    refused=Refusals(
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
