"""The plugins of the suite, loaded wherever pytest is pointed at: `pytest --replay FILE` names no folder of tests."""

pytest_plugins = [
    "tests.report.plugin",
    "tests.replay.plugin",
    "tests.gpu_sharing",
]
