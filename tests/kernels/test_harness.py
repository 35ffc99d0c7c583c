"""What the harness of the kernel tests must notice, shown on kernels with a known fault."""

import re
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

pytest.importorskip("triton")

from tests.kernels import test_kernels
from tests.kernels.varlen_attention_cases import Case
from tests.support.counts import counting
from tests.support.kernels.accuracy import assert_same_bits
from tests.support.kernels.compiling import assert_fits, compile_launches
from tests.support.kernels.gluon_emulation import emulated
from tests.support.kernels.interpreting import INTERPRETER
from tests.support.kernels.registry import Limits
from tests.support.limits import HANG_SECONDS
from tests.support.source_tree import ROOT

FAULTY: Any = SimpleNamespace(name="copy", module="tests.support.kernels.faulty_kernels")


@test_kernels.NEEDS_INTERPRETER
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("writes too much", "written outside a tensor of 39 elements"),
        ("leaves one out", "the worst is at token 2, element 12: expected 39, got nan"),
        ("reads too much", "in 39 of 39 elements"),
        ("changes its input", r"an input of shape \[3, 13\] was changed"),
        ("depends on the order", "(?s)programs reversed.*in 23 of 39 elements"),
        ("kills the process", "the interpreting process died with exit code -11"),
        ("hangs", "it ran for more than 1 s"),
    ],
)
def test_a_faulty_kernel_is_noticed_and_a_right_one_passes_after_it(fault: str, message: str) -> None:
    right = INTERPRETER.run(FAULTY.module, "none")  # from here on the process has started
    timeout = 1 if fault == "hangs" else HANG_SECONDS
    assert re.search(message, INTERPRETER.run(FAULTY.module, fault, timeout).failure)
    for outcome in (right, INTERPRETER.run(FAULTY.module, "none")):
        assert not outcome.failure
        assert outcome.functions == {"copy_kernel"}


@test_kernels.NEEDS_INTERPRETER
def test_a_mismatch_is_told_with_everything_that_helps() -> None:
    """Kernel, case, order, dtype, tile size, place and values, how many, the errors, and where the check is."""
    with pytest.raises(pytest.fail.Exception) as raised:
        test_kernels.test_interpreted(FAULTY, "adds to one")
    assert str(raised.value).splitlines()[:-1] == [
        "kernel copy, case 'adds to one': programs in order",
        "check_copy(adds to one, torch.float32, tile_size=16)",
        "copy differs from its reference in 1 of 39 elements (float32)",
        "the worst is at token 2, element 4: expected 31, got 31.5",
        "its error is 0.5, plain PyTorch's largest 0; allowed are 4.65e-06: 4 times plain PyTorch's and one unit in "
        "the last place, 4.65e-06",
    ]
    assert "tests/support/kernels/faulty_kernels.py:" in str(raised.value).splitlines()[-1]


@test_kernels.NEEDS_INTERPRETER
def test_comparisons_of_the_interpreting_process_are_counted_for_the_test() -> None:
    with counting() as counts:
        INTERPRETER.run(FAULTY.module, "none")
    assert counts.comparisons == {"kernel copy, float32, interpreted against the reference": 2 * 39}
    assert counts.errors.keys() == {"kernel copy, float32"}


def test_draws_that_depend_on_more_than_the_seed_are_noticed() -> None:
    impure: Any = SimpleNamespace(drawn=st.builds(lambda n: n + torch.rand(1).item(), st.integers()))
    with pytest.raises(AssertionError):
        test_kernels.test_draws_depend_on_the_seed_alone(impure)


def test_bits_that_differ_are_told_with_their_place() -> None:
    actual = torch.zeros(2, 3)
    actual[1, 2] = -0.0
    with pytest.raises(AssertionError, match=r"in 1 of 6 elements .*\n.*at block 1, slot 2: expected 0, got -0"):
        assert_same_bits("copy", actual, torch.zeros(2, 3), ("block", "slot"))


def test_spills_are_noticed() -> None:
    from tests.support.kernels.faulty_kernels import launch_with_spills

    (compiled,) = compile_launches(launch_with_spills)
    with pytest.raises(AssertionError, match="spills"):
        assert_fits(compiled, Limits())


# --- the emulation of Gluon, by which the Hopper kernel is judged without a GPU ---

HOPPER = ROOT / "nanovllm" / "kernels" / "varlen_attention_hopper.py"
LENGTHS = ((5, 5), (130, 300), (1, 129), (3, 700))


def assert_hopper_kernel_right(old: str, new: str) -> None:
    """On cached and packed keys, for the kernel with `old` replaced by `new` in its source."""
    source = HOPPER.read_text(encoding="utf-8")
    assert old in source
    module: Any = ModuleType("changed_hopper_kernel")
    with emulated():
        exec(compile(source.replace(old, new), str(HOPPER), "exec"), module.__dict__)
    for block_size in (0, 16, 256):
        case = Case(LENGTHS, block_size, 4, 2, 64, torch.float16)
        inputs = case.make_inputs()
        tensors = (inputs.query, inputs.key, inputs.value, inputs.cu_seqlens_q, inputs.cu_seqlens_k)
        options = {"max_seqlen_q": case.max_seqlen_q, "block_tables": inputs.block_tables}
        inputs.assert_right("changed kernel", module.varlen_attention_hopper(*tensors, 0.125, **options))


STUCK = "differs|ended before|arrivals at a barrier|all parts wait at barriers"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("(token < q_len)", "(token <= q_len)", "differs from its reference|storage of"),
        ("last_token + KEYS) // KEYS", "last_token + KEYS - 1) // KEYS", STUCK),
        ("mbarrier.wait(value_copied, 0)", "pass", STUCK),
        ("mbarrier.wait(value_ready.index(stage_before), (tile - 1) // STAGES & 1)", "pass", STUCK),
        ("value_free.index(stage), phase ^ 1", "value_free.index(stage), phase", STUCK),
        ("mbarrier.arrive(key_free.index(stage), count=1)", "pass", STUCK),
        ("count=2)", "count=1)", STUCK),
    ],
)
def test_a_fault_in_the_hopper_kernel_is_noticed(old: str, new: str, message: str) -> None:
    """By what the kernel computes or by a barrier that never completes. tools/mutants has wrong masks and offsets."""
    with pytest.raises(AssertionError, match=message):
        assert_hopper_kernel_right(old, new)
