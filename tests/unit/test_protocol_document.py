"""docs/protocol.md says what the code does: every message kind with its fields and types, sizes, and golden bytes."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from skynet.protocol import admission, hello, lane, messages, relay, sealed
from skynet.protocol.adverts import AdvertBody
from skynet.protocol.bulk import messages as bulk
from skynet.protocol.bulk.flow import BulkConfig
from skynet.protocol.codec import MAX_DIMENSIONS, MAX_HEADER_BYTES, MAX_TENSORS, Decoder, WireTensor, encode
from skynet.protocol.data_frame import HEADER_BYTES, INLINE_BYTES, FrameType, Tag, control_header, data_header
from skynet.protocol.plan import Epoch
from skynet.protocol.sockets import MAX_FRAMES, SocketConfig
from skynet.protocol.steps import StepDone
from skynet.worker.zmq_group import PayloadKind

DOCUMENT = Path(__file__).parents[2] / "docs" / "protocol.md"
TEXT = DOCUMENT.read_text(encoding="utf-8")

TABLES: dict[str, tuple[type[Any], ...]] = {
    "Control: to the coordinator": messages.TO_COORDINATOR,
    "Control: to a worker": messages.TO_WORKER,
    "Control: to a client": messages.TO_CLIENT,
    "Work: to the coordinator": messages.WORK_TO_COORDINATOR,
    "Work: to a worker": messages.WORK_TO_WORKER,
    "Bulk": typing.get_args(bulk.BulkMessage),
    "The four messages": typing.get_args(hello.AdmissionMessage),
}


def in_words(hint: Any) -> str:
    """A type as the document writes it."""
    if isinstance(hint, typing.NewType):
        return in_words(hint.__supertype__)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " or ".join(f'"{value}"' for value in arguments)
    if origin is typing.Annotated:
        return in_words(arguments[0])
    if origin in (types.UnionType, typing.Union):
        return " or ".join(dict.fromkeys(in_words(a) for a in arguments))
    if origin is tuple:
        return f"[{in_words(arguments[0])}]" if Ellipsis in arguments else f"[{', '.join(map(in_words, arguments))}]"
    if origin is dict:
        return f"{{{in_words(arguments[0])}: {in_words(arguments[1])}}}"
    plain = {str: "text", int: "integer", float: "float", bool: "bool", bytes: "bytes", type(None): "nil"}
    return plain[hint] if hint in plain else str(hint.__name__)


def fields_in_words(kind: type[Any]) -> str:
    """Every field of a message or of a type inside one, in the order of the wire; ? marks one that may be absent."""
    hints = typing.get_type_hints(kind, include_extras=True)
    cells = []
    for field in dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else msgspec.structs.fields(kind):
        is_optional = not (
            field.default in (dataclasses.MISSING, msgspec.NODEFAULT)
            and field.default_factory in (dataclasses.MISSING, msgspec.NODEFAULT)
        )
        cells.append(f"`{field.name}{'?' * is_optional}` {in_words(hints[field.name])}")
    return ", ".join(cells) or "none"


def inner_types(kind: type[Any]) -> set[type[Any]]:
    """The dataclasses that this one's fields are made of, at any depth."""
    found: set[type[Any]] = set()

    def look(hint: Any) -> None:
        for argument in typing.get_args(hint):
            look(argument)
        if dataclasses.is_dataclass(hint) and isinstance(hint, type) and hint not in found:
            found.add(hint)
            found.update(inner_types(hint))

    for hint in typing.get_type_hints(kind).values():
        look(hint)
    return found


def section(title: str) -> str:
    """The text below a heading, up to the next one."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)", TEXT, re.DOTALL | re.MULTILINE)
    assert found, f"docs/protocol.md has no section {title!r}"
    return found[1]


def rows(title: str) -> dict[str, str]:
    """A section's table: first column (without backticks) to second."""
    found = re.findall(r"^\| `([^`]+)` \| ([^|]*?) \|", section(title), re.MULTILINE)
    assert len(found) == len(dict(found)), f"a row of {title!r} is there twice"
    return dict(found)


