"""What a checkpoint consists of, byte for byte: files, their chunks' hashes, and where each tensor lies. No torch.

A manifest says nothing about where the bytes come from: its digest names the content, so a directory, the hub and a
peer that hold the same files have the same manifest.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, NewType

import msgspec

from skynet.errors import MalformedMessage, WeightError
from skynet.models.hashes import CHUNK_BYTES, DIGEST_BYTES, MAX_FILE_BYTES, num_chunks
from skynet.models.safetensors_header import MAX_NAME_LENGTH
from skynet.protocol.codec import DTYPE_SIZES, MAX_DIMENSIONS

ManifestDigest = NewType("ManifestDigest", str)  # hex SHA-256 of the encoded manifest

MANIFEST_VERSION: Final = 1
MAX_MANIFEST_BYTES: Final = 64 << 20
MAX_FILES: Final = 4096
MAX_TENSORS: Final = 1 << 20
FILE_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}\Z")  # no path: it is used below a directory of ours


@dataclass(frozen=True, slots=True)
class ChunkRef:
    """One chunk: its hash names it anywhere, file and offset say where it lies in a copy of the checkpoint."""

    digest: bytes
    file: str
    offset: int
    num_bytes: int

    @property
    def index(self) -> int:
        return self.offset // CHUNK_BYTES


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file as a row of chunks; `digests` are their SHA-256, one after the other."""

    name: str
    num_bytes: int
    digests: bytes

    def __post_init__(self) -> None:
        if not FILE_NAME.match(self.name):
            raise ValueError(f"{self.name[:80]!r} isn't a plain file name")
        if not 0 <= self.num_bytes <= MAX_FILE_BYTES:
            raise ValueError(f"{self.name}: impossible size {self.num_bytes}")
        if len(self.digests) != num_chunks(self.num_bytes) * DIGEST_BYTES:
            raise ValueError(f"{self.name}: {self.num_bytes} bytes need {num_chunks(self.num_bytes)} digests")

    @property
    def num_chunks(self) -> int:
        return num_chunks(self.num_bytes)

    def chunk(self, index: int) -> ChunkRef:
        """The chunk that holds bytes [index * CHUNK_BYTES, ...)."""
        if not 0 <= index < self.num_chunks:
            raise IndexError(f"{self.name} has {self.num_chunks} chunks, not {index}")
        offset = index * CHUNK_BYTES
        digest = self.digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]
        return ChunkRef(digest, self.name, offset, min(CHUNK_BYTES, self.num_bytes - offset))

    def chunks(self) -> Iterator[ChunkRef]:
        return (self.chunk(i) for i in range(self.num_chunks))


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor: C-contiguous bytes [offset, offset + num_bytes) of a file."""

    name: str
    file: str
    offset: int
    shape: tuple[int, ...]
    dtype: str  # as in DTYPE_SIZES

    def __post_init__(self) -> None:
        if not 0 < len(self.name) <= MAX_NAME_LENGTH:
            raise ValueError(f"a tensor's name has 1 to {MAX_NAME_LENGTH} characters")
        if self.dtype not in DTYPE_SIZES:
            raise ValueError(f"{self.name}: unknown dtype {self.dtype[:32]!r}")
        if len(self.shape) > MAX_DIMENSIONS or any(not 0 <= n < 1 << 48 for n in self.shape) or self.offset < 0:
            raise ValueError(f"{self.name}: impossible shape or offset")

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_SIZES[self.dtype]


@dataclass(frozen=True, slots=True)
class Manifest:
    """A checkpoint's files (weights, configuration, tokenizer) and tensors, both in order of name."""

    files: tuple[FileEntry, ...]
    tensors: tuple[TensorEntry, ...]
    _files: dict[str, FileEntry] = field(init=False, repr=False, compare=False)
    _tensors: dict[str, TensorEntry] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.files) > MAX_FILES or len(self.tensors) > MAX_TENSORS:
            raise ValueError(f"{len(self.files)} files and {len(self.tensors)} tensors are too many")
        object.__setattr__(self, "_files", {f.name: f for f in self.files})
        object.__setattr__(self, "_tensors", {t.name: t for t in self.tensors})
        if [*self._files] != sorted(f.name for f in self.files) or [*self._tensors] != sorted(
            t.name for t in self.tensors
        ):
            raise ValueError("files and tensors must be in order of name, each once")
        for tensor in self.tensors:
            file = self._files.get(tensor.file)
            if file is None or tensor.offset + tensor.num_bytes > file.num_bytes:
                raise ValueError(f"tensor {tensor.name} lies outside of its file {tensor.file[:80]!r}")

    @property
    def digest(self) -> ManifestDigest:
        """The name of this content. Encodes the manifest: keep it rather than asking twice."""
        return ManifestDigest(hashlib.sha256(encode_manifest(self)).hexdigest())

    @property
    def tensor_names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    @property
    def small_files(self) -> tuple[FileEntry, ...]:
        """Configuration and tokenizer: the files that hold no tensors."""
        weights = {t.file for t in self.tensors}
        return tuple(f for f in self.files if f.name not in weights)

    def file(self, name: str) -> FileEntry:
        """Raises WeightError if the checkpoint has no such file."""
        if (found := self._files.get(name)) is None:
            raise WeightError(f"{name}: the checkpoint has no such file; it has {', '.join(self._files)[:500]}")
        return found

    def tensor(self, name: str) -> TensorEntry:
        """Raises WeightError if the checkpoint has no such tensor."""
        if (found := self._tensors.get(name)) is None:
            where = ", ".join(sorted({t.file for t in self.tensors}))[:300] or "no weight file"
            raise WeightError(
                f"tensor {name} is missing from {where}; "
                "the checkpoint isn't complete or is of another architecture: save it again"
            )
        return found


_Wire = tuple[
    int, tuple[tuple[str, int, bytes], ...], tuple[tuple[str, str, int, tuple[int, ...], str], ...]
]  # fmt: skip
_decoder: Final = msgspec.msgpack.Decoder(_Wire)


def encode_manifest(manifest: Manifest) -> bytes:
    """One canonical msgpack array: equal manifests have equal bytes."""
    files = [(f.name, f.num_bytes, f.digests) for f in manifest.files]
    tensors = [(t.name, t.file, t.offset, t.shape, t.dtype) for t in manifest.tensors]
    return msgspec.msgpack.encode((MANIFEST_VERSION, files, tensors))


def decode_manifest(data: bytes, expected: ManifestDigest | None = None) -> Manifest:
    """Bytes to a manifest; `expected` is the digest it was asked for by. Raises MalformedMessage."""
    if len(data) > MAX_MANIFEST_BYTES:
        raise MalformedMessage(f"manifest of {len(data)} bytes, at most {MAX_MANIFEST_BYTES} are allowed")
    if expected is not None and hashlib.sha256(data).hexdigest() != expected:
        raise MalformedMessage(f"manifest {expected} doesn't have that digest; ask another node for it")
    try:
        version, files, tensors = _decoder.decode(data)
        if version != MANIFEST_VERSION:
            raise ValueError(f"version {version}, this side reads {MANIFEST_VERSION}; upgrade the older side")
        manifest = Manifest(tuple(FileEntry(*f) for f in files), tuple(TensorEntry(*t) for t in tensors))
        if encode_manifest(manifest) != data:
            raise ValueError("not in canonical form")
    except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
        raise MalformedMessage(f"unreadable manifest: {exc}") from exc
    return manifest
