"""The four messages of admission: Challenge, then Hello, then Welcome or Refused.

Each is one msgpack array ["skynet", protocol, package, kind, body, signature]. This layout is frozen for ever, so that
any two versions understand at least which of them is older: `protocol` is an integer, `package` the text of a version,
`kind` text, `body` a byte string holding a msgpack map of the fields below, `signature` 64 bytes for a Hello and empty
otherwise. Later versions may append elements. A body is read only when both sides speak the same protocol, a Refused's
always. docs/protocol.md describes the bytes, tests/unit/test_hello.py holds golden ones.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Final, Literal, TypeVar

import msgspec

from skynet.errors import (
    AdmissionRefused,
    AwaitingApproval,
    ConfigError,
    MalformedMessage,
    ProtocolError,
    UnknownKind,
    VersionMismatch,
)
from skynet.protocol.codec import PROTOCOL_VERSION
from skynet.protocol.identity import (
    CurveCertificate,
    CurveKey,
    NodeKey,
    ProcessKey,
    PublicKey,
    Signed,
    checked_public_key,
    node_id_of,
    statement,
)
from skynet.protocol.ids import NodeId, PeerId
from skynet.protocol.possession import PROOF_BYTES, PROOF_KEY_BYTES, ProofSecret, prove
from skynet.protocol.roles import Grant, Role

MAGIC: Final = "skynet"
PACKAGE_VERSION: Final = "0.1.0"
MAX_MESSAGE_BYTES: Final = 4096
HELLO_LIFETIME_S: Final = 86400  # long, since clocks differ; what makes a Hello fresh is the challenge it signs
CHALLENGE_BYTES: Final = 32
_SUFFIX: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,31}")

T = TypeVar("T")


def checked_suffix(suffix: str) -> str:
    """The part of a peer id after the node id. Raises MalformedMessage."""
    if not _SUFFIX.fullmatch(suffix):
        raise MalformedMessage(
            f"suffix {suffix[:40]!r}: 1 to 32 letters, digits or . _ : - are allowed, beginning with a letter or digit"
        )
    return suffix


def checked_display(text: str, limit: int = 64) -> str:
    """Text of a peer that people will read: short, and without what a terminal would obey. Raises MalformedMessage."""
    if len(text) > limit or not text.isprintable():
        raise MalformedMessage(f"display text {text[:limit]!r}: at most {limit} printable characters are allowed")
    return text


@dataclass(frozen=True, slots=True, kw_only=True)
class Challenge:
    """Listener -> node, first: "sign this, and show that you hold the key you come with"."""

    kind: ClassVar[str] = "challenge"
    nonce: bytes
    proof_key: bytes  # X25519, made for this challenge alone

    def __post_init__(self) -> None:
        if len(self.nonce) != CHALLENGE_BYTES:
            raise MalformedMessage(f"a challenge has {CHALLENGE_BYTES} bytes, got {len(self.nonce)}")
        if len(self.proof_key) != PROOF_KEY_BYTES:
            raise MalformedMessage(f"a challenge's key has {PROOF_KEY_BYTES} bytes, got {len(self.proof_key)}")


def new_challenge() -> tuple[Challenge, ProofSecret]:
    """A challenge for one visitor, and what its answer is checked with."""
    secret = ProofSecret()
    return Challenge(nonce=secrets.token_bytes(CHALLENGE_BYTES), proof_key=secret.public), secret


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """Node -> listener: "this is who I am, the key I'll come with, and what I want to be"."""

    kind: ClassVar[str] = "hello"
    node_key: bytes
    certificate: CurveCertificate
    possession: bytes  # that this process holds the certified key, and not somebody else
    role: Role
    suffix: str  # a worker's is stable (its device or --name), others choose a random one
    display_name: str = ""  # for people
    invite_id: str = ""
    invite_secret: bytes = b""
    not_after: int  # end of this Hello's signature

    def __post_init__(self) -> None:
        checked_public_key(self.node_key, "node key")
        if len(self.possession) != PROOF_BYTES:
            raise MalformedMessage(f"a proof of possession has {PROOF_BYTES} bytes, got {len(self.possession)}")
        checked_suffix(self.suffix)
        checked_display(self.display_name)
        if len(self.invite_id) > 64 or len(self.invite_secret) > 64:
            raise MalformedMessage("an invite's id and secret have at most 64 characters")

    @property
    def signer(self) -> PublicKey:
        return PublicKey(self.node_key)

    @property
    def node_id(self) -> NodeId:
        return node_id_of(self.signer)

    @property
    def peer_id(self) -> PeerId:
        return PeerId(f"{self.node_id}.{self.suffix}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """Coordinator -> node: "you are in; come to these ports with the key you certified"."""

    kind: ClassVar[str] = "welcome"
    peer_id: PeerId
    role: Role
    grants: tuple[Grant, ...]
    swarm_name: str
    coordinator: CurveCertificate  # signed by the swarm's key
    ports: dict[str, int]  # of its ROUTER sockets: control, work, bulk
    lease_s: float
    seen_address: str  # where the coordinator saw this node come from

    def __post_init__(self) -> None:
        checked_display(self.swarm_name)
        checked_display(self.seen_address)
        if len(self.peer_id) > 64 or len(self.grants) > 8 or not 0 < self.lease_s <= 3600:
            raise MalformedMessage(f"impossible welcome: peer id {self.peer_id[:80]!r}, lease {self.lease_s} s")
        if len(self.ports) > 8 or any(len(n) > 16 or not 0 < p < 65536 for n, p in self.ports.items()):
            raise MalformedMessage(f"impossible ports {list(self.ports.items())[:8]}")


RefusalCode = Literal[
    "version",  # protocols differ
    "malformed",  # not a Hello, or not signed by who it claims
    "busy",  # try again
    "internal",  # the coordinator failed; its log says why
    "awaiting_approval",  # try again later
    "invite_required",
    "invite_invalid",  # unknown, forged, expired, used up or revoked
    "revoked",  # this node is banned
    "role",  # this node may not be what it wants to be
    "address",  # admission is by local network, and this address isn't on it
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """Coordinator -> node: "no, because". `code` is for programs (unknown ones count as final), `reason` for people."""

    kind: ClassVar[str] = "refused"
    code: RefusalCode | str
    reason: str

    def __post_init__(self) -> None:
        if len(self.code) > 32 or len(self.reason) > 1024:
            raise MalformedMessage("an overlong refusal")

    def error(self) -> AdmissionRefused | VersionMismatch:
        """This refusal as what the node raises."""
        text = "".join(c if c.isprintable() else "?" for c in self.reason)
        if self.code == "version":
            return VersionMismatch(text)
        return AwaitingApproval(text) if self.code == "awaiting_approval" else AdmissionRefused(text)


AdmissionMessage = Challenge | Hello | Welcome | Refused

_Text = Annotated[str, msgspec.Meta(max_length=32)]


class _Wire(msgspec.Struct, array_like=True, frozen=True):  # more elements than these are ignored
    magic: _Text
    protocol: int
    package: _Text
    kind: _Text
    body: bytes
    signature: bytes


_encoder = msgspec.msgpack.Encoder()
_wire_decoder = msgspec.msgpack.Decoder(_Wire)
_body_decoders: Final = {kind.kind: msgspec.msgpack.Decoder(kind) for kind in (Challenge, Hello, Welcome, Refused)}


@dataclass(frozen=True, slots=True)
class Envelope:
    """A message of admission as it crossed the wire, its body unread."""

    protocol: int
    package: str
    kind: str
    body: bytes
    signature: bytes

    def open(self, expected: type[T]) -> T:
        """The message inside. Raises VersionMismatch, UnknownKind or MalformedMessage."""
        wanted: str = expected.kind  # type: ignore[attr-defined]
        if self.protocol != PROTOCOL_VERSION and self.kind != Refused.kind:
            raise VersionMismatch(version_advice(self.protocol, self.package))
        if self.kind != wanted:
            raise UnknownKind(f"admission: expected a {wanted}, got {self.kind!r}")
        try:
            message = _body_decoders[wanted].decode(self.body)
        except (msgspec.MsgspecError, ValueError, ProtocolError, RecursionError) as exc:
            raise MalformedMessage(f"{wanted}: {exc}") from exc
        assert isinstance(message, expected)
        return message


def version_advice(protocol: int, package: str) -> str:
    """Which side to upgrade when a peer speaks `protocol`, as told to this side's user."""
    return _advice("the peer", (protocol, package), "this side", (PROTOCOL_VERSION, PACKAGE_VERSION))


