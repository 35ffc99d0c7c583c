"""--kernel: a callable of the tester's own in the place of our launcher, right and wrong; wrong uses of the option.

It is one file, since all tests give callables of one file.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.arithmetic import Work
from benchmarks.measuring import Measured
from tests.kernels.test_kernels import KERNELS, NEEDS_INTERPRETER
from tests.support.kernels import own_kernels, own_plugin
from tests.support.kernels.compiling import compile_own_launches
from tests.support.kernels.interpreting import INTERPRETER, failure_of
from tests.support.kernels.registry import REPLACED, launchers, lazy
from tests.support.source_tree import ROOT

FILE = """
import torch
import triton
import triton.language as tl
from reference.paged_attention import paged_attention as attend


@triton.jit
def silu_kernel(x_ptr, y_ptr, stride, size, SHIFT: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, TILE)
    mask = index < size
    gate = tl.load(x_ptr + row * stride + index, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * stride + size + index, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * size + index + SHIFT, (gate * tl.sigmoid(gate) * up).to(y_ptr.dtype.element_ty), mask=mask)


def silu_and_mul(x, shift=0):
    y = torch.empty(len(x), x.shape[1] // 2, dtype=x.dtype, device=x.device)
    if y.numel():
        size = y.shape[1]
        silu_kernel[(len(y),)](x, y, x.stride(0), size, SHIFT=shift, TILE=triton.next_power_of_2(size))
    return y


def silu_that_writes_outside(x):
    return silu_and_mul(x, shift=1)


def paged_attention(query, k_cache, v_cache, block_tables, context_lens, scale=None, skipped=0):
    return attend(query, k_cache, v_cache, block_tables, (context_lens - skipped).clamp(min=0), scale=scale)


def attention_without_the_last_key(query, k_cache, v_cache, block_tables, context_lens, scale=None):
    return paged_attention(query, k_cache, v_cache, block_tables, context_lens, scale, skipped=1)


def store_kvcache(key, value, k_cache, v_cache, slot_mapping, **tiles):
    if key.dtype == torch.float16:
        raise NotImplementedError("float16")
    is_stored = slot_mapping >= 0
    for cache, tokens in ((k_cache, key), (v_cache, value)):
        cache.flatten(0, 1)[slot_mapping[is_stored].long()] = tokens[is_stored]


def store_that_pads_into_the_last_slot(key, value, k_cache, v_cache, slot_mapping):
    for cache, tokens in ((k_cache, key), (v_cache, value)):
        cache.flatten(0, 1)[slot_mapping.long()] = tokens


def unsupported(**inputs):
    raise NotImplementedError("planted")


def relu(x):
    return x.relu()


def attention_with_a_required_scale(query, k_cache, v_cache, block_tables, context_lens, scale):
    return scale


def attention_without_scale(query, k_cache, v_cache, block_tables, context_lens):
    return "usual"


NUMBER = 3
"""
WRONG = {
    "silu_and_mul": "silu_that_writes_outside",
    "paged_attention": "attention_without_the_last_key",
    "store_kvcache": "store_that_pads_into_the_last_slot",
}
RIGHT_CASES = "interpreted and (24 or ragged or nothing or (store and float16)) or silu_and_mul-768-sm_90-bfloat16"
WRONG_CASES = "interpreted and (ragged or nothing or (far and apart))"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_kernels.py"
    path.write_text(FILE, encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _ours_again() -> Iterator[None]:
    yield
    own_kernels.install([])


def run_pytest(*arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    # Without those of this process: in a worker of xdist, pytest-benchmark measures nothing.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def options(file: Path, functions: dict[str, str]) -> list[str]:
    return [f"--kernel={name}={file}:{function}" for name, function in functions.items()]


# --- whole runs ---


@NEEDS_INTERPRETER
def test_right_callables_pass_interpreted_and_compiled(file: Path) -> None:
    """silu_and_mul is the example of docs/own_kernels.md, paged_attention that of examples/."""
    page = (ROOT / "docs" / "own_kernels.md").read_text(encoding="utf-8")
    example = file.parent / "example.py"
    example.write_text(page.split("```python\n")[1].split("```")[0], encoding="utf-8")
    sources = {
        "silu_and_mul": example, "paged_attention": ROOT / "examples" / "custom_attention.py", "store_kvcache": file
    }  # fmt: skip
    arguments = [f"--kernel={name}={source}:{name}" for name, source in sources.items()]
    code, text = run_pytest("tests/kernels/test_kernels.py", *arguments, "-k", RIGHT_CASES)
    assert code == 0, text
    for name in sources:
        assert re.search(rf"{name} by .*\.py:{name}: \d+ tests passed, 0 failed, \d+ judged nothing", text), text
    assert re.search(r"1 x .*store_kvcache does not support the inputs: float16", text), text
    assert re.search(r"silu_and_mul by .*: 3 tests passed, 0 failed, 0 judged nothing", text), text  # one is compiled


@NEEDS_INTERPRETER
def test_wrong_callables_fail_with_case_place_error_and_command(file: Path) -> None:
    code, text = run_pytest("tests/kernels/test_kernels.py", *options(file, WRONG), "-k", WRONG_CASES)
    assert code == 1, text
    for name, function in WRONG.items():
        assert f"kernel {name} by {file}:{function}, case " in text
    assert "written outside a tensor of 120 elements" in text  # silu_and_mul
    place = (
        r"Case\(.*context_lens=|the worst is at sequence \d+, query 0, head \d+, dimension \d+: expected .*, got .*\n"
    )
    assert re.search(place + r"its error is .*, plain PyTorch's largest .*; allowed are ", text), text
    assert "the worst is at block 2, slot 15, head " in text  # store_kvcache: -1 is the last slot
    assert re.search(
        rf"python -m pytest .*--kernel paged_attention={file}:attention_without_the_last_key .*ragged", text
    )


FAKE_GPU = """
import torch

torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_name = lambda *_: "fake"
"""


def test_benchmarks_take_the_place_of_the_tests(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Collected only, for torch is told of a GPU that is not there."""
    (file.parent / "fake_gpu.py").write_text(FAKE_GPU, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(file.parent))
    arguments = ["-p", "fake_gpu", "--collect-only", "--benchmark-only", f"--kernel=silu_and_mul={file}:silu_and_mul"]
    code, text = run_pytest("tests/kernels", *arguments)
    assert code == 0, text
    assert "test_bench_kernels.py::test_kernel[silu_and_mul-llama-3-8b, 64 tokens]" in text
    assert "test_kernel[rms_norm" not in text


# --- the option's value ---


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rms_norm", "must be NAME=SOURCE"),
        ("rms_nrm={file}:relu", "no kernel 'rms_nrm'; the kernels are add_rms_norm, all_reduce,.* paged_.*varlen"),
        ("rms_norm={file}", "SOURCE must be package.module:function, path/to/file.py:function"),
        ("rms_norm=no_such_package.module:run", "cannot import no_such_package.module: ModuleNotFoundError"),
        ("rms_norm={file}x.py:run", "there is no file .*x.py"),
        ("rms_norm={file}:rms", "has no 'rms'; it has .*silu_and_mul, .*paged_attention"),
        ("rms_norm={file}:NUMBER", "NUMBER is not callable: it is of type int"),
        ("silu_and_mul={file}:silu_kernel", "silu_kernel is a Triton kernel; give the function that launches it"),
        (
            "rms_norm={file}:relu",
            r"has the parameters \(x\), and lacks weight: name them as in rms_norm\(x, weight, eps",
        ),
        ("silu_and_mul={file}:paged_attention", r"and query, .*, context_lens would not be given: .*silu_and_mul\(x,"),
        ("silu_and_mul=torch:relu", "no signature that Python can read; wrap it in a function silu_and_mul"),
        ("silu_and_mul={broken}:run", r"cannot import .*broken\.py: ZeroDivisionError: division by zero"),
        ("silu_and_mul={file}:silu_and_mul", "silu_and_mul is given twice"),
    ],
)
def test_a_wrong_value_ends_the_run_at_its_start(file: Path, spec: str, message: str) -> None:
    """pytest prints what a UsageError says, and its exit code is 4."""
    broken = file.with_name("broken.py")
    broken.write_text("1 / 0", encoding="utf-8")
    spec = spec.format(file=file, broken=broken)
    option = SimpleNamespace(kernel=[spec, spec])
    config: Any = SimpleNamespace(option=option, addinivalue_line=lambda name, line: None)
    with pytest.raises(pytest.UsageError, match=f"(?s)^--kernel {re.escape(spec)}: .*{message}"):
        own_plugin.pytest_configure(config)


