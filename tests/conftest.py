"""What every test shares: no network, few threads, and the real data where it is at hand."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
_WORKER = "PYTEST_XDIST_WORKER" in os.environ
_THREADS = 1 if _WORKER else 2
"""Of one process. Workers have one each: two with two threads wait for each other more than they compute."""
if _WORKER:
    os.environ["OMP_NUM_THREADS"] = "1"  # the parent has set two for itself
os.environ.setdefault("OMP_NUM_THREADS", "2")

_REPOSITORY = Path(__file__).resolve().parent.parent


class OutboundConnection(AssertionError):
    """A test tried to leave this machine."""


def _refuse_outbound(address: Any) -> None:
    if not isinstance(address, tuple):
        return  # a Unix socket: never leaves the machine
    host = str(address[0])
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host in ("", "localhost")
    if not local:
        raise OutboundConnection(f"a test tried to connect to {address!r}; the suite is offline")


@pytest.fixture(autouse=True, scope="session")
def _offline() -> Iterator[None]:
    """Connections and name look-ups that would leave this machine raise, in every test of the suite."""
    connect, connect_ex, look_up = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def guarded_connect(self: socket.socket, address: Any) -> None:
        _refuse_outbound(address)
        connect(self, address)

    def guarded_connect_ex(self: socket.socket, address: Any) -> int:
        _refuse_outbound(address)
        return connect_ex(self, address)

    def guarded_look_up(host: Any, *args: Any, **more: Any) -> Any:
        if host is not None:
            _refuse_outbound((host.decode() if isinstance(host, bytes) else host,))
        return look_up(host, *args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
        patch.setattr(socket, "getaddrinfo", guarded_look_up)
        yield


@pytest.fixture(autouse=True, scope="session")
def _few_threads() -> None:
    """Two threads at most, one beside other workers: the suite is a good neighbour."""
    import torch

    torch.set_num_threads(min(_THREADS, torch.get_num_threads()))


@pytest.fixture(scope="session")
def palate_data() -> Path:
    """The folder of real data: PALATE_DATA, or ../shared/data beside the repository; skips where there is
    none.
    """
    folder = Path(os.environ.get("PALATE_DATA", _REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}: set PALATE_DATA to its folder")
    return folder
