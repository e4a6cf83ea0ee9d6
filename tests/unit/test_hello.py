"""The messages of admission: frozen bytes, versions, and signatures."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

import skynet
from skynet.errors import (
    AdmissionRefused,
    AwaitingApproval,
    MalformedMessage,
    ProtocolError,
    UnknownKind,
    VersionMismatch,
)
from skynet.protocol import hello as wire
from skynet.protocol.codec import PROTOCOL_VERSION
from skynet.protocol.hello import Applicant, Challenge, Hello, Refused, Welcome
from skynet.protocol.identity import CurveCertificate, CurveKey, NodeKey, ProcessKey, SwarmKey
from skynet.protocol.ids import PeerId
from skynet.protocol.possession import ProofSecret
from skynet.protocol.roles import Grant, Role

NOW = 1_800_000_000.0
SECRET = ProofSecret(X25519PrivateKey.from_private_bytes(bytes(range(32))))
CHALLENGE = Challenge(nonce=bytes(range(32)), proof_key=SECRET.public)
CERTIFICATE = CurveCertificate(CurveKey(b"rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"), 1, bytes(64))


def applicant(node: NodeKey | None = None, **changes: object) -> Applicant:
    facts = {"role": Role.WORKER, "suffix": "cuda:0", "clock": lambda: NOW, "process_key": ProcessKey.generate()}
    return Applicant(node_key=node or NodeKey.generate(), **(facts | changes))  # type: ignore[arg-type]


def test_package_version_is_the_package_s() -> None:
    assert skynet.__version__ == wire.PACKAGE_VERSION


def test_hello_of_version_one_has_these_bytes_for_ever() -> None:
    body = msgspec.msgpack.encode(
        Hello(
            node_key=bytes(32),
            certificate=CERTIFICATE,
            possession=bytes(range(32)),
            role=Role.WORKER,
            suffix="cpu",
            display_name="ada",
            invite_id="k3",
            invite_secret=b"s",
            not_after=2,
        )
    )
    assert body.hex() == (
        "89a86e6f64655f6b6579c4200000000000000000000000000000000000000000000000000000000000000000ab6365727469"
        "66696361746583a963757276655f6b6579c42872713a724d3e7d553f404c6e7334374531256b522e6f406e2546636d6d734c"
        "2f407b48385d796637a96e6f745f616674657201a97369676e6174757265c440000000000000000000000000000000000000"
        "00000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000aa706f73"
        "73657373696f6ec420000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1fa4726f6c65a6776f72"
        "6b6572a6737566666978a3637075ac646973706c61795f6e616d65a3616461a9696e766974655f6964a26b33ad696e766974"
        "655f736563726574c40173a96e6f745f616674657202"
    )
    data = msgspec.msgpack.encode(("skynet", 1, "0.1.0", "hello", body, bytes(64)))
    assert data[:21].hex() == "96a6736b796e657401a5302e312e30a568656c6c6f"
    envelope = wire.decode(data)
    assert (envelope.protocol, envelope.package, envelope.kind) == (1, "0.1.0", "hello")
    assert envelope.open(Hello).peer_id == "mzuhvlpymk6xo3epygfy5h4oea.cpu"


def test_challenge_and_refusal_of_version_one_have_these_bytes_for_ever() -> None:
    assert wire.encode(CHALLENGE).hex() == (
        "96a6736b796e657401a5302e312e30a96368616c6c656e6765c45582a56e6f6e6365c420000102030405060708090a0b0c0d"
        "0e0f101112131415161718191a1b1c1d1e1fa970726f6f665f6b6579c4208f40c5adb68f25624ae5b214ea767a6ec94d829d"
        "3d7b5e1ad1ba6f3e2138285fc400"
    )
    assert wire.encode(Refused(code="busy", reason="later")).hex() == (
        "96a6736b796e657401a5302e312e30a772656675736564c41882a4636f6465a462757379a6726561736f6ea56c61746572c400"
    )


def test_hello_proves_its_node() -> None:
    node, swarm = NodeKey.generate(), SwarmKey.generate()
    hello = wire.open_hello(
        wire.decode(applicant(node).hello(CHALLENGE, swarm.public_key)), CHALLENGE, SECRET, swarm.public_key, NOW
    )
    assert hello.peer_id == f"{node.node_id}.cuda:0"


def test_hello_is_void_for_another_challenge_or_swarm_or_body() -> None:
    swarm = SwarmKey.generate()
    envelope = wire.decode(applicant().hello(CHALLENGE, swarm.public_key))
    with pytest.raises(ProtocolError, match="isn't by"):
        wire.open_hello(envelope, Challenge(nonce=bytes(32), proof_key=SECRET.public), SECRET, swarm.public_key, NOW)
    with pytest.raises(ProtocolError, match="isn't by"):
        wire.open_hello(envelope, CHALLENGE, SECRET, SwarmKey.generate().public_key, NOW)
    other = wire.decode(applicant().hello(CHALLENGE, swarm.public_key))
    mixed = wire.Envelope(envelope.protocol, envelope.package, envelope.kind, other.body, envelope.signature)
    with pytest.raises(ProtocolError, match="isn't by"):
        wire.open_hello(mixed, CHALLENGE, SECRET, swarm.public_key, NOW)


def test_hello_with_a_certificate_by_another_node_is_refused() -> None:
    node, swarm = NodeKey.generate(), SwarmKey.generate()
    stolen = ProcessKey.generate().certify(NodeKey.generate(), swarm.public_key, NOW)
    hello = Hello(
        node_key=node.public_key,
        certificate=stolen,
        possession=bytes(32),
        role=Role.WORKER,
        suffix="cpu",
        not_after=int(NOW) + 60,
    )
    body = msgspec.msgpack.encode(hello)
    signed = node.sign("hello", swarm.public_key, hello.not_after, CHALLENGE.nonce + body)
    envelope = wire.Envelope(PROTOCOL_VERSION, "0.1.0", "hello", body, signed.signature)
    with pytest.raises(ProtocolError, match="curve: the signature isn't by"):
        wire.open_hello(envelope, CHALLENGE, SECRET, swarm.public_key, NOW)


def test_hello_with_a_key_that_its_process_does_not_hold_is_refused() -> None:
    """Everybody in a swarm knows its peers' CURVE keys: knowing one isn't having it."""
    swarm, victim = SwarmKey.generate(), ProcessKey.generate()
    taken = ProcessKey(victim.public, ProcessKey.generate().secret)
    envelope = wire.decode(applicant(process_key=taken).hello(CHALLENGE, swarm.public_key))
    with pytest.raises(ProtocolError, match="doesn't hold the secret"):
        wire.open_hello(envelope, CHALLENGE, SECRET, swarm.public_key, NOW)


def test_proof_of_possession_is_void_elsewhere() -> None:
    """For another challenge's key, and where another node puts it into a Hello of its own."""
    swarm, victim, thief = SwarmKey.generate(), NodeKey.generate(), NodeKey.generate()
    process_key = ProcessKey.generate()
    envelope = wire.decode(applicant(victim, process_key=process_key).hello(CHALLENGE, swarm.public_key))
    with pytest.raises(ProtocolError, match="doesn't hold the secret"):
        wire.open_hello(envelope, CHALLENGE, ProofSecret(), swarm.public_key, NOW)
    stolen = replace(
        envelope.open(Hello),
        node_key=thief.public_key,
        certificate=process_key.certify(thief, swarm.public_key, NOW),
    )
    body = msgspec.msgpack.encode(stolen)
    signed = thief.sign("hello", swarm.public_key, stolen.not_after, CHALLENGE.nonce + body)
    envelope = wire.Envelope(PROTOCOL_VERSION, "0.1.0", "hello", body, signed.signature)
    with pytest.raises(ProtocolError, match="doesn't hold the secret"):
        wire.open_hello(envelope, CHALLENGE, SECRET, swarm.public_key, NOW)


