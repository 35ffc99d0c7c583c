"""What holds for every test: one seed, random order, no network, one thread a process, Hypothesis' profiles.

HYPOTHESIS_PROFILE=quick|dev|ci|nightly sets how many examples are drawn (default: dev); the first two print a failing
example as it was drawn, the others shrink it, which may take minutes. One seed decides the order of the
tests, the state of Python's, numpy's and torch's global generators before each test, and what Hypothesis draws:
`--randomly-seed=N` (pytest-randomly), or NANOVLLM_TEST_SEED=N. It is printed in the header and with each failure.

pytest-randomly (order, seed) and pytest-socket (no network) are kept libraries. A machine that lacks one runs without
it: in the order of the files, with `--hypothesis-seed` as the seed, with an open network. The header says so.
"""

import os

# Before torch, transformers and huggingface_hub read them; processes that tests start inherit them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

import gc
import random
import sys
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
        deadline=None,  # a first call may import or compile, and two cores are shared: time says nothing here
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
    return [f"nanovllm: {_how_to_repeat(config)}", *missing]


def _seed(config: pytest.Config) -> int:
    return config.option.hypothesis_seed


def _how_to_repeat(config: pytest.Config) -> str:
    option = "randomly" if config.pluginmanager.hasplugin("randomly") else "hypothesis"
    return f"HYPOTHESIS_PROFILE={PROFILE} python -m pytest --{option}-seed={_seed(config)}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if report.failed:
        text = f"{_how_to_repeat(item.config)} {_marked(item.config)}'{item.nodeid}'"
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
def _seeded(pytestconfig: pytest.Config) -> None:
    """The global generators have the same state before every test (pytest-randomly knows nothing of torch)."""
    seed = _seed(pytestconfig)
    random.seed(seed)
    np.random.seed(seed)
    torch = sys.modules.get("torch")  # a test without torch does not pay for its import
    if torch is not None:
        torch.manual_seed(seed)
