"""Comparisons of tensors, counted: how many values, and how much of the tolerance they used."""

import torch

from tests.support.counts import count_comparisons, record_error


def assert_close(component: str, actual: torch.Tensor, expected: torch.Tensor, rtol: float, atol: float) -> None:
    """torch.testing.assert_close, counted for `component`."""
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)
    count_comparisons(component, expected.numel())
    allowed = atol + rtol * expected.double().abs()
    judged = expected.isfinite() & (allowed > 0)
    if judged.any():
        error, allowed = (actual.double() - expected.double()).abs()[judged], allowed[judged]
        worst = (error / allowed).argmax()
        record_error(component, float(error[worst]), float(allowed[worst]))


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal bit for bit, NaN included."""
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


def assert_within(component: str, actual: torch.Tensor, exact: torch.Tensor, allowed: float, rule: str = "") -> None:
    """No number of `actual` errs by more than `allowed`. rule: what `allowed` was made of, for the message."""
    error = float((actual.double() - exact).abs().max())
    assert error <= allowed, f"error {error}, allowed {allowed} {rule}"
    count_comparisons(component, exact.numel())
    if allowed > 0:
        record_error(component, error, allowed)
