"""The guard outlives descriptors whose numbers were used again before it heard of them."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from skynet.protocol.admitted import PeerRegistry
from skynet.protocol.guard import GuardConfig, GuardThread, Watch
from skynet.protocol.tcp import TcpConnection, bytes_received, host_of, shut_down


@pytest.fixture(params=["file", "unix socket"])
def reused(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[int]:
    """The number of a closed TCP connection that is something else by now."""
    if request.param == "file":
        with open(tmp_path / "some.db", "wb") as file:
            yield file.fileno()
    else:
        near, far = socket.socketpair(socket.AF_UNIX)
        with near, far:
            yield near.fileno()


def test_a_number_used_again_for_something_else_is_left_alone(reused: int) -> None:
    connection = TcpConnection(reused, os.fstat(reused).st_ino, is_accepted=True)
    assert bytes_received(connection) is None
    assert host_of(connection) == ""
    shut_down(connection)
    os.write(reused, b"still open")


def test_a_file_is_never_shut_down_nor_watched(tmp_path: Path) -> None:
    with zmq.Context() as context, open(tmp_path / "some.db", "wb") as file:
        wake, woken, monitor = (context.socket(zmq.PAIR) for _ in range(3))
        guard = GuardThread(PeerRegistry(), wake, woken, GuardConfig())
        watch = Watch("control", monitor, None)
        guard._event(watch, int(zmq.Event.ACCEPTED), file.fileno())
        assert not watch.connections
        shut_down(TcpConnection(file.fileno(), os.fstat(file.fileno()).st_ino, is_accepted=True))
        for made in (wake, woken, monitor):
            made.close()
