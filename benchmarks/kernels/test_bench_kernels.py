"""Every benchmark that a registered kernel declares, at its points of benchmarks.shapes.POINTS."""

import pytest
import torch

from benchmarks.shapes import POINTS
from tests.support.kernels.registry import kernels

CASES = [
    pytest.param(kernel, name, point, id=f"{name}-{point}")
    for kernel in kernels().values()
    for name in kernel.measured
    for point in POINTS[name]
]


@pytest.mark.parametrize(("kernel", "name", "point"), CASES)
def test_kernel(measure, kernel, name, point):
    if kernel.capability not in (None, torch.cuda.get_device_capability()):
        pytest.skip("needs compute capability {}.{}".format(*kernel.capability))
    measure(name, point, kernel.measured[name](*POINTS[name][point]))
