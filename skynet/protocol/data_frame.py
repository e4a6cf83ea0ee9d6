"""The bytes of the data channel: a fixed header of 24 bytes, then the payload, raw.

    offset  size  field
    0       1     version (1)
    1       1     type: see FrameType
    2       2     kind: what a DATA payload is, for its receiver to tell apart
    4       4     epoch.start
    8       4     epoch.n
    12      8     step
    20      4     exchange: which one within the step; of PING and PONG a number that pairs them

Little-endian. The header is also the key under which a frame is waited for. A payload up to 64 KiB follows in the same
ZeroMQ frame, a larger one is a second frame. Control frames (all but DATA) have epoch and step 0.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import Final, NamedTuple

import zmq

from skynet.errors import MalformedMessage, VersionMismatch
from skynet.protocol.codec import Buffer
from skynet.protocol.plan import Epoch

VERSION: Final = 1
HEADER: Final = struct.Struct("<BBHIIQI")
HEADER_BYTES: Final = HEADER.size
INLINE_BYTES: Final = 64 << 10  # payloads up to this travel in the header's frame


class FrameType(IntEnum):
    """What a frame is for."""

    HELLO = 1  # dialler -> listener: this connection works
    KEEP = 2  # chooser -> other: we use the connection that this came by
    KEPT = 3  # other -> chooser: agreed, and I am listening
    DATA = 4
    PING = 5  # answer with a PONG that echoes the payload, up to 4 KiB of it
    PONG = 6
    BYE = 7  # this link is over
    LANE = 8  # dialled side -> dialler: a fast lane for this link, see lane.py


class Tag(NamedTuple):
    """What a payload is: the same on both sides, unique within an epoch and a pair of peers."""

    kind: int  # 0 to 65535
    step: int  # within the epoch
    exchange: int = 0  # which one within the step


def data_header(epoch: Epoch, tag: Tag) -> bytes:
    """The header under which that payload travels."""
    return HEADER.pack(VERSION, FrameType.DATA, tag.kind, epoch.start, epoch.n, tag.step, tag.exchange)


def control_header(frame_type: FrameType, number: int = 0) -> bytes:
    """The header of a frame that carries no data of a step."""
    return HEADER.pack(VERSION, frame_type, 0, 0, 0, 0, number)


class DataFrame(NamedTuple):
    """One decoded frame."""

    type: int  # a FrameType
    header: bytes
    payload: memoryview


_NOBLOCK: Final = int(zmq.NOBLOCK)
_MORE: Final = int(zmq.NOBLOCK | zmq.SNDMORE)
_TYPES: Final = frozenset(int(t) for t in FrameType)


def split(first: memoryview, second: memoryview | None = None) -> DataFrame:
    """Header and payload of one or two frames' buffers, views and not copies. Raises a ProtocolError."""
    header = bytes(first[:HEADER_BYTES])
    if len(header) < HEADER_BYTES or (second is not None and first.nbytes != HEADER_BYTES):
        raise MalformedMessage(f"a data header has {HEADER_BYTES} bytes, its frame has {first.nbytes}")
    if header[0] != VERSION:
        raise VersionMismatch(f"peer speaks data protocol {header[0]}, this side {VERSION}; upgrade the older")
    if header[1] not in _TYPES:
        raise MalformedMessage(f"data frame of unknown type {header[1]}")
    return DataFrame(header[1], header, first[HEADER_BYTES:] if second is None else second)


def split_frames(frames: Sequence[zmq.Frame]) -> DataFrame:
    """The same of a message as ZeroMQ delivered it."""
    if len(frames) == 1:
        return split(frames[0].buffer)
    if len(frames) == 2:
        return split(frames[0].buffer, frames[1].buffer)
    raise MalformedMessage(f"a data message has 1 or 2 frames, this one has {len(frames)}")


def epoch_of(header: bytes) -> Epoch:
    """The epoch a DATA header names."""
    _, _, _, start, n, _, _ = HEADER.unpack(header)
    return Epoch(start, n)


def step_of(header: bytes) -> int:
    """The step a DATA header names."""
    step: int = HEADER.unpack(header)[5]
    return step


def send_on(socket: zmq.Socket[bytes], routing_id: bytes, header: bytes, payload: Buffer) -> None:
    """Queue one frame at once. Raises zmq.Again if the peer's queue is full, ZMQError (EHOSTUNREACH) if it is gone."""
    if routing_id:
        socket.send(routing_id, _MORE)
    if len(payload) <= INLINE_BYTES and memoryview(payload).nbytes <= INLINE_BYTES:
        socket.send(b"".join((header, payload)), _NOBLOCK)
    else:
        socket.send(header, _MORE)
        socket.send(payload, _NOBLOCK)