def version_advice_for_peer(protocol: int, package: str) -> str:
    """The same, as told to the peer's user."""
    return _advice("the coordinator", (PROTOCOL_VERSION, PACKAGE_VERSION), "this side", (protocol, package))


def _advice(there: str, theirs: tuple[int, str], here: str, ours: tuple[int, str]) -> str:
    package = "".join(c if c.isprintable() else "?" for c in theirs[1])
    older = there if theirs[0] < ours[0] else here
    return (
        f"{there} speaks protocol {theirs[0]} (SkyNet {package}), {here} speaks protocol {ours[0]} (SkyNet {ours[1]}); "
        f"upgrade {older}"
    )


def encode(message: AdmissionMessage) -> bytes:
    """A message without signature, as bytes. Raises MalformedMessage if it is too long."""
    return _seal(message.kind, _encoder.encode(message), b"")


def _seal(kind: str, body: bytes, signature: bytes) -> bytes:
    data = _encoder.encode(_Wire(MAGIC, PROTOCOL_VERSION, PACKAGE_VERSION, kind, body, signature))
    if len(data) > MAX_MESSAGE_BYTES:
        raise MalformedMessage(f"{kind} of {len(data)} bytes, at most {MAX_MESSAGE_BYTES} are allowed")
    return data


def decode(data: bytes) -> Envelope:
    """Bytes to an envelope. Raises MalformedMessage."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise MalformedMessage(f"admission: {len(data)} bytes, at most {MAX_MESSAGE_BYTES} are allowed")
    try:
        wire = _wire_decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
        raise MalformedMessage(f"admission: {exc}") from exc
    if wire.magic != MAGIC:
        raise MalformedMessage(f"admission: begins with {wire.magic!r}, expected {MAGIC!r}")
    return Envelope(wire.protocol, wire.package, wire.kind, wire.body, wire.signature)


def open_hello(
    envelope: Envelope, challenge: Challenge, secret: ProofSecret, swarm_key: PublicKey, now: float
) -> Hello:
    """The Hello inside, proven to come from its node for this swarm and this challenge, and from a process that holds
    the key it certifies. Raises a ProtocolError.
    """
    hello = envelope.open(Hello)
    signed = Signed(hello.not_after, envelope.signature)
    signed.verify(Hello.kind, hello.signer, swarm_key, challenge.nonce + envelope.body, now, HELLO_LIFETIME_S)
    curve_key = hello.certificate.verify(hello.signer, swarm_key, now)
    secret.check(
        hello.possession, curve_key, _possession(challenge, hello.signer, curve_key, swarm_key, hello.not_after)
    )
    return hello


def _possession(
    challenge: Challenge, node_key: PublicKey, curve_key: CurveKey, swarm_key: PublicKey, not_after: int
) -> bytes:
    """What a proof of possession covers: it is void for another node, key, swarm or challenge."""
    return statement("possession", swarm_key, not_after, challenge.nonce + node_key + curve_key)


HelloFactory = Callable[[Challenge, PublicKey], bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Applicant:
    """A process that wants in: makes its Hello for whichever swarm and challenge it meets."""

    node_key: NodeKey
    process_key: ProcessKey
    role: Role
    suffix: str
    display_name: str = ""
    invite_id: str = ""
    invite_secret: bytes = b""
    clock: Callable[[], float] = time.time

    def __post_init__(self) -> None:
        try:
            checked_suffix(self.suffix)
            checked_display(self.display_name)
        except MalformedMessage as exc:
            raise ConfigError(str(exc)) from exc

    def hello(self, challenge: Challenge, swarm_key: PublicKey) -> bytes:
        """The signed Hello, encoded."""
        now = self.clock()
        not_after = int(now) + HELLO_LIFETIME_S
        said = _possession(challenge, self.node_key.public_key, self.process_key.public, swarm_key, not_after)
        hello = Hello(
            node_key=self.node_key.public_key,
            certificate=self.process_key.certify(self.node_key, swarm_key, now),
            possession=prove(self.process_key, challenge.proof_key, said),
            role=self.role,
            suffix=self.suffix,
            display_name=self.display_name,
            invite_id=self.invite_id,
            invite_secret=self.invite_secret,
            not_after=not_after,
        )
        body = _encoder.encode(hello)
        signed = self.node_key.sign(Hello.kind, swarm_key, hello.not_after, challenge.nonce + body)
        return _seal(Hello.kind, body, signed.signature)
