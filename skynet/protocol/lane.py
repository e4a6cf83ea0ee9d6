"""The fast lane of a direct link: a plain TCP connection under keys that came over CURVE, used by the thread itself.

ZeroMQ's I/O thread costs each exchange four changes of thread, and its CURVE runs at a third of what AES-GCM does
(docs/decisions/0055). The link stays: it authenticates, hands over the lane's key, and carries everything that the lane
doesn't. The side whose socket was dialled offers a lane; the dialler connects to it. Where that fails, nothing is lost.

    connection  the dialler's 16-byte ticket, then records each way
    record      length of what follows (4, little-endian), AES-256-GCM of the plaintext (nonce: counter, AAD: length)
    plaintext   of a frame's first record: payload bytes in all (8), header (24), payload; of the rest: payload
"""

from __future__ import annotations

import contextlib
import socket as sockets
import struct
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from skynet.errors import MalformedMessage
from skynet.protocol.codec import Buffer
from skynet.protocol.data_frame import HEADER_BYTES, DataFrame, split

TICKET_BYTES: Final = 16
KEY_BYTES: Final = 32
RECORD_BYTES: Final = 128 << 10  # of payload per record: while one is sealed, the kernel moves the last
_TAG_BYTES: Final = 16
_FIRST: Final = struct.Struct(f"<Q{HEADER_BYTES}s")
_LENGTH: Final = struct.Struct("<I")
_NONCE: Final = struct.Struct("<4xQ")
_MAX_RECORD: Final = RECORD_BYTES + _FIRST.size + _TAG_BYTES
_OFFER: Final = struct.Struct(f"<H{TICKET_BYTES}s{KEY_BYTES}s")


class LaneEnded(ConnectionError):
    """The peer closed the lane, or its host is gone."""


@dataclass(frozen=True, slots=True)
class LaneOffer:
    """What the dialled side sends over CURVE: where its lane is, how to show who comes, and the key."""

    port: int
    ticket: bytes
    key: bytes

    def encode(self) -> bytes:
        return _OFFER.pack(self.port, self.ticket, self.key)

    @classmethod
    def decode(cls, payload: Buffer) -> LaneOffer:
        """Raises MalformedMessage."""
        if len(payload) != _OFFER.size:
            raise MalformedMessage(f"a lane offer has {_OFFER.size} bytes, this one has {len(payload)}")
        port, ticket, key = _OFFER.unpack(payload)
        if not port:
            raise MalformedMessage("a lane offer without a port")
        return cls(port, ticket, key)