# --- every kernel of the registry ---

LAUNCHERS = [(kernel, path.rpartition(".")[2]) for kernel in KERNELS.values() for path in launchers(kernel)]
EACH_LAUNCHER = pytest.mark.parametrize(("kernel", "name"), LAUNCHERS, ids=[name for _, name in LAUNCHERS])


def test_each_kernel_has_a_launcher_and_no_two_have_one_name() -> None:
    names = [name for _, name in LAUNCHERS]
    assert len(set(names)) == len(names)
    assert {kernel.name for kernel, _ in LAUNCHERS} == set(KERNELS)


@NEEDS_INTERPRETER
@EACH_LAUNCHER
def test_the_interpreting_process_calls_it(kernel: Any, name: str, file: Path) -> None:
    own_kernels.install([f"{name}={file}:unsupported"])
    wanted = f"not judged: {file}:unsupported does not support the inputs: planted"
    assert any(INTERPRETER.run(kernel.module, case).not_judged == wanted for case in kernel.cases)


@NEEDS_INTERPRETER
def test_the_interpreting_process_calls_ours_again_when_none_is_given(file: Path) -> None:
    module = "tests.kernels.silu_and_mul_cases"
    own_kernels.install([f"silu_and_mul={file}:unsupported"])
    assert INTERPRETER.run(module, "1 x 1, float32").not_judged
    REPLACED.clear()
    assert INTERPRETER.run(module, "1 x 1, float32").functions == {"silu_and_mul_kernel"}


