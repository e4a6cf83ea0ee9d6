"""Chunks from wherever they are, in order: the machine's cache, a local copy, then remote sources; each verified."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final

from skynet.errors import SkyNetError, StepAborted, WeightError
from skynet.models.hashes import HASH_THREADS, HashIndex, write_atomically
from skynet.models.manifest import ChunkRef, FileEntry, Manifest
from skynet.models.store.cache import ChunkCache
from skynet.models.store.sources import ChunkSource, LocalCopy, SourceKind

logger = logging.getLogger(__name__)

FETCH_THREADS: Final = 8
_WAIT_POLL_S: Final = 0.2
_MAX_ATTEMPTS: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreConfig:
    """Where a machine keeps what it fetched."""

    cache_dir: Path  # shared by the machine's workers
    max_cache_bytes: int = 64 << 30
    fetch_threads: int = FETCH_THREADS  # chunks fetched at once


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a load is: bytes of chunks, by where they came from."""

    bytes_total: int
    bytes_by_source: dict[SourceKind, int] = field(default_factory=dict)

    @property
    def bytes_done(self) -> int:
        return sum(self.bytes_by_source.values())


class WeightStore:
    """One machine's access to one checkpoint; thread-safe, used from loader threads. Close it to free its threads.

    A chunk that two threads want is fetched once; `prefetch` runs ahead of the reads, at most half the cache's bound.
    """

    def __init__(
        self,
        manifest: Manifest,
        config: StoreConfig,
        *,
        local: Sequence[Path] = (),
        remote: Sequence[ChunkSource] = (),
    ) -> None:
        self.manifest = manifest
        self.cache = ChunkCache(config.cache_dir / "chunks", config.max_cache_bytes)
        self._config = config
        index = HashIndex(config.cache_dir / "hashes")
        self._local = [LocalCopy(directory, index) for directory in local]
        self._remote = tuple(remote)
        self._on_progress: Callable[[Progress], None] | None = None
        self._cancel = threading.Event()
        self._lock = threading.Condition()
        self._fetches: dict[bytes, Future[None]] = {}
        self._ahead: dict[bytes, int] = {}  # fetched before anyone read it
        self._wanted: dict[bytes, int] = {}
        self._arrived: dict[bytes, SourceKind] = {}
        self._done: dict[SourceKind, int] = {}
        self._readers = ThreadPoolExecutor(HASH_THREADS, thread_name_prefix="read")
        self._fetchers = ThreadPoolExecutor(config.fetch_threads, thread_name_prefix="fetch")
        self._prefetcher = ThreadPoolExecutor(1, thread_name_prefix="prefetch")

    # -- reading ------------------------------------------------------------------------------------------------------

    def read(self, chunk: ChunkRef, offset: int, into: memoryview) -> None:
        """Fill `into` from `offset` of a chunk, wherever it comes from.

        Raises WeightError if no source has it or the disk is full, StepAborted when cancelled.
        """
        self._want([chunk])
        for _ in range(_MAX_ATTEMPTS):  # a chunk may be evicted or damaged between fetch and read, but not for ever
            self._check_cancelled()
            kind = self._read_here(chunk, offset, into)
            if kind is not None:
                self._note(chunk, kind)
                with self._lock:
                    self._ahead.pop(chunk.digest, None)
                    self._lock.notify_all()
                return
            self._await(self._start(chunk))
        path = self.cache.path(chunk.digest)
        raise WeightError(
            f"{path}: fetched {_MAX_ATTEMPTS} times, never readable; check that disk or name another directory in "
            "SKYNET_CACHE_DIR"
        )

    def map_read(self, task: Callable[[ChunkRef], None], chunks: Iterable[ChunkRef]) -> None:
        """Run a reading task for several chunks at once, on the store's own threads."""
        self._check_cancelled()
        futures = [self._readers.submit(task, chunk) for chunk in chunks]
        try:
            for future in futures:
                future.result()
        except CancelledError as exc:
            raise StepAborted("loading was cancelled") from exc
        finally:
            for future in futures:
                future.cancel()

    def file_bytes(self, file: FileEntry) -> bytes:
        """A small file, whole."""
        data = bytearray(file.num_bytes)
        for chunk in file.chunks():
            self.read(chunk, 0, memoryview(data)[chunk.offset : chunk.offset + chunk.num_bytes])
        return bytes(data)

    def small_files(self) -> Path:
        """A directory with configuration and tokenizer, as the readers of those expect it."""
        directory = self._config.cache_dir / "models" / self.manifest.digest
        for file in self.manifest.small_files:
            data, path = self.file_bytes(file), directory / file.name
            try:
                if not path.is_file() or path.read_bytes() != data:
                    write_atomically(path, data)
            except OSError as exc:
                raise WeightError(
                    f"{path}: can't be written: {exc.strerror}; free space or name another directory in "
                    "SKYNET_CACHE_DIR"
                ) from exc
        return directory

    def _read_here(self, chunk: ChunkRef, offset: int, into: memoryview) -> SourceKind | None:
        if self.cache.read(chunk.digest, chunk.num_bytes, offset, into):
            return "cache"
        return "local" if any(copy.read(chunk, offset, into) for copy in self._local) else None

    # -- fetching -----------------------------------------------------------------------------------------------------

    def prefetch(self, chunks: Sequence[ChunkRef]) -> None:
        """Announce what will be read, so that what isn't on this machine is fetched ahead. Returns at once.

        A chunk that can't be had isn't an error before it is read.
        """
        self._check_cancelled()
        self._want(chunks)
        self._prefetcher.submit(self._run_ahead, tuple(chunks))

    def fetch_soon(self, chunks: Iterable[ChunkRef]) -> None:
        """Start to fetch several chunks at once that are about to be read, as far as the window allows."""
        if self._remote:
            for chunk in chunks:
                with self._lock:
                    room = sum(self._ahead.values()) + chunk.num_bytes <= self._config.max_cache_bytes // 2
                    is_new = chunk.digest not in self._arrived and chunk.digest not in self._ahead
                if room and is_new and not self._is_here(chunk):
                    self._fetch_ahead(chunk)

    def _fetch_ahead(self, chunk: ChunkRef) -> None:
        with self._lock:
            self._ahead[chunk.digest] = chunk.num_bytes
        self._start(chunk)

    def _run_ahead(self, chunks: tuple[ChunkRef, ...]) -> None:
        for chunk in chunks:
            if self._is_here(chunk) or chunk.digest in self._arrived:
                continue
            with self._lock:
                while sum(self._ahead.values()) > self._config.max_cache_bytes // 2 and not self._cancel.is_set():
                    self._lock.wait(_WAIT_POLL_S)
                if self._cancel.is_set():
                    return
            self._fetch_ahead(chunk)

    def _is_here(self, chunk: ChunkRef) -> bool:
        return self.cache.has(chunk.digest) or any(copy.may_have(chunk) for copy in self._local)

    def _start(self, chunk: ChunkRef) -> Future[None]:
        with self._lock:
            running = self._fetches.get(chunk.digest)
            if running is None:
                self._check_cancelled()
                running = self._fetches[chunk.digest] = self._fetchers.submit(self._fetch, chunk)
            return running

    def _await(self, fetch: Future[None]) -> None:
        while True:
            self._check_cancelled()
            try:
                return fetch.result(_WAIT_POLL_S)
            except TimeoutError:
                if fetch.done():
                    raise
            except CancelledError as exc:
                raise StepAborted("loading was cancelled") from exc

    def _fetch(self, chunk: ChunkRef) -> None:
        """On a fetch thread: get one chunk into the cache."""
        try:
            with self.cache.claim(chunk.digest, self._cancel):
                if self.cache.has(chunk.digest):  # another process of this machine was quicker
                    return
                for source in self._remote:
                    data = source.fetch(chunk, self._cancel)
                    if data is not None:
                        self.cache.put(chunk.digest, data)
                        self._note(chunk, source.kind)
                        return
            asked = ", ".join(source.kind for source in self._remote) or "no other source known"
            where = ", ".join(str(copy.directory) for copy in self._local) or "none"
            raise WeightError(
                f"{chunk.file}: bytes {chunk.offset} to {chunk.offset + chunk.num_bytes} are nowhere to be had "
                f"(local copies: {where}; asked: {asked}); put an unaltered copy of the checkpoint on this machine, "
                "or start a worker that has one"
            )
        except SkyNetError:
            with self._lock:
                self._ahead.pop(chunk.digest, None)
            raise
        finally:
            with self._lock:
                self._fetches.pop(chunk.digest, None)
                self._lock.notify_all()

    # -- progress, end ------------------------------------------------------------------------------------------------

    @property
    def progress(self) -> Progress:
        with self._lock:
            return Progress(sum(self._wanted.values()), dict(self._done))

    def report_to(self, on_progress: Callable[[Progress], None]) -> None:
        """Call this now and whenever a chunk arrived, from any thread. Announce first: then the total stays."""
        self._on_progress = on_progress
        on_progress(self.progress)

    def _want(self, chunks: Iterable[ChunkRef]) -> None:
        with self._lock:
            self._wanted.update((chunk.digest, chunk.num_bytes) for chunk in chunks)

    def _note(self, chunk: ChunkRef, kind: SourceKind) -> None:
        with self._lock:
            if chunk.digest in self._arrived:
                return
            self._arrived[chunk.digest] = kind
            self._done[kind] = self._done.get(kind, 0) + chunk.num_bytes
        if self._on_progress is not None:
            self._on_progress(self.progress)

    def _check_cancelled(self) -> None:
        if self._cancel.is_set():
            raise StepAborted("loading was cancelled")

    def cancel(self) -> None:
        """End every read and fetch soon with StepAborted; from any thread."""
        self._cancel.set()
        with self._lock:
            self._lock.notify_all()

    def close(self) -> None:
        """Cancel, and wait for the store's threads."""
        self.cancel()
        for pool in (self._prefetcher, self._fetchers, self._readers):
            pool.shutdown(wait=True, cancel_futures=True)
        for copy in self._local:
            copy.remember()

    def __enter__(self) -> WeightStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
