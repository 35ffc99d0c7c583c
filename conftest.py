"""The plugins of the suite, loaded wherever pytest is pointed at: `pytest --report` names no folder of tests."""

import pytest

pytest.register_assert_rewrite("tests.support")  # so that a failing assert there shows its values

pytest_plugins = [
    "tests.support.report",
    "tests.support.replay",
    "tests.support.gpu_sharing",
    "tests.conformance.engines.plugin",
    "tests.support.kernels.own_plugin",  # after gpu_sharing: its hook of the command line comes first
    "tests.conformance.components.plugin",
]
