"""Messages to frames and back.

Frame 0 is a msgpack array [version, kind, fields, tensors]; each tensor follows as one raw frame that `tensors`
describes by dtype and shape, so that bf16 survives and large payloads leave without a copy. `fields` is a map of the
message's dataclass fields. Decoding bounds every size and checks every field's type; whatever is wrong becomes one
ProtocolError.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

import msgspec

from skynet.errors import MalformedMessage, UnknownKind, VersionMismatch

PROTOCOL_VERSION: Final = 1
MAX_HEADER_BYTES: Final = 1 << 20
MAX_TENSORS: Final = 64
MAX_TENSOR_BYTES: Final = 1 << 30
MAX_DIMENSIONS: Final = 8
DTYPE_SIZES: Final[Mapping[str, int]] = {
    "bool": 1, "uint8": 1, "int8": 1, "int16": 2, "int32": 4, "int64": 8,
    "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8,
}  # fmt: skip

Buffer = bytes | bytearray | memoryview
M = TypeVar("M")
_encoder = msgspec.msgpack.Encoder()


@dataclass(frozen=True, slots=True)
class WireTensor:
    """A tensor on its way: C-contiguous bytes with dtype and shape. Torch stays out of this package."""

    dtype: str
    shape: tuple[int, ...]
    data: Buffer

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_SIZES:
            raise MalformedMessage(f"tensor of unknown dtype {self.dtype!r}")
        if len(self.shape) > MAX_DIMENSIONS or any(n < 0 for n in self.shape):
            raise MalformedMessage(f"tensor of impossible shape {self.shape}")
        expected = math.prod(self.shape) * DTYPE_SIZES[self.dtype]
        if expected > MAX_TENSOR_BYTES or expected != memoryview(self.data).nbytes:
            raise MalformedMessage(
                f"tensor {self.dtype}{list(self.shape)} needs {expected} bytes, "
                f"its frame has {memoryview(self.data).nbytes}"
            )


_header_decoder = msgspec.msgpack.Decoder(tuple[int, str, msgspec.Raw, tuple[tuple[str, tuple[int, ...]], ...]])


def encode(message: Any, tensors: Sequence[WireTensor] = ()) -> list[Buffer]:
    """A message (a dataclass with a `kind`) and its tensors as frames."""
    described = [(t.dtype, t.shape) for t in tensors]
    header = _encoder.encode((PROTOCOL_VERSION, message.kind, message, described))
    return [header, *(t.data for t in tensors)]


class Decoder(Generic[M]):
    """Decodes the messages of one table and no others; a listener has one, made of what its peers may send."""

    def __init__(self, *kinds: type[M]) -> None:
        self._decoders = {kind.kind: msgspec.msgpack.Decoder(kind) for kind in kinds}  # type: ignore[attr-defined]

    def decode(self, frames: Sequence[Buffer]) -> tuple[M, tuple[WireTensor, ...]]:
        """Frames to a message and its tensors (views of the frames, not copies). Raises a ProtocolError."""
        if not frames or len(frames) > MAX_TENSORS + 1:
            raise MalformedMessage(f"a message has 1 to {MAX_TENSORS + 1} frames, this one has {len(frames)}")
        if memoryview(frames[0]).nbytes > MAX_HEADER_BYTES:
            raise MalformedMessage(
                f"header of {memoryview(frames[0]).nbytes} bytes, at most {MAX_HEADER_BYTES} are allowed"
            )
        try:
            version, kind, fields, described = _header_decoder.decode(frames[0])
        except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
            raise MalformedMessage(f"unreadable header: {exc}") from exc
        if version != PROTOCOL_VERSION:
            older = "the peer" if version < PROTOCOL_VERSION else "this side"
            raise VersionMismatch(f"peer speaks protocol {version}, this side {PROTOCOL_VERSION}; upgrade {older}")
        decoder = self._decoders.get(kind)
        if decoder is None:
            raise UnknownKind(
                f"message kind {kind[:64]!r} isn't expected here; known: {', '.join(sorted(self._decoders))}"
            )
        if len(described) != len(frames) - 1:
            raise MalformedMessage(f"{kind}: describes {len(described)} tensors but carries {len(frames) - 1}")
        try:
            message = decoder.decode(fields)
        except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
            raise MalformedMessage(f"{kind}: {exc}") from exc
        tensors = tuple(
            WireTensor(dtype, shape, frame) for (dtype, shape), frame in zip(described, frames[1:], strict=True)
        )
        return message, tensors
