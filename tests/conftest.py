"""Settings of every run: one seed, random order, no network, one thread a process, Hypothesis' profiles.

HYPOTHESIS_PROFILE=quick|dev|ci|nightly sets how many examples are drawn (default: dev). The first two print a failing
example as it was drawn; the others shrink it, which may take minutes.

One seed decides the order of the tests, the state of Python's, numpy's and torch's global generators before each test,
and what Hypothesis draws: `--randomly-seed=N` (pytest-randomly), or NANOVLLM_TEST_SEED=N. The header and each failure
print it. Without pytest-randomly the order is fixed, and `--hypothesis-seed` sets the seed; without pytest-socket the
network is open. The header says which of the two is missing.
"""

import os

# Before torch, transformers and huggingface_hub read them; processes that tests start inherit them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

import gc
import random
import shlex
import signal
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings

PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "dev")
PROFILES = {"quick": 10, "dev": 30, "ci": 100, "nightly": 3000}
WITHOUT_SHRINKING = {"quick", "dev"}
SEED_VARIABLE = "NANOVLLM_TEST_SEED"
LOOPBACK = "127.0.0.1,::1,localhost"
PLUGINS = {"randomly": "the order of the tests is fixed", "socket": "connections to other hosts are not refused"}

for _name, _max_examples in PROFILES.items():
    settings.register_profile(
        _name,
        max_examples=_max_examples,
        deadline=None,  # a first call may import or compile
        derandomize=False,
        print_blob=True,
        report_multiple_bugs=False,
        phases=[phase for phase in Phase if phase is not Phase.shrink or _name not in WITHOUT_SHRINKING],
        suppress_health_check=[HealthCheck.too_slow],
    )
settings.load_profile(PROFILE)


@pytest.hookimpl(tryfirst=True)  # before pytest-randomly, pytest-socket and Hypothesis read their options
def pytest_configure(config: pytest.Config) -> None:
    option = config.option
    if getattr(option, "reruns", None):
        raise pytest.UsageError("--reruns: a test that fails now and then is a defect; find out why instead")
    if hasattr(option, "allow_hosts"):
        option.allow_hosts = option.allow_hosts or LOOPBACK
        option.allow_unix_socket = True
    given = [getattr(option, "randomly_seed", None), option.hypothesis_seed, os.environ.get(SEED_VARIABLE)]
    seed = next((int(value) for value in given if str(value).isdecimal()), random.SystemRandom().randrange(2**31))
    option.hypothesis_seed = seed  # workers of xdist get the options as they are now
    option.randomly_seed = seed
    os.environ[SEED_VARIABLE] = str(seed)  # for processes that tests start, and for tests/support/statistics.py


def pytest_report_header(config: pytest.Config) -> list[str]:
    missing = [
        f"no pytest-{name}: {what}" for name, what in PLUGINS.items() if not config.pluginmanager.hasplugin(name)
    ]
    return [f"nanovllm: {_repeating_command(config)}", *missing]


def _repeating_command(config: pytest.Config) -> str:
    option = "randomly" if config.pluginmanager.hasplugin("randomly") else "hypothesis"
    return f"HYPOTHESIS_PROFILE={PROFILE} python -m pytest --{option}-seed={config.option.hypothesis_seed}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if report.failed:
        markers = item.config.option.markexpr
        is_default = not markers or markers in item.config.getini("addopts")
        option = "" if is_default else f"-m '{markers}' "
        option += "".join(
            f"--kernel {shlex.quote(spec)} " for spec in getattr(item.config.option, "kernel", None) or ()
        )
        text = f"{_repeating_command(item.config)} {option}'{item.nodeid}'"
        text += "\n(without the test's name: all tests in the same order)"
        report.sections.append(("repeat with", text))
    return report


_num_frozen_modules = 0


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Keep the garbage collector away from the objects of newly imported modules.

    An engine collects garbage when it closes; over all that torch, transformers and pytest make at import, each such
    collection takes a third of a second.
    """
    global _num_frozen_modules
    if len(sys.modules) > 1.1 * _num_frozen_modules:
        gc.unfreeze()
        gc.collect()
        gc.freeze()
        _num_frozen_modules = len(sys.modules)


@pytest.fixture(autouse=True)
def _seeded(pytestconfig: pytest.Config) -> None:
    """The global generators have the same state before every test (pytest-randomly knows nothing of torch)."""
    seed = pytestconfig.option.hypothesis_seed
    random.seed(seed)
    np.random.seed(seed)
    torch = sys.modules.get("torch")  # a test without torch does not pay for its import
    if torch is not None:
        torch.manual_seed(seed)


@pytest.fixture
def ctrl_c_raises() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt here and in programs that the test starts, which inherit how it is handled.

    A shell that runs the tests in the background has it ignored.
    """
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)
