"""What a machine serves of its models to other nodes: manifests, and chunks out of its cache and local copies."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from skynet.models.hashes import HashIndex
from skynet.models.manifest import ChunkRef, Manifest, ManifestDigest, encode_manifest
from skynet.models.store.cache import ChunkCache
from skynet.models.store.sources import LocalCopy
from skynet.models.store.store import StoreConfig
from skynet.protocol.bulk import BulkSource, BytesSource, FileSource
from skynet.protocol.ids import PeerId

_NAME: Final = re.compile(r"(chunk|manifest)/([0-9a-f]{64})\Z")
_NOTHING: Final = memoryview(bytearray())  # a read that only verifies


class ModelShelf:
    """Give `open_source` to a BulkServer. Only chunks of the models added are served, and only verified ones.

    Lives in the event loop; hashing and opening files happen in threads.
    """

    def __init__(self, config: StoreConfig) -> None:
        self._cache = ChunkCache(config.cache_dir / "chunks", config.max_cache_bytes)
        self._index = HashIndex(config.cache_dir / "hashes")
        self._manifests: dict[ManifestDigest, bytes] = {}
        self._chunks: dict[ManifestDigest, dict[bytes, ChunkRef]] = {}
        self._copies: dict[ManifestDigest, tuple[LocalCopy, ...]] = {}

    def add(self, manifest: Manifest, local: Sequence[Path] = ()) -> ManifestDigest:
        """Serve this model from now on."""
        digest = manifest.digest
        self._manifests[digest] = encode_manifest(manifest)
        self._chunks[digest] = {chunk.digest: chunk for file in manifest.files for chunk in file.chunks()}
        self._copies[digest] = tuple(LocalCopy(directory, self._index) for directory in local)
        return digest

    def remove(self, digest: ManifestDigest) -> None:
        """Serve this model no longer; transfers under way go on."""
        for table in (self._manifests, self._chunks, self._copies):
            table.pop(digest, None)

    async def open_source(self, peer_id: PeerId, name: str) -> BulkSource | None:
        """The source of `chunk/<hash>` or `manifest/<digest>`; None for what isn't here."""
        matched = _NAME.match(name)
        if matched is None:
            return None
        if matched[1] == "manifest":
            data = self._manifests.get(ManifestDigest(matched[2]))
            return None if data is None else BytesSource(data)
        wanted = bytes.fromhex(matched[2])
        for digest, chunks in self._chunks.items():
            if (chunk := chunks.get(wanted)) is not None:
                return await asyncio.to_thread(self._open_chunk, chunk, self._copies[digest])
        return None

    def _open_chunk(self, chunk: ChunkRef, copies: Sequence[LocalCopy]) -> BulkSource | None:
        if self._cache.read(chunk.digest, chunk.num_bytes, 0, _NOTHING):
            return FileSource(self._cache.path(chunk.digest), 0, chunk.num_bytes)
        for copy in copies:
            if copy.read(chunk, 0, _NOTHING):
                return FileSource(copy.directory / chunk.file, chunk.offset, chunk.num_bytes)
        return None