def test_challenge_with_a_key_whose_multiples_everybody_knows_is_not_answered() -> None:
    with pytest.raises(MalformedMessage, match="not an X25519 key"):
        applicant().hello(Challenge(nonce=bytes(32), proof_key=bytes(32)), SwarmKey.generate().public_key)


@pytest.mark.parametrize(
    ("protocol", "side"), [(PROTOCOL_VERSION - 1, "the peer"), (PROTOCOL_VERSION + 1, "this side")]
)
def test_version_mismatch_says_which_side_to_upgrade(protocol: int, side: str) -> None:
    envelope = wire.decode(msgspec.msgpack.encode(("skynet", protocol, "9.9", "challenge", b"whatever", b"")))
    with pytest.raises(VersionMismatch, match=f"upgrade {side}$"):
        envelope.open(Challenge)


def test_peer_is_told_from_its_own_side() -> None:
    assert wire.version_advice_for_peer(PROTOCOL_VERSION + 1, "9").endswith("upgrade the coordinator")
    assert wire.version_advice_for_peer(PROTOCOL_VERSION - 1, "0").endswith("upgrade this side")


def test_refusal_of_another_version_is_still_read() -> None:
    body = msgspec.msgpack.encode({"code": "version", "reason": "too old", "later": 1})
    refused = wire.decode(msgspec.msgpack.encode(("skynet", 77, "9.9", "refused", body, b"", "later"))).open(Refused)
    assert isinstance(refused.error(), VersionMismatch)


