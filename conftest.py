"""The plugins of the suite, loaded wherever pytest is pointed at: `pytest --report` names no folder of tests."""

pytest_plugins = [
    "tests.support.report",
    "tests.support.replay.plugin",
    "tests.support.gpu_sharing",
    "tests.conformance.components.plugin",
]
