"""The suite never leaves this machine; its guard is seen to bite."""

from __future__ import annotations

import socket
import urllib.error
import urllib.request

import pytest


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "example.org"])
def test_a_connection_to_elsewhere_is_refused(host: str) -> None:
    with pytest.raises(AssertionError, match="the suite is offline"):
        socket.create_connection((host, 80), timeout=1)


def test_a_library_that_tries_is_refused_too() -> None:
    with pytest.raises((AssertionError, urllib.error.URLError)):
        urllib.request.urlopen("http://example.org/", timeout=1)


def test_this_machine_may_be_spoken_to() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), timeout=5):
        pass
