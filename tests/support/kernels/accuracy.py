"""The tolerance of kernels that compute: flash-attention's, a bound in terms of plain PyTorch in the same dtype."""

import torch

from tests.evidence import INTERPRETED, ON_A_GPU, compared_kernel, tolerated


def assert_within_twice_the_error_of_plain_torch(
    kernel: str, actual: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor
) -> None:
    """actual errs at most twice as much as plain, the reference in the same dtype, and one unit in the last place more.

    exact: the reference on float64 copies of the inputs. Errors are the largest over the tensor, the unit that of its
    largest element: it is the rounding of the output itself. NaN anywhere fails. kernel: for the evidence.
    """
    assert (actual.dtype, actual.shape) == (plain.dtype, plain.shape)
    assert exact.dtype == torch.float64
    if exact.numel() == 0:
        return
    last_place = torch.finfo(actual.dtype).eps * exact.abs().max()
    plain_error = (plain.double() - exact).abs().max()
    error = (actual.double() - exact).abs().max()
    allowed = 2 * plain_error + last_place
    assert error <= allowed, f"error {error}, plain PyTorch's {plain_error}, unit {last_place}"
    counted(kernel, actual)
    if allowed:  # not where all is 0
        tolerated(f"kernel {kernel}, {str(actual.dtype).removeprefix('torch.')}", float(error), float(allowed))


def counted(kernel: str, output: torch.Tensor) -> None:
    """Evidence: every element of a kernel's output was compared."""
    compared_kernel(kernel, output.dtype, INTERPRETED if output.device.type == "cpu" else ON_A_GPU, output.numel())


def assert_rounded_alike(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """The same bits, but for one element in fifty.

    Two ways to the same float32 number differ by a few units of its last place, which float16, with 13 bits less,
    rounds alike but for one in a thousand. A rounding left out, or done once too often, changes one in ten or more.
    """
    assert actual.shape == expected.shape
    share = (actual != expected).double().mean().item()
    assert share <= 0.02, f"{share:.1%} of the elements are rounded otherwise"
