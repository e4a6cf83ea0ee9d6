"""SHA-256 of each 4 MiB chunk of a file, computed once per file and machine and remembered in a small index."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from skynet.errors import StepAborted, WeightError

logger = logging.getLogger(__name__)

CHUNK_BYTES: Final = 4 << 20
DIGEST_BYTES: Final = 32
UNKNOWN: Final = bytes(DIGEST_BYTES)  # the place of a chunk not hashed yet
MAX_FILE_BYTES: Final = 1 << 46
HASH_THREADS: Final = max(1, min(4, os.cpu_count() or 1))
_TOO_FRESH_S: Final = 0.05  # a file changed this recently may change again within one tick of its file system's clock

Progress = Callable[[int, int], None]  # bytes done, bytes in all


class Stamp(NamedTuple):
    """What tells one state of a file from another."""

    num_bytes: int
    mtime_ns: int
    ctime_ns: int  # can't be set back by `touch` or `cp -p`
    inode: int


def num_chunks(num_bytes: int) -> int:
    """Chunks of a file of that size; the last may be short."""
    return -(-num_bytes // CHUNK_BYTES)


def stamp_of(file: int | Path) -> Stamp:
    """The state of a path or an open file descriptor."""
    state = os.stat(file)
    return Stamp(state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by a file that holds `data`; a crash leaves the old one or the new one. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


class HashIndex:
    """Chunk digests of files seen before, one small record per path, shared by the machine's processes.

    It is a memory, not a truth: a lost or unreadable record only means that a file is hashed again.
    """

    _decoder: Final = msgspec.msgpack.Decoder(tuple[tuple[int, int, int, int], bytes])

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()

    def recall(self, path: Path, stamp: Stamp) -> bytearray:
        """Digests of the file's chunks, UNKNOWN where there is none for this state of the file."""
        size = num_chunks(stamp.num_bytes) * DIGEST_BYTES
        try:
            seen, digests = self._decoder.decode(self._record(path).read_bytes())
        except (OSError, msgspec.MsgspecError):
            return bytearray(size)
        return bytearray(digests) if seen == stamp and len(digests) == size else bytearray(size)

    def remember(self, path: Path, stamp: Stamp, digests: bytes) -> None:
        """Add what is known now about this state of the file, unless it is too fresh to be told apart from the next."""
        if time.time() - max(stamp.mtime_ns, stamp.ctime_ns) / 1e9 < _TOO_FRESH_S:
            return
        with self._lock:
            merged = self.recall(path, stamp)
            for at in range(0, len(digests), DIGEST_BYTES):
                if digests[at : at + DIGEST_BYTES] != UNKNOWN:
                    merged[at : at + DIGEST_BYTES] = digests[at : at + DIGEST_BYTES]
            try:
                write_atomically(self._record(path), msgspec.msgpack.encode((stamp, bytes(merged))))
            except OSError as exc:
                logger.warning("chunk hashes not remembered path=%s reason=%s", path, exc.strerror)

    def _record(self, path: Path) -> Path:
        return self._directory / hashlib.sha256(os.fsencode(path.absolute())).hexdigest()


@contextlib.contextmanager
def reading(path: Path) -> Iterator[int]:
    """An open file descriptor of a weight file; OSErrors inside become a WeightError that names the file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)
    except FileNotFoundError as exc:
        raise WeightError(f"{path}: no such file; download or save the checkpoint again") from exc
    except OSError as exc:
        raise WeightError(f"{path}: can't be read: {exc.strerror}; check its permissions and its disk") from exc


def read_exactly(fd: int, into: memoryview, offset: int, path: Path) -> None:
    """Fill `into` from the file at `offset`. Raises WeightError if the file ends before."""
    done = 0
    while done < len(into):
        count = os.preadv(fd, [into[done:]], offset + done)
        if count == 0:
            raise WeightError(
                f"{path}: ends at byte {offset + done}, expected {offset + len(into)}: it is cut short; "
                "download it again"
            )
        done += count


def hash_file(
    path: Path, index: HashIndex, progress: Progress | None = None, cancel: threading.Event | None = None
) -> tuple[int, bytes]:
    """Size and concatenated digests of a file's chunks, from the index where it knows them, else by one pass over it.

    Holds HASH_THREADS chunks in memory. Raises WeightError (unreadable, changed meanwhile) or StepAborted (cancelled).
    """
    with reading(path) as fd:
        stamp = stamp_of(fd)
        if stamp.num_bytes > MAX_FILE_BYTES:
            raise WeightError(
                f"{path}: {stamp.num_bytes} bytes, at most {MAX_FILE_BYTES} are allowed; split it into shards"
            )
        digests = index.recall(path, stamp)
        todo = [
            i
            for i in range(num_chunks(stamp.num_bytes))
            if digests[i * DIGEST_BYTES : (i + 1) * DIGEST_BYTES] == UNKNOWN
        ]
        done = stamp.num_bytes - sum(min(CHUNK_BYTES, stamp.num_bytes - i * CHUNK_BYTES) for i in todo)
        if progress is not None and done:
            progress(done, stamp.num_bytes)
        if todo:
            _hash_chunks(
                fd,
                path,
                stamp,
                todo,
                digests,
                lambda n: progress(done + n, stamp.num_bytes) if progress else None,
                cancel,
            )
            if stamp_of(fd) != stamp:
                raise WeightError(f"{path}: changed while it was read; wait until it is written, then try again")
            index.remember(path, stamp, bytes(digests))
    return stamp.num_bytes, bytes(digests)


def _hash_chunks(
    fd: int,
    path: Path,
    stamp: Stamp,
    todo: list[int],
    digests: bytearray,
    report: Callable[[int], None],
    cancel: threading.Event | None,
) -> None:
    lock = threading.Lock()
    remaining = iter(todo)
    hashed = 0

    def work() -> None:
        nonlocal hashed
        buffer = memoryview(bytearray(min(CHUNK_BYTES, stamp.num_bytes)))
        while True:
            with lock:
                chunk = next(remaining, None)
            if chunk is None:
                return
            if cancel is not None and cancel.is_set():
                raise StepAborted(f"{path}: hashing was cancelled")
            view = buffer[: min(CHUNK_BYTES, stamp.num_bytes - chunk * CHUNK_BYTES)]
            read_exactly(fd, view, chunk * CHUNK_BYTES, path)
            digest = hashlib.sha256(view).digest()
            with lock:
                digests[chunk * DIGEST_BYTES : (chunk + 1) * DIGEST_BYTES] = digest
                hashed += len(view)
                report(hashed)

    num_threads = min(HASH_THREADS, len(todo))
    with ThreadPoolExecutor(num_threads, thread_name_prefix="hash") as pool:
        for future in [pool.submit(work) for _ in range(num_threads)]:
            future.result()
