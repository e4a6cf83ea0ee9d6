"""The manifest of a model on the hub, made by streaming each file through SHA-256 once without keeping it."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import msgspec

from skynet.errors import MalformedMessage, WeightError
from skynet.models.checkpoint import INDEX_FILE, MAX_SMALL_FILE_BYTES, SINGLE_FILE, SMALL_FILES, assemble, parse_index
from skynet.models.hashes import CHUNK_BYTES, MAX_FILE_BYTES, Progress, write_atomically
from skynet.models.hub import Hub, HubFile, HubModel
from skynet.models.manifest import FileEntry, Manifest, ManifestDigest, decode_manifest, encode_manifest
from skynet.models.safetensors_header import header_length, parse_header

logger = logging.getLogger(__name__)

FILES_AT_ONCE: Final = 4
_Seen = tuple[bytes, bytes]  # digests, header
_seen_decoder: Final = msgspec.msgpack.Decoder(_Seen)


class _HashedFile:
    """Takes a file's bytes in order and keeps its chunks' digests and, of a weight file, its header."""

    def __init__(self, file: HubFile, subject: str, has_header: bool) -> None:
        self._file, self._subject = file, subject
        self._whole, self._chunk = hashlib.sha256(), hashlib.sha256()
        self._in_chunk = 0
        self.digests = bytearray()
        self.header = bytearray()
        self._header_end: int | None = None if has_header else 0  # None: its first 8 bytes aren't here yet

    def update(self, data: bytes) -> None:
        self._whole.update(data)
        self._take_header(data)
        view = memoryview(data)
        while len(view):
            part = view[: CHUNK_BYTES - self._in_chunk]
            self._chunk.update(part)
            self._in_chunk += len(part)
            view = view[len(part) :]
            if self._in_chunk == CHUNK_BYTES:
                self._end_chunk()

    def _take_header(self, data: bytes) -> None:
        if self._header_end is None or len(self.header) < self._header_end:
            self.header += data
            if self._header_end is None and len(self.header) >= 8:
                self._header_end = 8 + header_length(bytes(self.header[:8]), self._file.num_bytes, self._subject)
            if self._header_end is not None:
                del self.header[self._header_end :]

    def _end_chunk(self) -> None:
        self.digests += self._chunk.digest()
        self._chunk, self._in_chunk = hashlib.sha256(), 0

    def finish(self) -> _Seen:
        if self._in_chunk:
            self._end_chunk()
        if self._file.sha256 is not None and self._whole.hexdigest() != self._file.sha256:
            raise WeightError(
                f"{self._subject}: SHA-256 {self._whole.hexdigest()}, the hub states {self._file.sha256}: it was "
                "altered on the way; try again"
            )
        return bytes(self.digests), bytes(self.header)


class HubManifestBuilder:
    """Builds one model's manifest; what was hashed before, by any process of this machine, isn't fetched again."""

    def __init__(
        self,
        hub: Hub,
        model: HubModel,
        cache_dir: Path,
        progress: Progress | None = None,
        cancel: threading.Event | None = None,
    ) -> None:
        self._hub, self._model, self._cache_dir = hub, model, cache_dir
        self._progress = progress
        self._cancel = cancel or threading.Event()
        self._lock = threading.Lock()
        self._done = self._total = 0

    def cancel(self) -> None:
        """End `build` soon with StepAborted; from any thread."""
        self._cancel.set()

    def build(self) -> Manifest:
        """Raises ModelError (hub), WeightError (files that don't fit together), StepAborted (cancelled)."""
        finished = self._record("manifest")
        with contextlib.suppress(OSError, MalformedMessage):
            data = finished.read_bytes()
            return decode_manifest(data, ManifestDigest(hashlib.sha256(data).hexdigest()))
        promised = self._weight_files()
        names = [*promised, *(name for name in SMALL_FILES if self._model.file(name))]
        if "config.json" not in names:
            raise WeightError(f"{self._model.repo_id}: has no config.json; choose another model")
        files = [self._file(name) for name in names]
        self._total = sum(file.num_bytes for file in files)
        with ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="hub") as pool:
            futures = [pool.submit(self._seen, file, file.name in promised) for file in files]
            try:
                seen = [future.result() for future in futures]
            except BaseException:
                self.cancel()
                for future in futures:
                    future.cancel()
                raise
        headers = {
            file.name: parse_header(header[8:], file.num_bytes, self._subject(file.name))
            for file, (_, header) in zip(files, seen, strict=True)
            if file.name in promised
        }
        entries = [
            FileEntry(file.name, file.num_bytes, digests) for file, (digests, _) in zip(files, seen, strict=True)
        ]
        manifest = assemble(entries, headers, promised, self._model.repo_id)
        self._keep(finished, encode_manifest(manifest))
        return manifest

    def _weight_files(self) -> dict[str, frozenset[str]]:
        if self._model.file(SINGLE_FILE):
            return {SINGLE_FILE: frozenset()}
        if not self._model.file(INDEX_FILE):
            raise WeightError(
                f"{self._model.repo_id}: has neither {SINGLE_FILE} nor {INDEX_FILE}; "
                "choose a model saved as safetensors"
            )
        file = self._file(INDEX_FILE, MAX_SMALL_FILE_BYTES)
        data = b"".join(self._hub.stream(self._model, file.name, 0, file.num_bytes, self._cancel))
        return parse_index(data, self._subject(INDEX_FILE))

    def _file(self, name: str, max_bytes: int = MAX_FILE_BYTES) -> HubFile:
        file = self._model.file(name)
        if file is None:
            raise WeightError(
                f"{self._subject(name)}: {INDEX_FILE} names it, the hub hasn't got it; choose another revision"
            )
        limit = MAX_SMALL_FILE_BYTES if name in SMALL_FILES else max_bytes
        if file.num_bytes > limit:
            raise WeightError(
                f"{self._subject(name)}: {file.num_bytes} bytes, at most {limit} are allowed; choose another model"
            )
        return file

    def _seen(self, file: HubFile, has_header: bool) -> _Seen:
        record = self._record(file.name)
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            seen: _Seen = _seen_decoder.decode(record.read_bytes())
            self._report(file.num_bytes)
            return seen
        hashed = _HashedFile(file, self._subject(file.name), has_header)
        with contextlib.closing(self._hub.stream(self._model, file.name, 0, file.num_bytes, self._cancel)) as blocks:
            for block in blocks:
                hashed.update(block)
                self._report(len(block))
        seen = hashed.finish()
        self._keep(record, msgspec.msgpack.encode(seen))
        return seen

    def _report(self, num_bytes: int) -> None:
        with self._lock:
            self._done += num_bytes
            if self._progress is not None:
                self._progress(self._done, self._total)

    def _subject(self, name: str) -> str:
        return f"{self._model.repo_id}/{name}"

    def _record(self, name: str) -> Path:
        key = "\0".join((self._hub.config.endpoint, self._model.repo_id, self._model.revision, name))
        return self._cache_dir / "hub" / hashlib.sha256(key.encode()).hexdigest()

    def _keep(self, path: Path, data: bytes) -> None:
        try:
            write_atomically(path, data)
        except OSError as exc:
            logger.warning("hub hashes not kept path=%s reason=%s", path, exc.strerror)
