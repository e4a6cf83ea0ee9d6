"""An invite: one printable string that says where a swarm is, which key it has, and what its bearer may become.

`skynet-invite-` and base32 (lower case, no padding) of: one byte of layout version, a msgpack array of the fields
below, and the first 4 bytes of the SHA-256 of both, which catches what copying lost. What it grants is decided by the
coordinator's store, where a hash of the secret is kept; the fields here only tell the bearer.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import secrets
from dataclasses import dataclass
from typing import Final

import msgspec

from skynet.errors import ConfigError, MalformedMessage
from skynet.protocol.hello import checked_display
from skynet.protocol.identity import PublicKey, checked_public_key
from skynet.protocol.roles import Grant, Role

PREFIX: Final = "skynet-invite-"
LAYOUT_VERSION: Final = 1
SECRET_BYTES: Final = 20
MAX_CHARS: Final = 2048
MAX_ADDRESSES: Final = 8
_CHECKSUM_BYTES: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Invite:
    """What an invite's bearer knows. Treat it like a password until it is used up."""

    invite_id: str  # for lists and revocation
    secret: bytes
    swarm_name: str
    swarm_key: PublicKey  # pinned by whoever uses the invite
    addresses: tuple[tuple[str, int], ...]  # host, port of the admission listener, most useful first
    role: Role
    grants: tuple[Grant, ...]
    expires_at: int  # seconds since 1970
    uses: int

    def __post_init__(self) -> None:
        if not 1 <= len(self.invite_id) <= 32 or not (self.invite_id.isascii() and self.invite_id.isalnum()):
            raise MalformedMessage(f"invite id {self.invite_id[:40]!r}: 1 to 32 letters and digits are allowed")
        if len(self.secret) != SECRET_BYTES:
            raise MalformedMessage(f"an invite's secret has {SECRET_BYTES} bytes, got {len(self.secret)}")
        if not 1 <= len(self.addresses) <= MAX_ADDRESSES or len(self.grants) > len(Grant):
            raise MalformedMessage(f"an invite has 1 to {MAX_ADDRESSES} addresses, got {len(self.addresses)}")
        if not all(0 < len(host) <= 255 and 0 < port < 65536 for host, port in self.addresses):
            raise MalformedMessage(f"an invite with an impossible address: {self.addresses}")
        if not 0 < self.expires_at < 2**48 or self.uses < 1:
            raise MalformedMessage(f"impossible invite: {self.uses} uses until {self.expires_at}")
        checked_display(self.swarm_name)
        checked_public_key(self.swarm_key, "invite")

    @classmethod
    def parse(cls, text: str) -> Invite:
        """The invite in a string that a user gave. Raises ConfigError."""
        return decode_invite(text)

    def __str__(self) -> str:
        """The printable string: whoever has it can use it."""
        return encode_invite(self)

    def __repr__(self) -> str:
        return f"Invite({self.invite_id}, {self.role})"  # without the secret, which belongs in no log


class _Wire(msgspec.Struct, array_like=True, frozen=True):  # more elements than these are ignored
    invite_id: str
    secret: bytes
    swarm_name: str
    swarm_key: bytes
    addresses: tuple[tuple[str, int], ...]
    role: Role
    grants: tuple[str, ...]
    expires_at: int
    uses: int


_decoder = msgspec.msgpack.Decoder(_Wire)


def new_invite_id() -> str:
    """Short enough to type into `skynet invite revoke`."""
    return base64.b32encode(secrets.token_bytes(5)).decode().lower()


def new_secret() -> bytes:
    return secrets.token_bytes(SECRET_BYTES)


def hash_secret(secret: bytes) -> bytes:
    """What the store keeps. The secret is 160 random bits, so a plain hash can't be searched."""
    return hashlib.sha256(b"skynet/v1/invite\0" + secret).digest()


def encode_invite(invite: Invite) -> str:
    """The printable string."""
    wire = _Wire(
        invite.invite_id,
        invite.secret,
        invite.swarm_name,
        invite.swarm_key,
        invite.addresses,
        invite.role,
        tuple(invite.grants),
        invite.expires_at,
        invite.uses,
    )
    payload = bytes((LAYOUT_VERSION,)) + msgspec.msgpack.encode(wire)
    text = base64.b32encode(payload + _checksum(payload)).decode().rstrip("=").lower()
    if len(text) + len(PREFIX) > MAX_CHARS:
        raise ConfigError(f"the invite would have {len(text)} characters; give it fewer or shorter addresses")
    return PREFIX + text


def decode_invite(text: str) -> Invite:
    """The invite in a string that a user gave. Blanks and line breaks inside are ignored. Raises ConfigError."""
    if len(text) > 2 * MAX_CHARS:
        raise ConfigError(f"invite: {len(text)} characters, at most {MAX_CHARS} are expected; copy the invite alone")
    compact = "".join(text.split()).lower()
    if not compact.startswith(PREFIX):
        raise ConfigError(f"invite: begins with {compact[:20]!r}, expected {PREFIX!r}; copy it whole")
    payload = _checked_payload(compact.removeprefix(PREFIX))
    if payload[0] != LAYOUT_VERSION:
        raise ConfigError(f"invite: of layout {payload[0]}, this SkyNet reads {LAYOUT_VERSION}; upgrade the older side")
    try:
        wire = _decoder.decode(payload[1:])
        known = {grant.value for grant in Grant}
        return Invite(
            invite_id=wire.invite_id,
            secret=wire.secret,
            swarm_name=wire.swarm_name,
            swarm_key=checked_public_key(wire.swarm_key, "invite"),
            addresses=wire.addresses,
            role=wire.role,
            grants=tuple(Grant(g) for g in wire.grants if g in known),
            expires_at=wire.expires_at,
            uses=wire.uses,
        )
    except (msgspec.MsgspecError, ValueError, MalformedMessage, RecursionError) as exc:
        raise ConfigError(f"invite: {exc}; ask for a new one") from exc


def _checked_payload(text: str) -> bytes:
    damaged = "invite: damaged or incomplete; copy it whole"
    try:
        data = base64.b32decode(text.upper() + "=" * (-len(text) % 8))
    except (binascii.Error, ValueError) as exc:
        raise ConfigError(f"{damaged} ({exc})") from exc
    payload, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
    if not payload or checksum != _checksum(payload):
        raise ConfigError(f"{damaged} (its checksum doesn't match)")
    return payload


def _checksum(payload: bytes) -> bytes:
    return hashlib.sha256(payload).digest()[:_CHECKSUM_BYTES]