def golden(name: str) -> bytes:
    """The hex of the code block that follows the comment with that name."""
    found = re.search(rf"<!-- {re.escape(name)} -->\n```\n(.*?)```", TEXT, re.DOTALL)
    assert found, f"docs/protocol.md has no example {name!r}"
    return bytes.fromhex(re.sub(r"\s", "", found[1]))


@pytest.mark.parametrize("title", TABLES)
def test_document_lists_every_kind_with_its_fields_and_no_other(title: str) -> None:
    assert rows(title) == {kind.kind: fields_in_words(kind) for kind in TABLES[title]}


def test_document_lists_every_type_inside_messages() -> None:
    inside = set().union(*(inner_types(kind) for kinds in TABLES.values() for kind in kinds))
    assert rows("Types inside messages") == {kind.__name__: fields_in_words(kind) for kind in inside}


def test_document_lists_what_an_advert_holds() -> None:
    assert rows("Advert") == {"body": fields_in_words(AdvertBody)}


def test_document_lists_frame_types_and_payload_kinds() -> None:
    for title, members in (("Frame types", FrameType), ("Kinds of payload", PayloadKind)):
        listed = re.findall(r"^\| (\d+) \| ([A-Z]+) \|", section(title), re.MULTILINE)
        assert {name: int(number) for number, name in listed} == {m.name: m.value for m in members}


def test_limits_are_those_of_the_code() -> None:
    sockets, flow, listener = SocketConfig(), BulkConfig(), admission.ListenerConfig()
    assert rows("Limits") == {
        "header": f"{MAX_HEADER_BYTES >> 20} MiB",
        "tensors": f"{MAX_TENSORS}",
        "dimensions": f"{MAX_DIMENSIONS}",
        "frame": f"{sockets.max_frame_bytes >> 20} MiB",
        "frames": f"{MAX_FRAMES}",
        "queue": f"{sockets.max_queued_messages} messages",
        "undelivered": f"{sockets.guard.max_undelivered_bytes >> 20} MiB",
        "unidentified": f"{sockets.guard.max_unidentified_bytes >> 20} MiB",
        "admission": f"{hello.MAX_MESSAGE_BYTES} bytes, {listener.request_timeout_s:g} s",
        "inline": f"{INLINE_BYTES >> 10} KiB",
        "lane record": f"{lane.RECORD_BYTES >> 10} KiB",
        "relay chunk": f"{relay.CHUNK_BYTES >> 10} KiB",
        "bulk block": f"{flow.block_bytes >> 10} KiB",
        "bulk window": f"{flow.window_bytes >> 20} MiB",
        "prompt": f"{messages.MAX_TEXT_CHARS} characters",
    }


def test_golden_message_is_what_the_codec_writes_and_reads() -> None:
    message = StepDone(epoch=Epoch(3, 1), step=7, token_ids=(42,))
    frames = encode(message)
    assert golden("step_done") == frames[0]
    assert Decoder(StepDone).decode([golden("step_done")])[0] == message


def test_golden_block_is_what_the_codec_writes() -> None:
    frames = encode(bulk.BulkData(transfer=1, offset=0), [WireTensor("uint8", (3,), b"abc")])
    assert [golden("bulk_data header"), golden("bulk_data bytes")] == [bytes(frame) for frame in frames]


def test_golden_admission_is_what_a_listener_writes() -> None:
    assert golden("challenge") == hello.encode(hello.Challenge(nonce=bytes(range(32)), proof_key=bytes(range(32, 64))))
    length = golden("challenge on the wire")
    assert int.from_bytes(length, "big") == len(golden("challenge"))


def test_golden_data_headers_are_what_the_channel_writes() -> None:
    assert golden("data header") == data_header(Epoch(3, 1), Tag(PayloadKind.SUM, 7, 2))
    assert golden("ping header") == control_header(FrameType.PING, 9)
    assert len(golden("data header")) == HEADER_BYTES


def test_relay_overhead_is_as_documented() -> None:
    assert f"{sealed.OVERHEAD_BYTES} bytes more than its plaintext" in section("Relay")