@EACH_LAUNCHER
def test_compiling_calls_it(kernel: Any, name: str, file: Path) -> None:
    own_kernels.install([f"{name}={file}:unsupported"])
    compilation = next(iter(kernel.compiled.values()))
    capability, dtype = compilation.targets[0]
    with pytest.raises(own_kernels.NotJudged, match=r"does not run on tensors .*\(NotImplementedError: planted\)"):
        compile_own_launches(lambda: compilation.launch(dtype, capability), capability, kernel.name)


# --- calls ---


def installed(spec: str) -> own_kernels.OwnKernel:
    own_kernels.install([spec])
    (own,) = own_kernels.installed()
    return own


def test_tile_sizes_are_left_out_and_what_changes_the_result_is_not(file: Path) -> None:
    own = installed(f"paged_attention={file}:paged_attention")
    query, cache = torch.randn(1, 2, 4), torch.randn(2, 16, 2, 4)
    arguments = query, cache, cache, torch.tensor([[1]]), torch.tensor([5])
    order = torch.tensor([0])
    with_hints = own(*arguments, num_splits=3, tiles=(16, 4, 2), sequence_order=order, starts_early=True, out=None)
    assert torch.equal(with_hints, own(*arguments))
    with pytest.raises(own_kernels.NotJudged, match="has no parameter out, and the case gives it"):
        own(*arguments, out=torch.empty_like(query))


def test_a_case_that_does_not_call_it_judges_nothing(file: Path) -> None:
    own_kernels.install([f"silu_and_mul={file}:relu"])
    with pytest.raises(own_kernels.NotJudged, match="does not call the given callable"):
        failure_of(lambda device: None, "cpu")
    assert not failure_of(lambda device: lazy("silu_and_mul.silu_and_mul")(torch.ones(1, 2)), "cpu")


def test_a_failure_without_a_message_shows_the_line(file: Path) -> None:
    own_kernels.install([f"silu_and_mul={file}:relu"])
    text = failure_of(KERNELS["silu_and_mul"].cases["large gates"], "cpu")
    assert "assert silu_and_mul(x).tolist() == [[0.0, 2000.0]]" in text


def test_scale_is_given_as_a_number_and_left_out_where_it_is_the_usual_one(file: Path) -> None:
    query, cache = torch.randn(1, 2, 4), torch.randn(2, 16, 2, 4)
    arguments = query, cache, cache, torch.tensor([[1]]), torch.tensor([5])
    required = installed(f"paged_attention={file}:attention_with_a_required_scale")
    assert required(*arguments) == required(*arguments, scale=None) == required(*arguments, scale=0.5) == 0.5
    absent = installed(f"paged_attention={file}:attention_without_scale")
    assert absent(*arguments) == absent(*arguments, scale=0.5) == "usual"
    with pytest.raises(own_kernels.NotJudged, match="has no parameter scale"):
        absent(*arguments, scale=0.3)


def test_a_benchmark_measures_it_beside_ours(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.kernels.test_bench_kernels import test_kernel as benchmark
    from nanovllm.kernels import silu_and_mul as module

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(module, "silu_and_mul", lambda x: x - 1)
    point, rows = "llama-3-8b, 64 tokens", []
    launcher = lazy("silu_and_mul.silu_and_mul")
    plain = Measured(lambda index: (torch.full((2,), -2.0),), launcher, torch.relu, Work(1), {"torch": torch.relu})
    kernel: Any = SimpleNamespace(name="silu_and_mul", capability=None, measured={"silu_and_mul": lambda *_: plain})
    own = installed(f"silu_and_mul={file}:relu")
    benchmark(lambda *row: rows.append(row), kernel, "silu_and_mul", point)
    ((name, _, measured),) = rows
    assert name == f"silu_and_mul by {file}:relu"
    assert list(measured.peers) == ["ours", "torch"]
    assert measured.run(*measured.make(0)).tolist() == [0, 0]
    assert measured.peers["ours"](*measured.make(0)).tolist() == [-3, -3]
    num_calls = own.num_calls
    measured.make(1)  # inputs of the other sets have been seen before they are recorded
    assert own.num_calls == num_calls + 1
    own_kernels.install([f"silu_and_mul={file}:unsupported"])
    with pytest.raises(pytest.skip.Exception, match="does not support the inputs: planted"):
        benchmark(lambda *row: rows.append(row), kernel, "silu_and_mul", point)