class Lane:
    """One side of a lane, non-blocking. Belongs to the channel's thread."""

    def __init__(self, socket: sockets.socket, key: bytes, *, is_dialler: bool, max_payload_bytes: int) -> None:
        socket.setblocking(False)
        with contextlib.suppress(OSError):
            socket.setsockopt(sockets.IPPROTO_TCP, sockets.TCP_NODELAY, 1)
            for option in (sockets.SO_SNDBUF, sockets.SO_RCVBUF):
                socket.setsockopt(sockets.SOL_SOCKET, option, 4 << 20)
        both = HKDF(SHA256(), 2 * KEY_BYTES, None, b"skynet/v1/lane").derive(key)
        mine, theirs = both[:KEY_BYTES], both[KEY_BYTES:]
        if not is_dialler:
            mine, theirs = theirs, mine
        self.socket = socket
        self.descriptor = socket.fileno()
        self._sealer, self._opener = AESGCM(mine), AESGCM(theirs)
        self._num_sealed = self._num_opened = 0
        self._max_bytes = max_payload_bytes
        self._leaving: list[memoryview] = []
        self._arrived = memoryview(bytearray(2 * _MAX_RECORD))
        self._start = self._end = 0  # of what arrived and isn't opened yet
        self._header = b""
        self._payload: memoryview | None = None  # of the frame that is arriving
        self._filled = 0

    def is_leaving(self) -> bool:
        """Whether something waits for room in the kernel: poll for writing and `flush`."""
        return bool(self._leaving)

    def close(self) -> None:
        """Close at once. Twice is fine."""
        self.socket.close()

    # -- sending -------------------------------------------------------------------------------------------------------

    def show_ticket(self, ticket: bytes) -> None:
        """First of all, as the dialler, once connected."""
        self._leaving.append(memoryview(ticket))
        self.flush()

    def send(self, header: bytes, payload: Buffer) -> None:
        """Seal a frame and give it to the kernel as far as it goes; `flush` does the rest. Raises LaneEnded."""
        whole = memoryview(payload)
        if whole.nbytes <= RECORD_BYTES:
            self._leaving.append(self._seal(b"".join((_FIRST.pack(whole.nbytes, header), whole))))
            self.flush()
            return
        whole = whole.cast("B")
        for start in range(0, whole.nbytes, RECORD_BYTES):
            piece = whole[start : start + RECORD_BYTES]
            self._leaving.append(self._seal(piece if start else b"".join((_FIRST.pack(whole.nbytes, header), piece))))
            self.flush()

    def flush(self) -> None:
        """Give the kernel what it takes. Raises LaneEnded."""
        while self._leaving:
            first = self._leaving[0]
            try:
                count = self.socket.send(first)
            except BlockingIOError:
                return
            except OSError as exc:
                raise LaneEnded(str(exc)) from exc
            if count < first.nbytes:
                self._leaving[0] = first[count:]
            else:
                del self._leaving[0]

    def _seal(self, plaintext: Buffer) -> memoryview:
        size = len(plaintext) + _TAG_BYTES
        record = bytearray(_LENGTH.size + size)
        _LENGTH.pack_into(record, 0, size)
        view = memoryview(record)
        nonce = _NONCE.pack(self._num_sealed)
        self._num_sealed += 1
        self._sealer.encrypt_into(nonce, plaintext, bytes(view[: _LENGTH.size]), view[_LENGTH.size :])
        return view

    # -- receiving -----------------------------------------------------------------------------------------------------

    def receive(self) -> list[DataFrame]:
        """Read once and return every frame completed by it. Raises LaneEnded, MalformedMessage."""
        if self._start and self._arrived.nbytes - self._end < _MAX_RECORD:
            left = self._end - self._start
            self._arrived[:left] = bytes(self._arrived[self._start : self._end])
            self._start, self._end = 0, left
        try:
            count = self.socket.recv_into(self._arrived[self._end :])
        except BlockingIOError:
            return []
        except OSError as exc:
            raise LaneEnded(str(exc)) from exc
        if not count:
            raise LaneEnded("the peer closed it")
        self._end += count
        frames = []
        while (record := self._next_record()) is not None:
            frame = self._take(record)
            if frame is not None:
                frames.append(frame)
        if self._start == self._end:
            self._start = self._end = 0
        return frames

    def _next_record(self) -> memoryview | None:
        start = self._start + _LENGTH.size
        if self._end < start:
            return None
        prefix = bytes(self._arrived[self._start : start])
        size: int = _LENGTH.unpack(prefix)[0]
        if not _TAG_BYTES <= size <= _MAX_RECORD:
            raise MalformedMessage(f"lane record of {size} bytes, at most {_MAX_RECORD} are allowed")
        if self._end < start + size:
            return None
        plaintext = memoryview(bytearray(size - _TAG_BYTES))
        try:
            self._opener.decrypt_into(
                _NONCE.pack(self._num_opened), self._arrived[start : start + size], prefix, plaintext
            )
        except InvalidTag as exc:
            raise MalformedMessage("lane record that the peer's key didn't seal") from exc
        self._num_opened += 1
        self._start = start + size
        return plaintext

    def _take(self, plaintext: memoryview) -> DataFrame | None:
        if self._payload is None:
            if plaintext.nbytes < _FIRST.size:
                raise MalformedMessage(
                    f"lane frame of {plaintext.nbytes} bytes, a first record has {_FIRST.size} at least"
                )
            size, header = _FIRST.unpack_from(plaintext)
            piece = plaintext[_FIRST.size :]
            if size > self._max_bytes or piece.nbytes > size:
                raise MalformedMessage(f"lane frame of {size} bytes, at most {self._max_bytes} are allowed")
            if piece.nbytes == size:
                return split(memoryview(header), piece)
            self._header, self._payload, self._filled = header, memoryview(bytearray(size)), 0
        else:
            piece = plaintext
        end = self._filled + piece.nbytes
        if not piece.nbytes or end > self._payload.nbytes:
            raise MalformedMessage("lane frame with a record out of place")
        self._payload[self._filled : end] = piece
        self._filled = end
        if end < self._payload.nbytes:
            return None
        payload, self._payload = self._payload, None
        return split(memoryview(self._header), payload)
