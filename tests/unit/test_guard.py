"""The guard ends what is dead and nothing else, outlives descriptors used again, and never dies alone."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from skynet.protocol.admitted import PeerRegistry
from skynet.protocol.guard import GuardConfig, GuardThread, Watch
from skynet.protocol.sockets import SocketConfig, SocketFactory
from skynet.protocol.tcp import TcpConnection, TcpState, host_of, shut_down, tcp_state
from skynet.testing import cuts
from skynet.testing.cuts import Cuts


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
    assert tcp_state(connection) is None
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


def test_a_connection_is_looked_at_most_often_until_its_handshake_must_be_over() -> None:
    config = GuardConfig(interval_s=0.5, handshake_interval_s=0.01, handshake_s=3)
    with zmq.Context() as context, connected() as (_, far):
        wake, woken, monitor = (context.socket(zmq.PAIR) for _ in range(3))
        guard = GuardThread(PeerRegistry(), wake, woken, config)
        watch = Watch("relay", monitor, None)
        guard._watches[monitor] = watch
        guard._event(watch, int(zmq.Event.ACCEPTED), far.fileno())
        opened_at = watch.connections[far.fileno()].opened_at
        assert guard._look(opened_at + 2.9) == config.handshake_interval_s
        assert guard._look(opened_at + 3.1) == config.interval_s  # admitted, and silent
        for made in (wake, woken, monitor):
            made.close()


@contextlib.contextmanager
def connected() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The two ends of a TCP connection; waits of theirs end after 10 s."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname(), timeout=10)
        with near, server.accept()[0] as far:
            far.settimeout(10)
            yield near, far


@contextlib.contextmanager
def guarding(dead_s: int) -> Iterator[GuardThread]:
    factory = SocketFactory(*zmq.curve_keypair(), config=SocketConfig(guard=GuardConfig(dead_peer_s=dead_s)))
    yield factory.guard
    factory.close()


def state(connection: socket.socket) -> TcpState:
    fd = connection.fileno()
    seen = tcp_state(TcpConnection(fd, os.fstat(fd).st_ino, is_accepted=False))
    assert seen is not None
    return seen


def test_connections_whose_packets_vanish_are_ended_idle_or_not() -> None:
    if reason := cuts.missing():
        pytest.skip(reason)
    dead_s = 2
    with guarding(dead_s) as guard, connected() as (idle, _), connected() as (busy, _), Cuts() as cut:
        for connection in (idle, busy):
            guard.add_plain(connection)
        assert cut.cut(os.getpid(), os.getpid())
        busy.sendall(b"into the void")
        for connection in (busy, idle):
            with contextlib.suppress(TimeoutError):  # as the kernel names it where it is the first to see it
                assert connection.recv(1) == b""
            assert 0.9 * dead_s < state(connection).silent_s < dead_s + 2


def test_a_peer_that_stands_still_with_full_buffers_is_not_dead() -> None:
    dead_s = 1
    with guarding(dead_s) as guard, connected() as (near, far):
        guard.add_plain(near)
        stand_still(near, far, 1.2 * dead_s)
        near.sendall(b"!")
        assert far.recv(1) == b"!"
        assert guard.num_cut == 0


def stand_still(near: socket.socket, far: socket.socket, silent_s: float) -> None:
    """Fill the buffers, and read only when the other kernel hasn't been asked for room for long."""
    near.setblocking(False)
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            sent += near.send(bytes(1 << 16))
    while state(near).silent_s < silent_s:  # its kernel is asked for room less and less often
        time.sleep(0.02)  # the kernel has no event for it
    near.settimeout(10)
    received = 0
    while received < sent:
        received += len(far.recv(1 << 20))


def test_a_process_whose_guard_fails_ends_and_says_why() -> None:
    script = (
        "import time, zmq\n"
        "from skynet.protocol.sockets import SocketFactory\n"
        "SocketFactory(*zmq.curve_keypair()).guard.add(None)\n"
        "time.sleep(30)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=25, check=False)
    assert done.returncode == 1
    assert "guard failed, this process ends" in done.stderr
    assert "Traceback" in done.stderr
