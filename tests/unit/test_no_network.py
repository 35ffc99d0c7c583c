"""No test connects to another machine: pytest-socket refuses it, where that plugin is installed."""

import socket

import pytest


def test_a_connection_to_another_machine_is_refused(pytestconfig: pytest.Config) -> None:
    is_guarded = pytestconfig.pluginmanager.hasplugin("socket")
    header = pytestconfig.hook.pytest_report_header(config=pytestconfig, start_path=pytestconfig.rootpath)
    assert any("no pytest-socket" in str(lines) for lines in header) != is_guarded
    if is_guarded:
        # The plugin warns before it raises, and warnings are errors. RFC 5737: an address of no machine.
        with socket.socket() as client, pytest.raises((RuntimeError, UserWarning), match=r"192\.0\.2\.1"):
            client.connect(("192.0.2.1", 9))


def test_connections_within_this_machine_are_allowed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        assert client.getpeername() == server.getsockname()
