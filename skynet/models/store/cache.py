"""The machine's chunk cache: files named by their SHA-256, shared by its processes, bounded, oldest use goes first."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from skynet.errors import StepAborted, WeightError
from skynet.models.hashes import CHUNK_BYTES, Stamp, stamp_of, write_atomically

logger = logging.getLogger(__name__)

TOUCH_AFTER_S: Final = 3600.0  # a chunk's last use is noted this coarsely, so that reading rarely writes
STALE_TEMPORARY_S: Final = 3600.0
CLAIM_TIMEOUT_S: Final = 30.0
_CLAIM_POLL_S: Final = 0.02
_NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class CacheStats(NamedTuple):
    """What the cache holds now."""

    num_chunks: int
    num_bytes: int


class ChunkCache:
    """Safe for concurrent threads and processes: chunks appear whole (rename) and are hashed before they are believed.

    Invariant: after each `put` the chunks of one process amount to at most `max_bytes` (several processes together may
    pass it for a moment, by 1/32 each).
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self.directory = directory
        self.max_bytes = max_bytes
        self._verified: dict[bytes, Stamp] = {}
        self._lock = threading.Lock()
        self._put_since_trim = 0
        self._size_estimate: int | None = None  # None: not looked yet

    def path(self, digest: bytes) -> Path:
        """Where that chunk lies, if it is here."""
        name = digest.hex()
        return self.directory / name[:2] / name

    def has(self, digest: bytes) -> bool:
        """Whether the chunk is here; it may still turn out damaged when it is read."""
        return self.path(digest).is_file()

    def read(self, digest: bytes, num_bytes: int, offset: int, into: memoryview) -> bool:
        """Fill `into` from `offset` of a chunk of `num_bytes`. False if it isn't here or is damaged (and removed)."""
        path = self.path(digest)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            if self._verified.get(digest) == stamp_of(fd):
                return os.preadv(fd, [into], offset) == len(into)
            data = os.pread(fd, num_bytes + 1, 0)
            if len(data) != num_bytes or hashlib.sha256(data).digest() != digest:
                logger.warning("cached chunk damaged, removed path=%s", path)
                with contextlib.suppress(OSError):
                    path.unlink()
                return False
            if time.time() - os.fstat(fd).st_mtime > TOUCH_AFTER_S:
                with contextlib.suppress(OSError):
                    os.utime(fd)
            self._verified[digest] = stamp_of(fd)
            into[:] = data[offset : offset + len(into)]
            return True
        except OSError as exc:
            logger.warning("cached chunk unreadable path=%s reason=%s", path, exc.strerror)
            return False
        finally:
            os.close(fd)

    def put(self, digest: bytes, data: bytes | memoryview) -> None:
        """Keep a chunk, and drop the least recently used ones above the bound.

        Raises WeightError if the bytes don't match the digest, or if the disk is full or not writable.
        """
        if hashlib.sha256(data).digest() != digest:
            raise WeightError(f"chunk {digest.hex()}: {len(data)} bytes that don't match it; fetch it again")
        path = self.path(digest)
        try:
            write_atomically(path, bytes(data))
            self._verified[digest] = stamp_of(path)
        except FileNotFoundError:
            self._verified.pop(digest, None)  # another process evicted it already
        except OSError as exc:
            raise self._cannot_write(path, len(data), exc) from exc
        with self._lock:
            self._put_since_trim += len(data)
            size = self._size_estimate
            due = size is None or size + self._put_since_trim > self.max_bytes
            due = due or self._put_since_trim >= max(CHUNK_BYTES, self.max_bytes // 32)
        if due:
            self.trim(keep=digest)

    def _cannot_write(self, path: Path, num_bytes: int, exc: OSError) -> WeightError:
        if exc.errno in _NO_SPACE:
            return WeightError(
                f"{path}: no space for a chunk of {num_bytes} bytes ({exc.strerror}); free space on that disk, or "
                "name another directory in SKYNET_CACHE_DIR"
            )
        return WeightError(
            f"{path}: can't be written: {exc.strerror}; check its permissions or name another directory in "
            "SKYNET_CACHE_DIR"
        )

    def trim(self, keep: bytes = b"") -> CacheStats:
        """Once the bound is passed, drop the chunks least recently used until a tenth of it is free."""
        with self._lock, self._file_lock("trim.lock", wait_s=0.0) as is_held:
            if not is_held:
                return CacheStats(0, 0)
            found = sorted(self._scan(), key=lambda item: item[1])
            total, count = sum(size for _, _, size in found), len(found)
            if total > self.max_bytes:
                for path, _, size in found:
                    if total <= self.max_bytes * 9 // 10:
                        break
                    if path.name != keep.hex():
                        with contextlib.suppress(OSError):
                            path.unlink()
                        self._verified.pop(bytes.fromhex(path.name), None)
                        total, count = total - size, count - 1
            self._size_estimate, self._put_since_trim = total, 0
            return CacheStats(count, total)

    def stats(self) -> CacheStats:
        """Count what is here, by looking."""
        sizes = [size for _, _, size in self._scan()]
        return CacheStats(len(sizes), sum(sizes))

    def _scan(self) -> Iterator[tuple[Path, float, int]]:
        """Chunks with last use and size; removes what crashed writers left behind."""
        for directory in self.directory.glob("[0-9a-f][0-9a-f]"):
            for path in directory.iterdir():
                try:
                    state = path.stat()
                    if not path.name.startswith(".tmp-"):
                        yield path, state.st_mtime, state.st_size
                    elif time.time() - state.st_mtime > STALE_TEMPORARY_S:
                        path.unlink()
                except OSError:
                    continue  # evicted by another process meanwhile

    @contextlib.contextmanager
    def claim(self, digest: bytes, cancel: threading.Event) -> Iterator[None]:
        """Held while one chunk is fetched, so that the machine's processes don't all fetch it.

        Only a courtesy: after CLAIM_TIMEOUT_S it is given up and both fetch. Raises StepAborted when cancelled.
        """
        with self._file_lock(f"claims/{digest.hex()[:3]}", CLAIM_TIMEOUT_S, cancel):
            yield

    @contextlib.contextmanager
    def _file_lock(self, name: str, wait_s: float, cancel: threading.Event | None = None) -> Iterator[bool]:
        path = self.directory / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise self._cannot_write(path, 0, exc) from exc
        try:
            deadline = time.monotonic() + wait_s
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    is_held = True
                    break
                except OSError:
                    if time.monotonic() >= deadline:
                        is_held = False
                        break
                if cancel is not None and cancel.wait(_CLAIM_POLL_S):
                    raise StepAborted(f"chunk {name}: loading was cancelled")
            yield is_held
        finally:
            os.close(fd)  # releases the lock
