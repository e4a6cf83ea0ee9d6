"""Whatever arrives on a control or work link ends in a message or in one ProtocolError, quickly and within memory."""

from __future__ import annotations

import contextlib
import resource

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from skynet.errors import MalformedMessage, ProtocolError, UnknownKind, VersionMismatch
from skynet.protocol.codec import MAX_HEADER_BYTES, PROTOCOL_VERSION, Decoder, WireTensor, encode
from skynet.protocol.messages import TO_CLIENT, TO_COORDINATOR, TO_WORKER, WORK_TO_WORKER, Cancel, Ping, Submit
from skynet.protocol.steps import RunStep, SamplingParams

DECODERS = [Decoder(*kinds) for kinds in (TO_COORDINATOR, TO_WORKER, TO_CLIENT, WORK_TO_WORKER)]
KINDS = sorted({kind.kind for kinds in (TO_COORDINATOR, TO_WORKER, TO_CLIENT, WORK_TO_WORKER) for kind in kinds})
json_like = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


def decode_with_all(frames: list[bytes]) -> None:
    for decoder in DECODERS:
        with contextlib.suppress(ProtocolError):
            decoder.decode(frames)


@settings(max_examples=300, deadline=None)
@given(frames=st.lists(st.binary(max_size=300), max_size=5))
@example(frames=[])
@example(frames=[b"\xdd\xff\xff\xff\xff"])  # an array that claims four thousand million elements
@example(frames=[b"\x91" * 5000])  # nested five thousand deep
def test_random_bytes_are_refused(frames: list[bytes]) -> None:
    decode_with_all(frames)


@settings(max_examples=400, deadline=None)
@given(kind=st.sampled_from(KINDS), fields=json_like, tensors=json_like)
def test_known_kinds_with_wrong_fields_are_refused(kind: str, fields: object, tensors: object) -> None:
    decode_with_all([msgspec.msgpack.encode([PROTOCOL_VERSION, kind, fields, tensors])])


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_truncated_or_altered_message_never_crashes(data: st.DataObject) -> None:
    message = Submit(request_id="r", prompt="hello", sampling=SamplingParams(), stop=("x",))  # type: ignore[arg-type]
    frame = bytearray(encode(message)[0])
    for _ in range(data.draw(st.integers(0, 3))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    decode_with_all([bytes(frame[: data.draw(st.integers(0, len(frame)))])])


def test_a_huge_header_is_refused_unread() -> None:
    with pytest.raises(MalformedMessage, match="at most"):
        DECODERS[0].decode([b"\x00" * (MAX_HEADER_BYTES + 1)])


def test_a_peer_of_another_version_is_told_which_side_to_upgrade() -> None:
    header = msgspec.msgpack.encode([PROTOCOL_VERSION + 1, "ping", {"nonce": 1}, []])
    with pytest.raises(VersionMismatch, match="upgrade this side"):
        DECODERS[0].decode([header])


def test_a_kind_of_the_other_direction_is_unknown() -> None:
    with pytest.raises(UnknownKind, match="isn't expected here"):
        Decoder(RunStep).decode(encode(Cancel(request_id="r")))  # type: ignore[arg-type]


def test_a_tensor_of_another_size_than_described_is_refused() -> None:
    frames = encode(Ping(nonce=1), [WireTensor("float32", (2, 2), bytes(16))])
    frames[1] = bytes(15)
    with pytest.raises(MalformedMessage, match="needs 16 bytes"):
        Decoder(Ping).decode(frames)


def test_hostile_lengths_take_no_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for claim in (b"\xdd\x7f\xff\xff\xff", b"\xdf\x7f\xff\xff\xff", b"\xc6\x7f\xff\xff\xff", b"\xdb\x7f\xff\xff\xff"):
        for kind in KINDS:
            name = msgspec.msgpack.encode(kind)
            decode_with_all([b"\x94\x01" + name + claim, claim, b"\x94\x01" + name + b"\x81" + claim])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024  # KiB
