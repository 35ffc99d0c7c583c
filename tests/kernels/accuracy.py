"""The tolerance of kernels that compute: flash-attention's, a bound in terms of plain PyTorch in the same dtype."""

import torch


def assert_within_twice_the_error_of_plain_torch(
    actual: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor
) -> None:
    """actual errs at most twice as much as plain, the reference in the same dtype, and one unit in the last place more.

    exact: the reference on float64 copies of the inputs. Errors are the largest over the tensor, the unit that of its
    largest element: it is the rounding of the output itself. NaN anywhere fails.
    """
    assert (actual.dtype, actual.shape) == (plain.dtype, plain.shape)
    assert exact.dtype == torch.float64
    if exact.numel() == 0:
        return
    last_place = torch.finfo(actual.dtype).eps * exact.abs().max()
    plain_error = (plain.double() - exact).abs().max()
    error = (actual.double() - exact).abs().max()
    assert error <= 2 * plain_error + last_place, f"error {error}, plain PyTorch's {plain_error}, unit {last_place}"
