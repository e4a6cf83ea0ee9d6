"""End-to-end sealing between two workers whose frames pass through the coordinator.

    OFFER   1, initiator's one-time X25519 key (32)
    ACCEPT  2, the offer's key again (32), responder's one-time key (32)
    SEALED  3, counter (8, little-endian), ChaCha20-Poly1305 of the plaintext; the first 9 bytes are authenticated too

The keys come from HKDF-SHA256 over both X25519 results, of the CURVE keys (who) and of the one-time keys (when): the
relay can't read, alter, inject, repeat, reorder or drop anything without the receiver noticing; it can only cut.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from skynet.errors import MalformedMessage
from skynet.protocol.codec import Buffer

OFFER, ACCEPT, SEALED = b"\x01", b"\x02", b"\x03"
_PREFIX: Final = struct.Struct("<cQ")
_KEY_BYTES: Final = 32
OVERHEAD_BYTES: Final = _PREFIX.size + 16


class _Keys:
    """One direction each way, with counters."""

    def __init__(self, send_key: bytes, receive_key: bytes) -> None:
        self._sealer, self._opener = ChaCha20Poly1305(send_key), ChaCha20Poly1305(receive_key)
        self._num_sent = self._num_received = 0

    def seal(self, plaintext: Buffer) -> bytes:
        prefix = _PREFIX.pack(SEALED, self._num_sent)
        nonce = struct.pack("<4xQ", self._num_sent)
        self._num_sent += 1
        return prefix + self._sealer.encrypt(nonce, plaintext, prefix)

    def open(self, message: Buffer) -> bytes | None:
        """The plaintext, None if it isn't sealed with these keys. Raises MalformedMessage for a repeat or a gap."""
        prefix = bytes(message[: _PREFIX.size])
        counter: int = _PREFIX.unpack(prefix)[1]
        try:
            plaintext = self._opener.decrypt(struct.pack("<4xQ", counter), message[_PREFIX.size :], prefix)
        except InvalidTag:
            return None
        if counter != self._num_received:
            what = "repeated" if counter < self._num_received else "lost"
            raise MalformedMessage(f"relayed frames were {what}: number {counter} came, {self._num_received} was next")
        self._num_received += 1
        return plaintext


class SealedSession:
    """One side of a relayed link. The initiator offers; the responder takes new keys only once they were used."""

    def __init__(self, static_secret: bytes, my_key: bytes, peer_key: bytes, *, is_initiator: bool) -> None:
        self._static_secret = static_secret
        self._is_initiator = is_initiator
        self._names = my_key + peer_key if is_initiator else peer_key + my_key
        self._one_time = X25519PrivateKey.generate()
        self._keys: _Keys | None = None
        self._pending: tuple[bytes, bytes, _Keys] | None = None  # offer, answer, keys not yet used by the initiator

    @property
    def is_ready(self) -> bool:
        """Whether `seal` can be used."""
        return self._keys is not None

    def offer(self) -> bytes:
        """What the initiator sends until it is accepted."""
        return OFFER + self._one_time.public_key().public_bytes_raw()

    def handle(self, message: Buffer, reply: Callable[[bytes], None]) -> bytes | None:
        """Take one message: returns its plaintext, None if it was part of agreeing. Raises MalformedMessage."""
        kind = bytes(message[:1])
        if kind == OFFER and len(message) == 1 + _KEY_BYTES and not self._is_initiator:
            reply(self._answer(bytes(message[1:])))
        elif kind == ACCEPT and len(message) == 1 + 2 * _KEY_BYTES and self._is_initiator:
            self._accepted(bytes(message[1 : 1 + _KEY_BYTES]), bytes(message[1 + _KEY_BYTES :]))
        elif kind == SEALED and len(message) >= OVERHEAD_BYTES:
            return self._open(message)
        else:
            raise MalformedMessage(f"relayed message of unknown form: kind {kind.hex()}, {len(message)} bytes")
        return None

    def seal(self, plaintext: Buffer) -> bytes:
        """The message that carries this plaintext."""
        assert self._keys is not None
        return self._keys.seal(plaintext)

    def _answer(self, offered: bytes) -> bytes:
        if self._pending is None or self._pending[0] != offered:
            one_time = X25519PrivateKey.generate()  # fresh for each offer, so that a repeated one brings no key back
            answered = one_time.public_key().public_bytes_raw()
            self._pending = (offered, answered, self._derive(one_time, offered, offered + answered))
        return ACCEPT + offered + self._pending[1]

    def _accepted(self, offered: bytes, answered: bytes) -> None:
        if self._keys is None and offered == self._one_time.public_key().public_bytes_raw():
            self._keys = self._derive(self._one_time, answered, offered + answered)

    def _open(self, message: Buffer) -> bytes:
        plaintext = None if self._keys is None else self._keys.open(message)
        if plaintext is None and self._pending is not None:
            plaintext = self._pending[2].open(message)
            if plaintext is not None:
                self._keys, self._pending = self._pending[2], None
        if plaintext is None:
            raise MalformedMessage("relayed message that the peer's key didn't seal")
        return plaintext

    def _derive(self, mine: X25519PrivateKey, theirs: bytes, salt: bytes) -> _Keys:
        try:
            fresh = mine.exchange(X25519PublicKey.from_public_bytes(theirs))
        except ValueError as exc:
            raise MalformedMessage("relayed link with a worthless one-time key") from exc
        hkdf = HKDF(SHA256(), 2 * _KEY_BYTES, salt, b"skynet/v1/relay" + self._names)
        both = hkdf.derive(self._static_secret + fresh)
        to_responder, to_initiator = both[:_KEY_BYTES], both[_KEY_BYTES:]
        if self._is_initiator:
            return _Keys(to_responder, to_initiator)
        return _Keys(to_initiator, to_responder)
