"""Answers libzmq's "may this key connect?" (ZAP, RFC 27) from the registry, on a thread of its own.

It fails closed twice: a key that isn't in the registry is refused, and without this thread libzmq refuses everyone,
because every server socket enforces its domain.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import Final

import zmq

from skynet.protocol.admitted import PeerRegistry

logger = logging.getLogger(__name__)
ZAP_ENDPOINT: Final = "inproc://zeromq.zap.01"
_RAW_KEY_BYTES: Final = 32


def answer(frames: Sequence[bytes], registry: PeerRegistry, now: float) -> list[bytes] | None:
    """The reply to one ZAP request as a ROUTER received it, None if it isn't a request at all."""
    if len(frames) < 8 or frames[1] != b"" or frames[2] != b"1.0":
        return None
    envelope, request_id, domain, mechanism = frames[0], frames[3], frames[4], frames[7]
    peer = None
    if mechanism == b"CURVE" and len(frames) == 9 and len(frames[8]) == _RAW_KEY_BYTES:
        peer = registry.admit(frames[8], domain.decode("utf-8", "replace"), now)
    if peer is None:
        logger.info("handshake refused domain=%s address=%s", domain[:64], frames[5][:64])
        return [envelope, b"", b"1.0", request_id, b"400", b"not admitted", b"", b""]
    return [envelope, b"", b"1.0", request_id, b"200", b"OK", peer.curve_key, b""]


class ZapHandler:
    """Owns the ZAP socket and its thread. `socket` is a bound ROUTER, `stop_receiver` the end that wakes it to stop."""

    def __init__(self, registry: PeerRegistry, socket: zmq.Socket[bytes], stop_receiver: zmq.Socket[bytes]) -> None:
        self._registry = registry
        self._socket = socket
        self._stop_receiver = stop_receiver
        self._thread = threading.Thread(target=self._run, name="zap", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        """Wait for the thread after its stop socket was written to."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            poller = zmq.Poller()
            poller.register(self._socket, zmq.POLLIN)
            poller.register(self._stop_receiver, zmq.POLLIN)
            while True:
                ready = dict(poller.poll())  # its deadline is the stop socket
                if self._stop_receiver in ready:
                    return
                reply = answer(self._socket.recv_multipart(), self._registry, time.monotonic())
                if reply is not None:
                    self._socket.send_multipart(reply)
        except Exception:
            logger.exception("ZAP handler ended; from now on every handshake is refused")
        finally:
            # Closing it is what makes libzmq refuse everyone: a bound socket that nobody reads would only delay them.
            self._socket.close(linger=0)
            self._stop_receiver.close(linger=0)
