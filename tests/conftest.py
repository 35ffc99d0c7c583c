"""What holds for every test: no network, one thread a process, one seed for the run, Hypothesis' profiles.

HYPOTHESIS_PROFILE=dev|ci|nightly says how many examples are drawn (dev by default). NANOVLLM_TEST_SEED decides the
order of the tests, where Python's, numpy's and torch's global generators start before each, and what Hypothesis draws;
without it a run has a fresh one. A failure prints both.
"""

import os

# Before torch, transformers and huggingface_hub read them; processes that tests start inherit them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

import gc
import ipaddress
import random
import socket
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers

from tests.run_seed import PROFILE, SEED, how_to_repeat

PROFILES = {"dev": 30, "ci": 100, "nightly": 3000}

for _name, _max_examples in PROFILES.items():
    settings.register_profile(
        _name,
        max_examples=_max_examples,
        deadline=None,  # a first call may import or compile, and two cores are shared: time says nothing here
        derandomize=False,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
settings.load_profile(PROFILE)

# Hypothesis mixes constants of whatever modules of ours are loaded into its draws: a test alone would draw other cases
# than among all tests, and the same seed would not find its failure again. Older versions do not.
if hasattr(providers, "_get_local_constants"):
    providers._get_local_constants = lambda: providers._local_constants  # as it is now: empty

_connect, _connect_ex = socket.socket.connect, socket.socket.connect_ex


def _refuse_other_hosts(address: Any) -> None:
    """Raise unless `address` is a path (unix socket) or on this machine."""
    host = address[0] if isinstance(address, tuple) else "localhost"
    try:
        is_local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = host == "localhost"
    if not is_local:
        raise RuntimeError(f"tests use no network, and this one connects to {address!r}")


def _guarded_connect(self: socket.socket, address: Any) -> None:
    _refuse_other_hosts(address)
    return _connect(self, address)


def _guarded_connect_ex(self: socket.socket, address: Any) -> int:
    _refuse_other_hosts(address)
    return _connect_ex(self, address)


@pytest.hookimpl(tryfirst=True)  # before Hypothesis' plugin reads its option
def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "reruns", None):
        raise pytest.UsageError("--reruns: a test that fails now and then is a defect; find out why instead")
    if getattr(config.option, "hypothesis_seed", SEED) is None:
        config.option.hypothesis_seed = SEED
    socket.socket.connect = _guarded_connect  # type: ignore[method-assign]
    socket.socket.connect_ex = _guarded_connect_ex  # type: ignore[method-assign]


def pytest_unconfigure(config: pytest.Config) -> None:
    socket.socket.connect, socket.socket.connect_ex = _connect, _connect_ex  # type: ignore[method-assign]


def pytest_report_header(config: pytest.Config) -> str:
    return f"nanovllm: {how_to_repeat()}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if report.failed:
        text = f"{how_to_repeat()} python -m pytest {_marked(item.config)}'{item.nodeid}'"
        text += "\n(without the test's name: all tests in the same order)"
        report.sections.append(("repeat with", text))
    return report


def _marked(config: pytest.Config) -> str:
    """The option -m if the run has one of its own: without it, a GPU's test would be left out."""
    markers = config.option.markexpr
    return "" if not markers or markers in config.getini("addopts") else f"-m '{markers}' "


_num_settled = 0  # modules whose objects the garbage collector passes over


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """An engine collects garbage when it closes, and would look through all that torch, transformers and pytest made:
    a third of a second each time, for half of the time of a test that makes many. So what is there when many modules
    have just been imported is set apart. What a test makes later is collected as ever.
    """
    global _num_settled
    if len(sys.modules) > 1.1 * _num_settled:
        gc.unfreeze()
        gc.collect()
        gc.freeze()
        _num_settled = len(sys.modules)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The global generators start alike in every test, whatever ran before it."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch = sys.modules.get("torch")  # a test without torch does not pay for its import
    if torch is not None:
        torch.manual_seed(SEED)
