"""Proof that a process holds the secret half of the CURVE key that it certifies.

The listener makes an X25519 key for one challenge; the process answers with a MAC keyed by what this key and its own
have in common, which nobody computes without one of the two secrets. A CURVE key is known to every peer: without the
proof a member could have somebody else's key admitted as his own, and shut its holder out.
"""

from __future__ import annotations

import hmac
from typing import Final

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from zmq.utils import z85

from skynet.errors import MalformedMessage, ProtocolError
from skynet.protocol.identity import CurveKey, ProcessKey

PROOF_KEY_BYTES: Final = 32
PROOF_BYTES: Final = 32


class ProofSecret:
    """The listener's half, for one challenge. `public` goes into the challenge."""

    def __init__(self, private_key: X25519PrivateKey | None = None) -> None:
        self._private_key = private_key or X25519PrivateKey.generate()
        raw = self._private_key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        self.public: bytes = raw

    def check(self, proof: bytes, curve_key: CurveKey, said: bytes) -> None:
        """Raises ProtocolError unless the holder of `curve_key` made this proof of `said`."""
        if not hmac.compare_digest(proof, _mac(self._private_key, _raw(curve_key), said)):
            raise ProtocolError(
                f"possession: the sender doesn't hold the secret of the CURVE key {curve_key.decode()}; "
                "come with a key of your own"
            )


def prove(process_key: ProcessKey, proof_key: bytes, said: bytes) -> bytes:
    """The MAC over `said` for the listener that made `proof_key`. Raises MalformedMessage if that isn't a key."""
    return _mac(X25519PrivateKey.from_private_bytes(_raw(process_key.secret)), proof_key, said)


def _mac(secret: X25519PrivateKey, public: bytes, said: bytes) -> bytes:
    try:
        shared = secret.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as exc:  # of the wrong length, or one of the few points whose multiples everybody knows
        raise MalformedMessage(f"possession: not an X25519 key: {exc}") from exc
    return hmac.digest(shared, said, "sha256")


def _raw(key: bytes) -> bytes:
    try:
        return bytes(z85.decode(key))
    except Exception as exc:  # z85 raises whatever its table lookups raise
        raise MalformedMessage("possession: a CURVE key that isn't Z85") from exc
