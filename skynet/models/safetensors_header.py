"""The header of a safetensors file, read strictly: a hostile one can't make us allocate or believe anything wrong."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from skynet.errors import WeightError
from skynet.protocol.codec import DTYPE_SIZES, MAX_DIMENSIONS

MAX_HEADER_BYTES: Final = 32 << 20
MAX_TENSORS_PER_FILE: Final = 1 << 18
MAX_NAME_LENGTH: Final = 512
DTYPES: Final[Mapping[str, str]] = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
}  # fmt: skip
_FIX: Final = "download or save the file again"


class HeaderTensor(NamedTuple):
    """One tensor of a file: `offset` counts from the file's first byte."""

    name: str
    dtype: str  # as in DTYPE_SIZES
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class _Described(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


_outer = msgspec.json.Decoder(dict[str, msgspec.Raw])
_tensor = msgspec.json.Decoder(_Described)
_metadata = msgspec.json.Decoder(dict[str, str])


def header_length(prefix: bytes, file_bytes: int, subject: str) -> int:
    """Length of the JSON that follows the file's first 8 bytes. Raises WeightError."""
    if len(prefix) < 8 or file_bytes < 8:
        raise WeightError(f"{subject}: {file_bytes} bytes are too short for a safetensors file; {_FIX}")
    length = int.from_bytes(prefix[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise WeightError(f"{subject}: header of {length} bytes, at most {MAX_HEADER_BYTES} are allowed; {_FIX}")
    if length > file_bytes - 8:
        raise WeightError(
            f"{subject}: header of {length} bytes in a file of {file_bytes} bytes: it is cut short; {_FIX}"
        )
    return length


def parse_header(header: bytes, file_bytes: int, subject: str) -> tuple[HeaderTensor, ...]:
    """The tensors that a header's JSON describes, in order of offset; together they fill the file exactly.

    Raises WeightError for anything else: unreadable JSON, unknown dtypes, overlaps, gaps, ranges outside of the file.
    """
    try:
        raw = _outer.decode(header)
        if "__metadata__" in raw:
            _metadata.decode(raw.pop("__metadata__"))
        described = [(name, _tensor.decode(value)) for name, value in raw.items()]
    except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
        raise WeightError(f"{subject}: unreadable safetensors header: {exc}; {_FIX}") from exc
    if len(described) > MAX_TENSORS_PER_FILE:
        raise WeightError(f"{subject}: {len(described)} tensors, at most {MAX_TENSORS_PER_FILE} are allowed; {_FIX}")
    described.sort(key=lambda item: item[1].data_offsets)
    start_of_data = 8 + len(header)
    tensors, end = [], 0
    for name, entry in described:
        tensors.append(_check(name, entry, end, start_of_data, subject))
        end = entry.data_offsets[1]
    if start_of_data + end != file_bytes:
        raise WeightError(
            f"{subject}: its tensors end at byte {start_of_data + end}, the file at byte {file_bytes}: it is cut short "
            f"or has bytes to spare; {_FIX}"
        )
    return tuple(tensors)


def _check(name: str, entry: _Described, expected_start: int, start_of_data: int, subject: str) -> HeaderTensor:
    shown = name[:80]
    if not name or len(name) > MAX_NAME_LENGTH:
        raise WeightError(
            f"{subject}: a tensor's name has 1 to {MAX_NAME_LENGTH} characters, {shown!r} has {len(name)}; {_FIX}"
        )
    dtype = DTYPES.get(entry.dtype)
    if dtype is None:
        raise WeightError(
            f"{subject}: tensor {shown} has dtype {entry.dtype[:32]!r}, known are {', '.join(DTYPES)}; "
            "save the model in one of these"
        )
    start, end = entry.data_offsets
    if len(entry.shape) > MAX_DIMENSIONS or any(not 0 <= n < 1 << 48 for n in entry.shape):
        raise WeightError(f"{subject}: tensor {shown} has an impossible shape; {_FIX}")
    num_bytes = math.prod(entry.shape) * DTYPE_SIZES[dtype]
    if start != expected_start or end - start != num_bytes:
        raise WeightError(
            f"{subject}: tensor {shown} {dtype}{list(entry.shape)} should lie at [{expected_start}, "
            f"{expected_start + num_bytes}), the header says [{start}, {end}): overlap, gap or wrong length; {_FIX}"
        )
    return HeaderTensor(name, dtype, entry.shape, start_of_data + start, num_bytes)


def read_header(path: Path) -> tuple[HeaderTensor, ...]:
    """The tensors of a file on disk. Reads its header alone. Raises WeightError."""
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            length = header_length(file.read(8), file_bytes, str(path))
            return parse_header(file.read(length), file_bytes, str(path))
    except FileNotFoundError as exc:
        raise WeightError(f"{path}: no such file; {_FIX}") from exc
    except OSError as exc:
        raise WeightError(f"{path}: can't be read: {exc.strerror}; check its permissions and its disk") from exc
