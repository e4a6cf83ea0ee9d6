"""What can't go on says so to its process: a coordinator that looks alive and serves nobody helps nobody."""

from __future__ import annotations

import asyncio
import socket
import threading
from pathlib import Path
from typing import Any, cast

import pytest
import zmq

from skynet.protocol.admission import AdmissionListener
from skynet.protocol.hello import Hello, Refused
from skynet.protocol.identity import SwarmKey
from skynet.protocol.relay import RelayServer
from skynet.protocol.sockets import SocketFactory


def test_a_relay_that_fails_tells_its_process() -> None:
    factory = SocketFactory(*zmq.curve_keypair())
    failed = threading.Event()
    relay = RelayServer(factory, ["127.0.0.1"], on_failed=failed.set)
    try:
        relay._gone.append(cast("Any", "not a pair"))
        relay.start()
        assert failed.wait(5)
    finally:
        relay.stop()
        factory.close()


def test_a_relay_that_is_stopped_has_not_failed() -> None:
    factory = SocketFactory(*zmq.curve_keypair())
    failed = threading.Event()
    relay = RelayServer(factory, ["127.0.0.1"], on_failed=failed.set)
    relay.start()
    relay.stop()
    factory.close()
    assert not failed.is_set()


def test_a_listener_that_accepts_nobody_any_more_ends_whoever_runs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def admit(_: Hello, __: str) -> Refused:
        raise AssertionError("nobody comes that far")

    def fail(connection: socket.socket, _: str) -> None:
        connection.close()
        raise AttributeError("a bug")

    async def act() -> None:
        async with AdmissionListener(SwarmKey.load_or_create(tmp_path), admit, ["127.0.0.1"]) as listener:
            monkeypatch.setattr(listener, "_visited", fail)
            running = asyncio.create_task(listener.run())
            _, writer = await asyncio.open_connection("127.0.0.1", listener.port)
            async with asyncio.timeout(5):
                with pytest.raises(AttributeError):
                    await running
            writer.close()

    asyncio.run(act())
