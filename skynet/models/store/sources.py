"""A copy of the checkpoint on this machine's disk, and what any remote source of chunks offers."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from pathlib import Path
from typing import Final, Literal, Protocol

from skynet.errors import WeightError
from skynet.models.hashes import CHUNK_BYTES, DIGEST_BYTES, HashIndex, Stamp, read_exactly, reading, stamp_of
from skynet.models.manifest import ChunkRef

logger = logging.getLogger(__name__)

SourceKind = Literal["cache", "local", "hub", "swarm"]
_REMEMBER_EVERY_S: Final = 2.0


class ChunkSource(Protocol):
    """Fetches whole chunks from elsewhere; called from several threads at once."""

    @property
    def kind(self) -> SourceKind: ...

    def fetch(self, chunk: ChunkRef, cancel: threading.Event) -> bytes | None:
        """The chunk's bytes, verified, or None if this source hasn't got it (the reason is logged). Bounded in time.

        Raises StepAborted when cancelled; nothing else.
        """


class LocalCopy:
    """A checkpoint directory. Each chunk is hashed once per state of its file and machine, then read in part."""

    def __init__(self, directory: Path, index: HashIndex) -> None:
        self.directory = directory
        self._index = index
        self._lock = threading.Lock()
        self._known: dict[str, tuple[Stamp, bytearray]] = {}
        self._complained: set[str] = set()
        self._last_remembered = time.monotonic()

    def may_have(self, chunk: ChunkRef) -> bool:
        """Whether the file is here and long enough; its content may still turn out to be another."""
        try:
            return (self.directory / chunk.file).stat().st_size >= chunk.offset + chunk.num_bytes
        except OSError:
            return False

    def read(self, chunk: ChunkRef, offset: int, into: memoryview) -> bool:
        """Fill `into` from `offset` of the chunk. False if this copy lacks it or holds other bytes (logged once)."""
        path = self.directory / chunk.file
        try:
            with reading(path) as fd:
                stamp = stamp_of(fd)
                if stamp.num_bytes < chunk.offset + chunk.num_bytes:
                    return False
                digests = self._digests(path, stamp)
                at = slice(chunk.index * DIGEST_BYTES, (chunk.index + 1) * DIGEST_BYTES)
                if digests[at] == chunk.digest:
                    read_exactly(fd, into, chunk.offset + offset, path)
                    return stamp_of(fd) == stamp
                is_whole = len(into) == chunk.num_bytes
                buffer = into if is_whole else memoryview(bytearray(chunk.num_bytes))
                read_exactly(fd, buffer, chunk.offset, path)
                if hashlib.sha256(buffer).digest() != chunk.digest:
                    self._complain(path, chunk)
                    return False
                digests[at] = chunk.digest
                if not is_whole:
                    into[:] = buffer[offset : offset + len(into)]
        except WeightError as exc:
            logger.warning("local copy not used file=%s reason=%s", path, exc)
            return False
        self._remember_sometimes()
        return True

    def _digests(self, path: Path, stamp: Stamp) -> bytearray:
        with self._lock:
            known = self._known.get(path.name)
            if known is None or known[0] != stamp:
                known = self._known[path.name] = (stamp, self._index.recall(path, stamp))
            return known[1]

    def _complain(self, path: Path, chunk: ChunkRef) -> None:
        if path.name not in self._complained:
            self._complained.add(path.name)
            logger.warning(
                "local copy differs from the swarm's model file=%s chunk=%d: fetching it elsewhere", path, chunk.index
            )

    def _remember_sometimes(self) -> None:
        if time.monotonic() - self._last_remembered > _REMEMBER_EVERY_S:
            self.remember()

    def remember(self) -> None:
        """Write down which chunks were verified, for this process's successors and neighbours."""
        self._last_remembered = time.monotonic()
        with self._lock:
            known = [(name, stamp, bytes(digests)) for name, (stamp, digests) in self._known.items()]
        for name, stamp, digests in known:
            self._index.remember(self.directory / name, stamp, digests)


def matches(chunk: ChunkRef, data: bytes | bytearray | memoryview) -> bool:
    """Whether these bytes are that chunk."""
    return len(data) == chunk.num_bytes <= CHUNK_BYTES and hashlib.sha256(data).digest() == chunk.digest
