"""Cases of skinny_linear and norm_skinny_linear against reference.linear, rms_norm and silu_and_mul. D52"""

import torch
from hypothesis import strategies as st
from torch.nn import functional

from benchmarks.arithmetic import Work
from benchmarks.kernels.inputs import randn
from benchmarks.measuring import Measured
from nanovllm.layers.torch_ops import TORCH_OPS
from reference.linear import linear
from reference.rms_norm import rms_norm
from reference.silu_and_mul import silu_and_mul
from tests.support.kernels.accuracy import assert_within_the_error_of_plain_torch
from tests.support.kernels.guards import Guards
from tests.support.kernels.registry import Compilation, Kernel, Limits, Refused, Steps, case, each, lazy, meta

skinny_linear = lazy("skinny_linear.skinny_linear")
norm_skinny_linear = lazy("skinny_linear.norm_skinny_linear")
TileConfig = lazy("skinny_linear.TileConfig")
MAX_SKINNY_ROWS_WITH_NORM = 8  # of layers.triton_ops, which imports Triton
MATRICES = ((4096, 1024), (1024, 2048), (1024, 3072), (1152, 896), (896, 4864))  # of qwen3-0.6b and qwen2.5-0.5b
HALF = (torch.float16, torch.bfloat16)
SHAPES = st.tuples(st.integers(1, 16), st.integers(1, 300).map(lambda n: 2 * n), st.integers(1, 3000))


@case
def check(
    device: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype = torch.float16,
    has_bias: bool = False,
    spare: int = 0,
    tiles: tuple[int, int, int] | None = None,
) -> None:
    """shape: rows, output features, input features. spare: elements between the rows of x and of the weight."""
    options = {} if tiles is None else {"tiles": TileConfig(*tiles)}
    guards, (num_rows, out_features, in_features) = Guards(device), shape
    x = guards.randn(num_rows, in_features + spare, dtype=dtype)[:, :in_features]
    weight = guards.randn(out_features, in_features + spare, dtype=dtype)[:, :in_features]
    bias = guards.randn(out_features, dtype=dtype) if has_bias else None
    with guards:
        y = skinny_linear(x, weight, bias, **options)
    plain = functional.linear(x, weight, bias)
    exact = linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert_within_the_error_of_plain_torch("skinny_linear", y, plain, exact, ("token", "feature"))


@case
def check_norm(
    device: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype = torch.float16,
    has_residual: bool = True,
    is_gated: bool = False,
    has_bias: bool = False,
    spare: int = 0,
    tiles: tuple[int, int, int] | None = None,
) -> None:
    """As check. The sum of x and the residual has the same bits as torch's."""
    options = {} if tiles is None else {"tiles": TileConfig(*tiles)}
    guards, (num_rows, out_features, in_features) = Guards(device), shape
    x, residual = (guards.randn(num_rows, in_features + spare, dtype=dtype)[:, :in_features] for _ in range(2))
    norm_weight = guards.randn(in_features, dtype=dtype)
    weight = guards.randn(out_features, in_features + spare, dtype=dtype)[:, :in_features]
    bias = guards.randn(out_features, dtype=dtype) if has_bias else None
    added = residual if has_residual else None
    with guards:
        y, total = norm_skinny_linear(x, added, norm_weight, 1e-5, weight, bias, is_gated=is_gated, **options)
    assert torch.equal(total, x + residual if has_residual else x)
    results = []
    for normed in (TORCH_OPS.rms_norm(total, norm_weight, 1e-5), rms_norm(total.double(), norm_weight.double(), 1e-5)):
        result = linear(normed, weight.to(normed.dtype), None if bias is None else bias.to(normed.dtype))
        results.append(silu_and_mul(result) if is_gated else result)
    assert_within_the_error_of_plain_torch("skinny_linear", y, *results, ("token", "feature"))


def check_far_row(device: str) -> None:
    """D52: the last row of the weight begins beyond 2**31 elements, in a view of 4 GiB."""
    weight = torch.empty(2**31 + 64, dtype=torch.float16, device=device).as_strided((3, 64), (2**30, 1))
    weight.copy_(torch.arange(3)[:, None] + 1)
    assert skinny_linear(torch.ones(2, 64, dtype=torch.float16, device=device), weight).tolist() == [[64, 128, 192]] * 2


def check_rows_do_not_meet(device: str) -> None:
    """A token's output has the same bits alone and with others, of which one is NaN."""
    x, weight = torch.randn(8, 600, device=device).half(), torch.randn(40, 600, device=device).half()
    x[3] = torch.nan
    together = skinny_linear(x, weight)
    assert together[3].isnan().all()
    for row in (0, 7):
        assert torch.equal(skinny_linear(x[row : row + 1], weight)[0], together[row])


def launch(num_rows: int, dtype: torch.dtype) -> None:
    for out_features, in_features in MATRICES:
        skinny_linear(meta(num_rows, in_features, dtype=dtype), meta(out_features, in_features, dtype=dtype))
    if num_rows <= MAX_SKINNY_ROWS_WITH_NORM:
        x, norm_weight = meta(num_rows, 1024, dtype=dtype), meta(1024, dtype=dtype)
        norm_skinny_linear(x, None, norm_weight, 1e-6, meta(4096, 1024, dtype=dtype))
        norm_skinny_linear(x, x, norm_weight, 1e-6, meta(4096, 1024, dtype=dtype))
        norm_skinny_linear(x, x, norm_weight, 1e-6, meta(6144, 1024, dtype=dtype), is_gated=True)


