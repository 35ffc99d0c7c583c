"""Loads what records and replays, wherever pytest is pointed at: `pytest --replay FILE` names no folder of tests."""

pytest_plugins = ["tests.replay.plugin"]
