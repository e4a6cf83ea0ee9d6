"""Any bytes, at any layer, against a live listener: it keeps serving, lets nobody in, and doesn't grow."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skynet.errors import ProtocolError
from skynet.protocol import hello as wire
from skynet.protocol.address_limits import RateLimit
from skynet.protocol.admission import AdmissionListener, ListenerConfig, request_admission
from skynet.protocol.hello import Applicant, Challenge, Hello, Refused, Welcome
from skynet.protocol.identity import NodeKey, ProcessKey, SwarmKey
from skynet.protocol.roles import Role
from skynet.protocol.tls import client_context

HOST = "127.0.0.1"
SWARM, COORDINATOR = SwarmKey.generate(), ProcessKey.generate()
APPLICANT = Applicant(node_key=NodeKey.generate(), process_key=ProcessKey.generate(), role=Role.WORKER, suffix="cpu")
TLS = client_context()
UNLIMITED = RateLimit(burst=1e9, per_s=1e9)
FEW = settings(max_examples=40, deadline=None, database=None, derandomize=True)


async def _admit(hello: Hello, source: str) -> Welcome | Refused:
    return Welcome(
        peer_id=hello.peer_id,
        role=hello.role,
        grants=(),
        swarm_name="fuzz",
        coordinator=COORDINATOR.certify(SWARM, SWARM.public_key, time.time()),
        ports={"control": 1},
        lease_s=4.0,
        seen_address=source,
    )


class LiveListener:
    """A listener on an event loop of its own, as a coordinator runs it."""

    def __init__(self) -> None:
        config = ListenerConfig(request_timeout_s=0.5, each_address=UNLIMITED, all_addresses=UNLIMITED)
        self.listener = AdmissionListener(SWARM, _admit, [HOST], config=config)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="listener")

    def start(self) -> None:
        async def begin() -> None:
            self.listener.start()

        self._thread.start()
        asyncio.run_coroutine_threadsafe(begin(), self._loop).result(10)

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self.listener.stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def connect(self) -> socket.socket:
        return socket.create_connection((HOST, self.listener.port), timeout=10)


@pytest.fixture(scope="module")
def live() -> Iterator[LiveListener]:
    listener = LiveListener()
    listener.start()
    yield listener
    welcomed = listener.listener.stats.welcomed
    admission = asyncio.run(
        request_admission(HOST, listener.listener.port, pinned_key=SWARM.public_key, hello=APPLICANT.hello)
    )
    assert admission.welcome.swarm_name == "fuzz", "after all that, an honest node gets in"
    assert listener.listener.stats.welcomed == welcomed + 1
    listener.stop()
    assert listener.listener.num_connections == 0


def _read_all(connection: socket.socket) -> bytes:
    """What still comes until the listener closes; fails (TimeoutError) if it never does."""
    received = b""
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        while chunk := connection.recv(65536):
            received += chunk
    return received


def _receive(connection: socket.socket) -> bytes:
    def exactly(count: int) -> bytes:
        data = b""
        while len(data) < count:
            chunk = connection.recv(count - len(data))
            assert chunk, "closed early"
            data += chunk
        return data

    (length,) = struct.unpack(">I", exactly(4))
    return exactly(length)


@given(chunks=st.lists(st.binary(max_size=2000), max_size=4), hangs_up=st.booleans())
@FEW
def test_any_bytes_instead_of_tls_end_the_connection(live: LiveListener, chunks: list[bytes], hangs_up: bool) -> None:
    with live.connect() as connection:
        with contextlib.suppress(OSError):
            for chunk in chunks:
                connection.sendall(chunk)
            if hangs_up:
                connection.shutdown(socket.SHUT_WR)
        _read_all(connection)


@given(data=st.one_of(st.binary(max_size=5000), st.binary(max_size=4096).map(lambda b: struct.pack(">I", len(b)) + b)))
@FEW
def test_any_bytes_instead_of_a_hello_let_nobody_in(live: LiveListener, data: bytes) -> None:
    welcomed = live.listener.stats.welcomed
    with live.connect() as plain, TLS.wrap_socket(plain, server_hostname=None) as connection:
        _receive(connection)
        with contextlib.suppress(OSError):
            connection.sendall(data)
            connection.unwrap()
        _read_all(connection)
    assert live.listener.stats.welcomed == welcomed


@given(position=st.integers(0, 10_000), mask=st.integers(1, 255), data=st.data())
@FEW
def test_altered_hello_lets_nobody_in(live: LiveListener, position: int, mask: int, data: st.DataObject) -> None:
    welcomed = live.listener.stats.welcomed
    with live.connect() as plain, TLS.wrap_socket(plain, server_hostname=None) as connection:
        challenge = wire.decode(_receive(connection)).open(Challenge)
        hello = bytearray(APPLICANT.hello(challenge, SWARM.public_key))
        position %= len(hello)
        hello[position] ^= mask
        if data.draw(st.booleans(), label="truncate"):
            del hello[position:]
        with contextlib.suppress(OSError):
            connection.sendall(struct.pack(">I", len(hello)) + hello)
        answer = _read_all(connection)
    harmless = hello.find(wire.PACKAGE_VERSION.encode()) < 0  # our package's version is for people, and not signed
    assert live.listener.stats.welcomed == welcomed or harmless, answer


@given(data=st.binary(max_size=4200))
@settings(max_examples=300, deadline=None)
def test_any_bytes_decode_or_raise_a_protocol_error(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        envelope = wire.decode(data)
        for kind in (Challenge, Hello, Welcome, Refused):
            with contextlib.suppress(ProtocolError):
                envelope.open(kind)


def test_memory_stays_bounded_under_many_bad_visitors(live: LiveListener) -> None:
    def visit(count: int) -> None:
        for i in range(count):
            with live.connect() as connection:
                with contextlib.suppress(OSError):
                    connection.sendall(b"\x16\x03\x01\x40\x00" + b"\x01" * (16384 if i % 2 else 10))
                    connection.shutdown(socket.SHUT_WR)
                _read_all(connection)

    visit(50)
    before = psutil.Process().memory_info().rss
    visit(400)
    grown = psutil.Process().memory_info().rss - before
    assert grown < 8 << 20, f"{grown} bytes more after 400 visitors"
