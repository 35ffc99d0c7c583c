"""Comparisons of a kernel's output with its reference, whose failures say where, by how much, and what was allowed.

axes: how a message names an index: a name for each dimension ("token", "head"), or a function of the index.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from tests.support.comparing import same_bits
from tests.support.counts import INTERPRETED, ON_A_GPU, count_kernel_comparisons, record_error

# How far the largest error may lie above plain PyTorch's, in each dtype. In half precision the rounding of inputs and
# outputs decides, which is the same for both: flash-attention's factor of 2. In float32 the order of the sums decides,
# and both errors are maxima over random roundings: two of the 300 cases drawn in one run had ratios of 2.6 and 3.2.
RATIO = {torch.float32: 4, torch.float16: 2, torch.bfloat16: 2}

Axes: TypeAlias = Sequence[str] | Callable[[tuple[int, ...]], str]


def assert_like_reference(
    kernel: str, actual: torch.Tensor, reference: Callable[..., Any], inputs: Sequence[Any], axes: Axes = ()
) -> None:
    """assert_within_the_error_of_plain_torch, for reference(*inputs) in the inputs' own dtype and in float64."""
    is_float = [isinstance(value, torch.Tensor) and value.is_floating_point() for value in inputs]
    exact = reference(*(value.double() if wide else value for value, wide in zip(inputs, is_float, strict=True)))
    assert_within_the_error_of_plain_torch(kernel, actual, reference(*inputs), exact, axes)


def assert_within_the_error_of_plain_torch(
    kernel: str, actual: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, axes: Axes = ()
) -> None:
    """At most RATIO times the error of plain PyTorch, and one unit in the last place more.

    plain: the reference in the same dtype. exact: the reference on float64 copies of the inputs. Errors are the largest
    over the tensor, the unit that of its largest element: it is the rounding of the output itself. NaN anywhere fails.
    """
    _assert_same_kind(kernel, actual, plain)
    assert exact.dtype == torch.float64
    if exact.numel() == 0:
        return
    last_place = torch.finfo(actual.dtype).eps * exact.abs().max()
    plain_error = (plain.double() - exact).abs().max()
    assert plain_error.isfinite(), f"{kernel}: plain PyTorch gives NaN or infinity, so this case judges nothing"
    allowed = RATIO[actual.dtype] * plain_error + last_place
    errors = (actual.double() - exact).abs().nan_to_num(nan=torch.inf)
    assert errors.max() <= allowed, (
        f"{_where(kernel, actual, exact, errors > allowed, errors, axes)}\n"
        f"its error is {errors.max():.3g}, plain PyTorch's largest {plain_error:.3g}; allowed are {allowed:.3g}: "
        f"{RATIO[actual.dtype]} times plain PyTorch's and one unit in the last place, {last_place:.3g}"
    )
    counted(kernel, actual)
    if allowed:  # not where all is 0
        name = f"kernel {kernel}, {str(actual.dtype).removeprefix('torch.')}"
        record_error(name, float(errors.max()), float(allowed))


def assert_same_bits(kernel: str, actual: torch.Tensor, expected: torch.Tensor, axes: Axes = ()) -> None:
    """Equal bit for bit, NaN included."""
    _assert_same_kind(kernel, actual, expected)
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    differs = actual.contiguous().view(integer) != expected.contiguous().view(integer)
    assert not differs.any(), _where(kernel, actual, expected, differs, differs.double(), axes)
    counted(kernel, actual)


def _assert_same_kind(kernel: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Of one dtype and shape."""
    got = f"{actual.dtype} {list(actual.shape)}" if isinstance(actual, torch.Tensor) else type(actual).__name__
    wanted = f"{expected.dtype} {list(expected.shape)}"
    assert got == wanted, f"{kernel} returns {got}, and its reference {wanted}"


def _where(
    kernel: str,
    actual: torch.Tensor,
    expected: torch.Tensor,
    is_wrong: torch.Tensor,
    errors: torch.Tensor,
    axes: Axes,
) -> str:
    index = tuple(int(place) for place in torch.unravel_index(errors.argmax(), actual.shape))
    if callable(axes):
        place = axes(index)
    else:
        names = [*axes, *(f"dimension {number}" for number in range(len(axes), len(index)))]
        place = ", ".join(f"{name} {number}" for name, number in zip(names, index, strict=False))
    return (
        f"{kernel} differs from its reference in {int(is_wrong.sum())} of {actual.numel()} elements "
        f"({str(actual.dtype).removeprefix('torch.')})\n"
        f"the worst is at {place}: expected {expected[index].item():.8g}, got {actual[index].item():.8g}"
    )


def counted(kernel: str, output: torch.Tensor) -> None:
    """Every element of a kernel's output was compared."""
    way = INTERPRETED if output.device.type == "cpu" else ON_A_GPU
    count_kernel_comparisons(kernel, output.dtype, way, output.numel())


def assert_rounded_alike(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """The same bits, but for one element in fifty.

    Two ways to the same float32 number differ by a few units of its last place, which float16, with 13 bits less,
    rounds alike but for one in a thousand. A rounding left out, or done once too often, changes one in ten or more.
    """
    assert actual.shape == expected.shape
    share = (actual != expected).double().mean().item()
    assert share <= 0.02, f"{share:.1%} of the elements are rounded otherwise"


def assert_repeats(run: Callable[[], object]) -> None:
    """run() gives the same bits fifty times; it returns a tensor or several."""
    first = [output.clone() for output in _tensors(run())]
    for _ in range(50):
        for left, right in zip(first, _tensors(run()), strict=True):
            assert same_bits(left, right), "the same inputs gave other bits"


def _tensors(outputs: Any) -> list[torch.Tensor]:
    """The tensors of an output that is one or several, None left out."""
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    return [output for output in outputs if output is not None]
