"""What the helpers of these tests must notice, shown on kernels with a known fault."""

import pytest

from tests.support.kernels.compiling import assert_fits, compile_launches
from tests.support.kernels.interpreting import run_interpreted

pytest.importorskip("triton")

CASES = "tests.support.kernels.faulty_kernels"


def test_faults_are_noticed_and_a_right_kernel_passes():
    run_interpreted(CASES)


def test_dependence_on_the_order_is_noticed(monkeypatch):
    monkeypatch.setenv("FAULT", "depends on the order")
    with pytest.raises(AssertionError, match=r"copy \(in order\)\ncopy \(reversed\)\n\n.*Traceback"):
        run_interpreted(CASES)


def test_spills_are_noticed():
    from tests.support.kernels.faulty_kernels import launch_with_spills

    (compiled,) = compile_launches(launch_with_spills)
    with pytest.raises(AssertionError, match="spills"):
        assert_fits(compiled)