def measured(num_rows: int, out_features: int, in_features: int) -> Measured:
    num_weights = out_features * in_features
    return Measured(
        make=lambda index: (randn(index, num_rows, in_features), randn(index, out_features, in_features) * 0.02),
        run=skinny_linear,
        expected=lambda x, weight: x.double() @ weight.double().T,
        work=Work((num_weights + num_rows * in_features) * 2, num_rows * out_features * 2, 2 * num_rows * num_weights),
        peers={"torch": functional.linear},
    )


def measured_with_norm(num_rows: int, out_features: int, in_features: int, is_gated: bool) -> Measured:
    def plain(x, residual, norm_weight, weight):
        total = x + residual
        y = functional.linear(functional.rms_norm(total, norm_weight.shape, norm_weight, 1e-6), weight)
        gate, up = y.chunk(2, dim=-1)
        return (functional.silu(gate) * up if is_gated else y), total

    def make(index: int):
        x, residual, norm_weight = (
            randn(index, *shape) for shape in ((num_rows, in_features),) * 2 + ((in_features,),)
        )
        return x, residual, norm_weight, randn(index, out_features, in_features) * 0.02

    num_weights, num_inputs = out_features * in_features, num_rows * in_features
    num_outputs = num_rows * (out_features // 2 if is_gated else out_features)
    return Measured(
        make=make,
        run=lambda x, residual, norm_weight, weight: norm_skinny_linear(
            x, residual, norm_weight, 1e-6, weight, is_gated=is_gated
        ),
        expected=lambda *tensors: plain(*(tensor.double() for tensor in tensors)),
        work=Work((num_weights + 2 * num_inputs) * 2, (num_outputs + num_inputs) * 2, 2 * num_rows * num_weights),
        peers={"torch": plain},
    )


KERNEL = Kernel(
    name="skinny_linear",
    launched={"skinny_linear_kernel": Limits()},
    cases=each(check, shape=[(1, 8, 64), (3, 13, 100), (9, 16, 200), (16, 5, 33), (0, 4, 16)], tiles=[(8, 16, 4)])
    | {
        "one chunk": check((2, 8, 40)),
        "bias": check((3, 13, 100), has_bias=True, tiles=(8, 16, 4)),
        "more parts than warps hold": check((3, 35, 300), tiles=(16, 16, 8)),
        "rows far apart": check((5, 9, 72), spare=7, tiles=(8, 16, 4)),
        "norm, one chunk": check_norm((8, 24, 60), tiles=(16, 16, 4)),
        "norm without a residual": check_norm((2, 13, 100), has_residual=False, tiles=(8, 16, 4)),
        "norm, bias, rows far apart": check_norm((9, 13, 100), has_bias=True, spare=3, tiles=(8, 16, 4)),
        "gated": check_norm((3, 26, 100), is_gated=True, tiles=(8, 16, 4)),
        "gated, one column": check_norm((6, 2, 8), is_gated=True),
        "gated, bias": check_norm((9, 26, 100), is_gated=True, has_bias=True, tiles=(8, 16, 4)),
        "rows do not meet": check_rows_do_not_meet,
        "far row": check_far_row,
    },
    on_gpu=each(check, shape=[(rows, *sizes) for rows in (1, 8, 16) for sizes in MATRICES], dtype=HALF)
    | each(check_norm, shape=[(rows, 6144, 1024) for rows in (1, 8)], dtype=HALF, is_gated=[False, True])
    | each(check_norm, shape=[(1, 4096, 1024), (8, 5120, 2048)], dtype=HALF, has_residual=[False, True]),
    drawn=st.builds(check, SHAPES, st.sampled_from(HALF), has_bias=st.booleans(), spare=st.integers(0, 9))
    | st.builds(
        check_norm,
        SHAPES,
        st.sampled_from(HALF),
        has_residual=st.booleans(),
        is_gated=st.booleans(),
        has_bias=st.booleans(),
        spare=st.integers(0, 9),
    ),
    compiled={
        f"{rows} rows": Compilation(
            lambda dtype, _, rows=rows: launch(rows, dtype), ((80, HALF[1]), (90, HALF[1]), (100, HALF[0]))
        )
        for rows in (1, 16)
    }
    | {
        "one gated column": Compilation(  # Triton makes a constant of an argument that is 1
            lambda dtype, _: norm_skinny_linear(
                meta(6, 8, dtype=dtype), None, meta(8, dtype=dtype), 1e-5, meta(2, 8, dtype=dtype), is_gated=True
            ),
            ((90, torch.float16),),
        )
    },
    refused=Refused(
        lambda x, weight, bias=None: skinny_linear(x, weight, bias),
        lambda: {"x": torch.zeros(4, 32).half(), "weight": torch.zeros(8, 32).half()},
        (
            ({"x": torch.zeros(17, 32).half()}, r"x must be \[M, K\] with M at most 16 .* got \[17, 32\]"),
            ({"x": torch.zeros(4, 32)}, "bfloat16, got .* in torch.float32"),
            ({"x": torch.zeros(32, 4).half().T}, "x must be .* contiguous rows"),
            ({"weight": torch.zeros(8, 31).half()}, r"weight must be \[N, 32\]"),
            ({"weight": torch.zeros(8, 32).bfloat16()}, "weight must be .* in torch.float16, as x is"),
            ({"bias": torch.zeros(7).half()}, r"bias must be \[8\]"),
        ),
    ),
    # The sizes of a matrix are constants, so each matrix of a model has a variant for 8 rows and one for 16.
    steps={"": Steps(lambda size: skinny_linear(meta(min(size, 8), 1024), meta(4096, 1024)))},
    measured={"skinny_linear": measured, "norm_skinny_linear": measured_with_norm},
)