def test_refusals_become_errors_one_can_act_on() -> None:
    assert isinstance(Refused(code="awaiting_approval", reason="x").error(), AwaitingApproval)
    assert type(Refused(code="a code of the future", reason="x").error()) is AdmissionRefused
    assert "\x1b" not in str(Refused(code="revoked", reason="\x1b[2Jno").error())


@pytest.mark.parametrize(
    "change",
    [
        {"suffix": ""},
        {"suffix": "a b"},
        {"suffix": "-x"},
        {"suffix": "x" * 33},
        {"display_name": "\x1b[31m"},
        {"display_name": "x" * 65},
    ],
)
def test_names_that_could_mislead_are_malformed(change: dict[str, str]) -> None:
    facts = {
        "node_key": bytes(32),
        "certificate": CERTIFICATE,
        "possession": bytes(32),
        "role": Role.WORKER,
        "suffix": "cpu",
        "not_after": 1,
    }
    with pytest.raises(MalformedMessage):
        Hello(**(facts | change))  # type: ignore[arg-type]


def test_wrong_kind_is_refused() -> None:
    with pytest.raises(UnknownKind):
        wire.decode(wire.encode(CHALLENGE)).open(Welcome)


def test_welcome_survives_the_wire() -> None:
    welcome = Welcome(
        peer_id=PeerId("n.cpu"),
        role=Role.WORKER,
        grants=(Grant.RUN_CODE,),
        swarm_name="home",
        coordinator=CERTIFICATE,
        ports={"control": 1, "work": 2},
        lease_s=4.0,
        seen_address="127.0.0.1",
    )
    assert wire.decode(wire.encode(welcome)).open(Welcome) == welcome


@pytest.mark.parametrize("ports", [{"x": 0}, {"x": 65536}, {"x" * 17: 1}, {str(i): 1 for i in range(9)}])
def test_impossible_ports_are_malformed(ports: dict[str, int]) -> None:
    with pytest.raises(MalformedMessage):
        Welcome(
            peer_id=PeerId("n.cpu"),
            role=Role.WORKER,
            grants=(),
            swarm_name="home",
            coordinator=CERTIFICATE,
            ports=ports,
            lease_s=4.0,
            seen_address="127.0.0.1",
        )
