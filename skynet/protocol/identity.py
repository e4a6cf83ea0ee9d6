"""Who a node, a swarm and a process are: Ed25519 keys on disk, and CURVE keys that they sign.

A signed statement is `skynet/v1/<purpose>`, a zero byte, the swarm's 32-byte key, not-after as 8 bytes big endian
(seconds since 1970), and the subject. So a signature made for one purpose or one swarm means nothing elsewhere.
"""

from __future__ import annotations

import base64
import hashlib
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final, NewType, TypeVar

import zmq
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from skynet.errors import ConfigError, MalformedMessage, ProtocolError
from skynet.protocol.ids import NodeId
from skynet.protocol.private_files import create_private_once, private_dir

PublicKey = NewType("PublicKey", bytes)  # 32 bytes, Ed25519
CurveKey = NewType("CurveKey", bytes)  # 40 bytes, Z85, as libzmq takes it

CERTIFICATE_LIFETIME_S: Final = 30 * 86400
CLOCK_SKEW_S: Final = 86400  # how far two volunteers' clocks may be apart
NODE_ID_CHARS: Final = 26
_Z85: Final = frozenset(b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#")
_FINGERPRINT: Final = re.compile(r"[a-z2-7]{4}(?:-[a-z2-7]{4}){3}")
_K = TypeVar("_K", bound="SigningKey")


def checked_public_key(value: bytes, whose: str) -> PublicKey:
    """`value` as an Ed25519 public key. Raises MalformedMessage."""
    if len(value) != 32:
        raise MalformedMessage(f"{whose}: an Ed25519 key has 32 bytes, got {len(value)}")
    return PublicKey(value)


def checked_curve_key(value: bytes, whose: str) -> CurveKey:
    """`value` as a CURVE public key in Z85. Raises MalformedMessage."""
    if len(value) != 40 or not _Z85.issuperset(value):
        raise MalformedMessage(f"{whose}: a CURVE key has 40 Z85 characters, got {len(value)} bytes")
    return CurveKey(value)


def _base32_digest(key: bytes) -> str:
    return base64.b32encode(hashlib.sha256(key).digest()).decode().lower()


def node_id_of(public_key: PublicKey) -> NodeId:
    """A node's id: 26 base32 characters of its key's SHA-256."""
    return NodeId(_base32_digest(public_key)[:NODE_ID_CHARS])


def fingerprint_of(public_key: PublicKey) -> str:
    """What people compare: 80 bits of the key's SHA-256 in four groups, as `abcd-efgh-ijkl-mnop`."""
    digest = _base32_digest(public_key)
    return "-".join(digest[i : i + 4] for i in range(0, 16, 4))


def is_fingerprint(text: str) -> bool:
    """Whether this is written like a fingerprint: then it names a key, and no swarm's name."""
    return _FINGERPRINT.fullmatch(text) is not None


def statement(purpose: str, swarm_key: PublicKey, not_after: int, subject: bytes) -> bytes:
    """The bytes that a signature covers."""
    return b"".join((f"skynet/v1/{purpose}".encode(), b"\0", swarm_key, struct.pack(">Q", not_after), subject))


@dataclass(frozen=True, slots=True)
class Signed:
    """A signature over a statement, and until when it holds. The statement's other parts come from the context."""

    not_after: int  # seconds since 1970
    signature: bytes

    def __post_init__(self) -> None:
        if not 0 <= self.not_after < 2**63 or len(self.signature) != 64:
            raise MalformedMessage(
                f"a signature has 64 bytes and an end, got {len(self.signature)} and {self.not_after}"
            )

    def verify(
        self, purpose: str, signer: PublicKey, swarm_key: PublicKey, subject: bytes, now: float, lifetime_s: float
    ) -> None:
        """Raises ProtocolError unless `signer` said this, for this swarm, not too long ago."""
        if now > self.not_after:
            raise ProtocolError(
                f"{purpose}: the signature ended {now - self.not_after:.0f} s ago; sign anew, or set both clocks right"
            )
        if self.not_after > now + lifetime_s + CLOCK_SKEW_S:
            raise ProtocolError(
                f"{purpose}: the signature would hold for {self.not_after - now:.0f} s, at most {lifetime_s:.0f} s are "
                "allowed; set both clocks right"
            )
        try:
            key = Ed25519PublicKey.from_public_bytes(signer)
            key.verify(self.signature, statement(purpose, swarm_key, self.not_after, subject))
        except (InvalidSignature, ValueError) as exc:
            raise ProtocolError(f"{purpose}: the signature isn't by {fingerprint_of(signer)} for this swarm") from exc


class SigningKey:
    """An Ed25519 key in a file of mode 0600, created by the first process that asks for it."""

    file_name: ClassVar[str]

    def __init__(self, private_key: Ed25519PrivateKey) -> None:
        self._private_key = private_key
        raw = private_key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        self.public_key = PublicKey(raw)

    @classmethod
    def generate(cls: type[_K]) -> _K:
        """A key that is kept nowhere."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load_or_create(cls: type[_K], directory: Path) -> _K:
        """The key of this directory. Raises ConfigError naming the file and the fix."""
        path = private_dir(directory) / cls.file_name
        data = create_private_once(path, lambda: _to_pem(Ed25519PrivateKey.generate()))
        try:
            key = serialization.load_pem_private_key(data, password=None)
        except (ValueError, TypeError) as exc:
            raise ConfigError(f"{path}: isn't a key file; restore it, or delete it to become somebody new") from exc
        if not isinstance(key, Ed25519PrivateKey):
            raise ConfigError(f"{path}: holds another kind of key, expected Ed25519; restore it, or delete it")
        return cls(key)

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.public_key)

    @property
    def private_key(self) -> Ed25519PrivateKey:
        """For the TLS certificate alone; everything else signs statements."""
        return self._private_key

    def sign(self, purpose: str, swarm_key: PublicKey, not_after: int, subject: bytes) -> Signed:
        """Say `subject` for one purpose, to one swarm, until `not_after`."""
        return Signed(not_after, self._private_key.sign(statement(purpose, swarm_key, not_after, subject)))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.fingerprint})"


class NodeKey(SigningKey):
    """A user on a machine; kept in the user's config directory."""

    file_name = "node.key"

    @property
    def node_id(self) -> NodeId:
        return node_id_of(self.public_key)


class SwarmKey(SigningKey):
    """A swarm; kept in the directory of its coordinator's store."""

    file_name = "swarm.key"


def _to_pem(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


@dataclass(frozen=True, slots=True)
class CurveCertificate:
    """A process's CURVE key, signed by its node's key (a coordinator's: by the swarm's), for one swarm and 30 days."""

    purpose: ClassVar[str] = "curve"
    curve_key: CurveKey
    not_after: int
    signature: bytes

    def __post_init__(self) -> None:
        checked_curve_key(self.curve_key, "certificate")
        Signed(self.not_after, self.signature)

    def verify(self, signer: PublicKey, swarm_key: PublicKey, now: float) -> CurveKey:
        """The certified key. Raises ProtocolError unless `signer` certified it for this swarm and it still holds."""
        signed = Signed(self.not_after, self.signature)
        signed.verify(self.purpose, signer, swarm_key, self.curve_key, now, CERTIFICATE_LIFETIME_S)
        return self.curve_key


@dataclass(frozen=True, slots=True, repr=False)
class ProcessKey:
    """A process's CURVE key pair; lives in memory alone."""

    public: CurveKey
    secret: bytes  # 40 bytes, Z85

    @classmethod
    def generate(cls) -> ProcessKey:
        public, secret = zmq.curve_keypair()
        return cls(CurveKey(public), secret)

    def certify(self, signer: SigningKey, swarm_key: PublicKey, now: float) -> CurveCertificate:
        """This key, vouched for by a node (or, for a coordinator, by its swarm) for 30 days from `now`."""
        signed = signer.sign(CurveCertificate.purpose, swarm_key, int(now) + CERTIFICATE_LIFETIME_S, self.public)
        return CurveCertificate(self.public, signed.not_after, signed.signature)

    def __repr__(self) -> str:
        return f"ProcessKey({self.public.decode()})"

    def __iter__(self) -> Iterator[bytes]:
        """Unpacks as `zmq.curve_keypair()` does: public, secret."""
        yield self.public
        yield self.secret
