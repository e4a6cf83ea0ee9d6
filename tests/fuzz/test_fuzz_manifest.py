"""Hostile safetensors headers, indexes, manifests and bulk messages: one clear error each, and nothing else happens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import zmq
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from skynet.errors import MalformedMessage, ProtocolError, WeightError
from skynet.models.checkpoint import parse_index
from skynet.models.manifest import FileEntry, Manifest, TensorEntry, decode_manifest, encode_manifest
from skynet.models.safetensors_header import DTYPES, MAX_HEADER_BYTES, header_length, parse_header, read_header
from skynet.protocol.bulk import BulkConfig, BulkServer, BulkSource, BytesSource
from skynet.protocol.bulk.flow import frames_of
from skynet.protocol.bulk.messages import (
    BulkCredit,
    BulkData,
    BulkEnd,
    BulkError,
    BulkGet,
    BulkPut,
    client_decoder,
    server_decoder,
)
from skynet.protocol.ids import PeerId
from skynet.protocol.sockets import Received

QUICK = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
FEWER = settings(QUICK, max_examples=80)
NUMBERS = st.integers(-(2**70), 2**70) | st.integers(-2, 40)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=8) | st.sampled_from([*DTYPES, "F8_E4M3"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
TENSOR = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F8_E4M3", ""]) | JSON,
        "shape": st.lists(NUMBERS, max_size=10) | JSON,
        "data_offsets": st.tuples(NUMBERS, NUMBERS) | JSON,
    }
)
HEADERS = st.dictionaries(st.text(max_size=12) | st.just("__metadata__"), TENSOR | JSON, max_size=4)


def check_header(header: bytes, file_bytes: int) -> None:
    """Either one WeightError that names the file, or tensors that fill the file without overlap."""
    try:
        tensors = parse_header(header, file_bytes, "model.safetensors")
    except WeightError as exc:
        said = str(exc)
    else:
        said = ""
    if said:
        assert said.startswith("model.safetensors: ")
        assert len(said) < 2000
        return
    at = 8 + len(header)
    for tensor in tensors:
        assert tensor.offset == at
        at += tensor.num_bytes
    assert at == file_bytes


@QUICK
@given(header=st.binary(max_size=200), file_bytes=st.integers(0, 300))
def test_random_bytes_for_a_header_give_one_clear_error(header: bytes, file_bytes: int) -> None:
    check_header(header, file_bytes)


@FEWER
@given(header=HEADERS, rest=st.integers(0, 64))
@example(header={"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, rest=4)
@example(header={"a": {"dtype": "F32", "shape": [2**63, 2], "data_offsets": [0, 4]}}, rest=4)
@example(header={"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}, rest=4)
@example(
    header={
        "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
        "b": {"dtype": "U8", "shape": [4], "data_offsets": [2, 6]},
    },
    rest=6,
)
@example(header={"a": {"dtype": "U8", "shape": [4], "data_offsets": [1, 5]}}, rest=5)
def test_hostile_headers_give_one_clear_error(header: Any, rest: int) -> None:
    data = json.dumps(header).encode()
    check_header(data, 8 + len(data) + rest)


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, MAX_HEADER_BYTES + 1, 100])
def test_a_huge_or_overlong_header_is_refused_before_it_is_read(tmp_path: Path, length: int) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(WeightError, match=r"model\.safetensors: header of \d+ bytes"):
        read_header(path)
    with pytest.raises(WeightError):
        header_length(length.to_bytes(8, "little"), 2**40 if length > MAX_HEADER_BYTES else 50, "x")


def test_a_deeply_nested_header_or_index_is_refused() -> None:
    for bomb in (b"[" * 1_000_000, b'{"a":' * 200_000):
        with pytest.raises(WeightError):
            parse_header(bomb, 8 + len(bomb), "model.safetensors")
        with pytest.raises(WeightError):
            parse_index(bomb, "model.safetensors.index.json")


@FEWER
@given(
    index=st.fixed_dictionaries({"weight_map": st.dictionaries(st.text(max_size=6), st.text(max_size=12)) | JSON})
    | JSON
)
def test_hostile_indexes_name_no_file_outside_of_the_directory(index: Any) -> None:
    try:
        files = parse_index(json.dumps(index).encode(), "index")
    except WeightError:
        return
    assert all("/" not in name and not name.startswith(".") for name in files)


GOOD = encode_manifest(
    Manifest(
        (FileEntry("config.json", 2, bytes(32)), FileEntry("model.safetensors", 5 << 20, bytes(range(64)))),
        (
            TensorEntry("a", "model.safetensors", 100, (3, 4), "float32"),
            TensorEntry("b", "model.safetensors", 148, (), "bool"),
        ),
    )
)


@QUICK
@given(data=st.binary(max_size=300))
def test_random_bytes_are_no_manifest(data: bytes) -> None:
    with pytest.raises(MalformedMessage):
        decode_manifest(data)


@QUICK
@given(at=st.integers(0, len(GOOD) - 1), value=st.integers(0, 255), cut=st.integers(0, len(GOOD)))
def test_a_mutated_manifest_is_refused_or_means_exactly_its_bytes(at: int, value: int, cut: int) -> None:
    for data in (GOOD[:at] + bytes([value]) + GOOD[at + 1 :], GOOD[:cut], GOOD + GOOD[:cut]):
        try:
            manifest = decode_manifest(data)
        except MalformedMessage:
            continue
        assert encode_manifest(manifest) == data


MESSAGES = [
    BulkGet(transfer=1, name="chunk/aa", offset=3, size=7, credit=1 << 20),
    BulkPut(transfer=2, name="upload", size=None),
    BulkData(transfer=2, offset=0),
    BulkCredit(transfer=1, credit=5),
    BulkEnd(transfer=2, offset=9),
    BulkError(transfer=1, code="cancelled", reason="why not"),
]


@QUICK
@given(message=st.sampled_from(MESSAGES), data=st.data())
def test_mutated_bulk_messages_raise_only_protocol_errors(message: Any, data: st.DataObject) -> None:
    frame = bytearray(frames_of(message)[0])
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    frames = [
        bytes(frame[: data.draw(st.integers(0, len(frame)))]),
        *data.draw(st.lists(st.binary(max_size=20), max_size=3)),
    ]
    for decoder in (server_decoder(), client_decoder()):
        for candidate in (frames, [bytes(frame)], frames[:1]):
            try:
                decoder.decode(candidate)
            except ProtocolError:
                continue


class Feed:
    """A port that hands over prepared messages of one peer, then says that they are gone."""

    def __init__(self, messages: Sequence[list[bytes]]) -> None:
        self._messages = list(messages)
        self.drained = asyncio.Event()
        self.sent: list[list[bytes]] = []

    async def receive(self) -> Received:
        if self._messages:
            await asyncio.sleep(0)
            return Received(PeerId("evil.0"), b"r", [zmq.Frame(f) for f in self._messages.pop(0)], 7)
        self.drained.set()
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    def send(self, frames: Sequence[Any], routing_id: bytes = b"") -> bool:
        self.sent.append([bytes(f) for f in frames])
        return True


SMALL = st.integers(-1, 5) | st.sampled_from([1 << 20, 1 << 47, 1 << 62])
FIELDS: dict[type[Any], dict[str, st.SearchStrategy[Any]]] = {
    BulkGet: {
        "name": st.sampled_from(["chunk", "absent"]),
        "offset": SMALL,
        "size": SMALL | st.none(),
        "credit": SMALL,
    },
    BulkPut: {"name": st.just("sink"), "size": SMALL | st.none()},
    BulkData: {"offset": SMALL},
    BulkCredit: {"credit": SMALL},
    BulkEnd: {"offset": SMALL},
    BulkError: {"code": st.sampled_from(["cancelled", "broken"]), "reason": st.text(max_size=5)},
}


@st.composite
def hostile_messages(draw: st.DrawFn) -> list[bytes]:
    """A well-formed message out of turn, with odd numbers, or one that is no message at all."""
    kind = draw(st.sampled_from(list(FIELDS)))
    fields = {name: draw(values) for name, values in FIELDS[kind].items()}
    try:
        message = kind(transfer=draw(st.integers(0, 3)), **fields)
    except ValueError:
        return draw(st.lists(st.binary(max_size=40), min_size=1, max_size=3))
    data = draw(st.binary(max_size=40)) if kind is BulkData else b""
    return [bytes(f) for f in frames_of(message, data)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(messages=st.lists(hostile_messages(), max_size=25))
def test_no_sequence_of_bulk_messages_stops_the_server_or_grows_it(messages: list[list[bytes]]) -> None:
    config = BulkConfig(max_transfers_per_peer=2, keepalive_s=0.01, idle_timeout_s=0.05, stall_timeout_s=0.1)
    last = frames_of(BulkGet(transfer=99, name="chunk", offset=0, size=None, credit=1 << 20))

    async def open_source(peer_id: PeerId, name: str) -> BulkSource | None:
        return BytesSource(b"x" * 1000) if name == "chunk" else None

    async def test() -> None:
        feed = Feed([*messages, [bytes(f) for f in last]])
        server = BulkServer(feed, open_source, config=config)
        task = asyncio.create_task(server.run())
        async with asyncio.timeout(5):
            await feed.drained.wait()
            assert server.num_transfers <= config.max_transfers_per_peer
            while server.num_transfers:  # noqa: ASYNC110 - deadlines free all of them, on their own time
                await asyncio.sleep(0.005)
        assert not task.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(test())
