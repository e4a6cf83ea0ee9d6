"""Chunks by range requests to the hub."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from typing import Final

from skynet.errors import ModelError
from skynet.models.hub import Hub, HubModel
from skynet.models.manifest import ChunkRef
from skynet.models.store.sources import SourceKind, matches

logger = logging.getLogger(__name__)

_REST_S: Final = 30.0  # after a failure the hub isn't asked for this long, so that the next source comes at once


class HubChunks:
    """A ChunkSource that asks the hub for a pinned revision's bytes."""

    kind: SourceKind = "hub"

    def __init__(self, hub: Hub, model: HubModel) -> None:
        self._hub, self._model = hub, model
        self._resting_until = 0.0

    def fetch(self, chunk: ChunkRef, cancel: threading.Event) -> bytes | None:
        """See ChunkSource."""
        if self._hub.config.is_offline or time.monotonic() < self._resting_until:
            return None
        data = bytearray()
        try:
            with contextlib.closing(
                self._hub.stream(self._model, chunk.file, chunk.offset, chunk.num_bytes, cancel)
            ) as blocks:
                for block in blocks:
                    data += block
        except ModelError as exc:
            self._resting_until = time.monotonic() + _REST_S
            logger.warning("hub not used for %d s reason=%s", _REST_S, exc)
            return None
        if not matches(chunk, data):
            logger.warning("chunk from the hub doesn't match its hash file=%s chunk=%d", chunk.file, chunk.index)
            return None
        return bytes(data)
