"""A message that never ends doesn't fill our memory, and others are served meanwhile."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import psutil
import pytest
import zmq

from skynet.protocol.ids import PeerId
from skynet.protocol.sockets import Port, SocketFactory

MIB = 1 << 20
BOUND_MIB = 24  # what the guard lets a connection have undelivered
ROOM_MIB = 120  # what the server's memory may grow by: twice the bound (libzmq's own records), plus slack

SERVER = """
import json, sys, zmq
from skynet.protocol.guard import GuardConfig
from skynet.protocol.sockets import SocketConfig, SocketFactory

asked = json.loads(sys.stdin.readline())
guard = GuardConfig(max_undelivered_bytes=asked["bound_mib"] << 20)
config = SocketConfig(max_frame_bytes=16 << 20, handshake_timeout_s=1.0, guard=guard)
factory = SocketFactory(*zmq.curve_keypair(), config=config)
for peer, key in asked["admitted"].items():
    factory.allow(key.encode(), peer, {"data"})
port = factory.bind_router("data", ["127.0.0.1"])
print(json.dumps([port.number, factory.public_key.decode()]), flush=True)
while True:
    if port.socket.poll(1000) and (received := port.receive()) is not None:
        port.socket.send_multipart([received.routing_id, *[frame.bytes[:64] for frame in received.frames]])
"""


class Server(NamedTuple):
    process: psutil.Process
    port: int
    key: bytes

    def memory_mib(self) -> float:
        return float(self.process.memory_info().rss) / MIB


class Peak(threading.Thread):
    """The most memory that a process had while this ran."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self._server = server
        self._is_over = threading.Event()
        self._began_mib = self._peak_mib = server.memory_mib()

    def __enter__(self) -> Peak:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self.join()

    def run(self) -> None:
        while not self._is_over.wait(0.005):
            self._peak_mib = max(self._peak_mib, self._server.memory_mib())

    @property
    def grown_mib(self) -> float:
        return self._peak_mib - self._began_mib


@pytest.fixture
def keys() -> dict[str, tuple[bytes, bytes]]:
    return {name: zmq.curve_keypair() for name in ("mallory", "bob", "stranger")}


@contextlib.contextmanager
def serving(keys: dict[str, tuple[bytes, bytes]], bound_mib: int = BOUND_MIB) -> Iterator[Server]:
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            admitted = {name: keys[name][0].decode() for name in ("mallory", "bob")}
            print(json.dumps({"bound_mib": bound_mib, "admitted": admitted}), file=process.stdin, flush=True)
            port, key = json.loads(process.stdout.readline())
            yield Server(psutil.Process(process.pid), port, key.encode())
        finally:
            process.kill()


@contextlib.contextmanager
def dialling(keys: tuple[bytes, bytes], server: Server) -> Iterator[Port]:
    factory = SocketFactory(*keys)
    port = factory.connect_dealer(f"tcp://127.0.0.1:{server.port}", server.key, PeerId("server"))
    yield port
    port.close()
    factory.close()


def echo(port: Port) -> None:
    port.socket.send(b"are you there?")
    assert port.socket.poll(10_000), "the server doesn't answer"
    received = port.receive()
    assert received is not None
    assert received.frames[0].bytes == b"are you there?"


def send_huge(
    keys: tuple[bytes, bytes], server: Server, frame_bytes: int, num_frames: int, *, greets: bool = True
) -> bool:
    """One multipart message that no limit of libzmq's stops; whether the server cut the connection before its end.

    libzmq's own sender hands a message over when it is complete; what the server sees until then never ends.
    """
    with zmq.Context() as context, context.socket(zmq.DEALER) as attacker:
        attacker.linger = 0
        attacker.curve_publickey, attacker.curve_secretkey = keys
        attacker.curve_serverkey = server.key
        monitor = attacker.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        attacker.connect(f"tcp://127.0.0.1:{server.port}")
        if greets:
            attacker.send(b"hello")
            assert attacker.poll(5000)
            attacker.recv()
        frame = bytes(frame_bytes)
        for _ in range(num_frames):
            attacker.send(frame, zmq.SNDMORE)
        attacker.send(b"the end")
        is_cut = bool(monitor.poll(5000))
        attacker.disable_monitor()
        monitor.close()
    return is_cut


@pytest.mark.parametrize(("frame_bytes", "num_frames"), [(64, 500_000), (65536, 4000)])
def test_admitted_peer_with_a_huge_message_is_cut_and_others_are_served(
    keys: dict[str, tuple[bytes, bytes]], frame_bytes: int, num_frames: int
) -> None:
    with serving(keys) as server, dialling(keys["bob"], server) as bob, ThreadPoolExecutor(1) as thread:
        with Peak(server) as peak:
            attack = thread.submit(send_huge, keys["mallory"], server, frame_bytes, num_frames)
            echo(bob)
            while not attack.done():
                echo(bob)
        assert attack.result(), "the connection wasn't cut"
        echo(bob)
        assert peak.grown_mib < ROOM_MIB


def test_without_the_bound_the_same_message_fills_memory(keys: dict[str, tuple[bytes, bytes]]) -> None:
    with serving(keys, bound_mib=1 << 20) as server, dialling(keys["bob"], server) as bob:
        with Peak(server) as peak:
            send_huge(keys["mallory"], server, 65536, 4000)
            echo(bob)
        assert peak.grown_mib > ROOM_MIB


def test_stranger_that_sends_without_end_gets_nowhere(keys: dict[str, tuple[bytes, bytes]]) -> None:
    with serving(keys) as server, dialling(keys["bob"], server) as bob, ThreadPoolExecutor(9) as threads:
        echo(bob)
        with Peak(server) as peak:
            attacks: list[Future[object]] = [threads.submit(flood_the_handshake, server) for _ in range(8)]
            attacks.append(threads.submit(silent_huge, keys["stranger"], server))
            attacks.append(threads.submit(silent_huge, keys["mallory"], server))
            while not all(attack.done() for attack in attacks):
                echo(bob)
        for attack in attacks:
            attack.result()
        assert peak.grown_mib < ROOM_MIB


def silent_huge(keys: tuple[bytes, bytes], server: Server) -> None:
    send_huge(keys, server, 65536, 1000, greets=False)


def flood_the_handshake(server: Server) -> None:
    """Instead of a handshake, one frame that announces 15 MiB and brings them."""
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", server.port), timeout=2) as attacker:
        attacker.sendall(greeting)
        attacker.recv(64)
        attacker.sendall(b"\x06" + (15 * MIB).to_bytes(8, "big"))
        for _ in range(15):
            attacker.sendall(bytes(MIB))
