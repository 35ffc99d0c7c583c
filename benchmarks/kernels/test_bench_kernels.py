"""Every benchmark that a registered kernel declares, at its points of benchmarks.shapes.POINTS.

With --kernel, the benchmarks of a callable of the tester's own, beside our kernel.
"""

import pytest
import torch

from benchmarks.measuring import beside_ours
from benchmarks.shapes import POINTS
from tests.support.kernels.own_kernels import NotJudged, must_be_called, sources
from tests.support.kernels.registry import kernels

CASES = [
    pytest.param(kernel, name, point, id=f"{name}-{point}")
    for kernel in kernels().values()
    for name in kernel.measured
    for point in POINTS[name]
]


@pytest.mark.own_kernel
@pytest.mark.parametrize(("kernel", "name", "point"), CASES)
def test_kernel(measure, kernel, name, point):
    if kernel.capability not in (None, torch.cuda.get_device_capability()):
        pytest.skip("needs compute capability {}.{}".format(*kernel.capability))
    measured = kernel.measured[name](*POINTS[name][point])
    if sources(kernel.name):
        try:
            with must_be_called():
                measured.run(*measured.make(0))
        except NotJudged as reason:
            pytest.skip(str(reason))
        measured = beside_ours(measured)
    measure(f"{name}{sources(kernel.name)}", point, measured)
