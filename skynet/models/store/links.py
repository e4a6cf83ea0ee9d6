"""Ways to other nodes' bulk servers for threads outside of the event loop, and manifests fetched over them."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Final, Protocol

from skynet.errors import MalformedMessage, StepAborted, TransferFailed, WeightError
from skynet.models.hashes import write_atomically
from skynet.models.manifest import MAX_MANIFEST_BYTES, Manifest, ManifestDigest, decode_manifest
from skynet.protocol.bulk import BulkClient
from skynet.protocol.ids import PeerId

logger = logging.getLogger(__name__)

_POLL_S: Final = 0.1
_OPEN_S: Final = 5.0  # for the first connection to a node that answers
_LOOK_S: Final = 0.02


def chunk_name(digest: bytes) -> str:
    """What a chunk is called in bulk transfers."""
    return f"chunk/{digest.hex()}"


def manifest_name(digest: ManifestDigest) -> str:
    """What a manifest is called in bulk transfers."""
    return f"manifest/{digest}"


class PeerLink(Protocol):
    """A way to one node's bulk server, usable from any thread."""

    @property
    def peer_id(self) -> PeerId: ...

    @property
    def is_open(self) -> bool:
        """Whether there is a connection; without one a fetch waits a little for it."""

    def fetch(
        self, name: str, offset: int, size: int | None, into: bytearray, max_bytes: int, cancel: threading.Event
    ) -> None:
        """Append bytes [offset, offset + size) of `name` to `into`; after a failure it holds what came.

        Raises TransferFailed, StepAborted when cancelled.
        """


class LoopLink:
    """A BulkClient that lives in an event loop, for threads outside of it."""

    def __init__(self, peer_id: PeerId, client: BulkClient, loop: asyncio.AbstractEventLoop) -> None:
        self.peer_id = peer_id
        self._client = client
        self._loop = loop

    @property
    def is_open(self) -> bool:
        """See PeerLink."""
        return self._client.is_attached

    def fetch(
        self, name: str, offset: int, size: int | None, into: bytearray, max_bytes: int, cancel: threading.Event
    ) -> None:
        """See PeerLink. The client bounds every wait, this one only looks whether it was cancelled."""
        if self._loop.is_closed():
            raise TransferFailed(f"{self.peer_id}: this side closed the link", "cancelled")
        fetching = self._client.fetch(name, offset, size, into=into, max_bytes=max_bytes)
        future = asyncio.run_coroutine_threadsafe(fetching, self._loop)
        try:
            while not cancel.is_set():
                try:
                    future.result(_POLL_S)
                    return
                except TimeoutError:
                    if future.done():
                        raise
        except CancelledError as exc:
            raise TransferFailed(f"{self.peer_id}: this side closed the link", "cancelled") from exc
        finally:
            future.cancel()
        raise StepAborted(f"{name}: loading was cancelled")


def fetch_manifest(
    digest: ManifestDigest, links: Sequence[PeerLink], cache_dir: Path, cancel: threading.Event | None = None
) -> Manifest:
    """The manifest of that digest, from the machine's cache or the first node that has it; kept in the cache.

    Raises WeightError if nobody has it, StepAborted when cancelled.
    """
    path = cache_dir / "manifests" / digest
    try:
        return decode_manifest(path.read_bytes(), digest)
    except (OSError, MalformedMessage):
        pass  # not here, or damaged: fetch it
    cancel = cancel or threading.Event()
    reasons = []
    for link in _as_they_open(links, cancel):
        data = bytearray()
        try:
            link.fetch(manifest_name(digest), 0, None, data, MAX_MANIFEST_BYTES, cancel)
            manifest = decode_manifest(bytes(data), digest)
        except (TransferFailed, MalformedMessage) as exc:
            reasons.append(f"{link.peer_id}: {exc}")
            continue
        try:
            write_atomically(path, bytes(data))
        except OSError as exc:
            logger.warning("manifest not kept path=%s reason=%s", path, exc.strerror)
        return manifest
    raise WeightError(
        f"manifest {digest}: none of {len(links)} nodes sent it ({'; '.join(reasons)[:500]}); "
        "check that the coordinator runs"
    )


def _as_they_open(links: Sequence[PeerLink], cancel: threading.Event) -> Iterator[PeerLink]:
    """Each link once, those with a connection first; those that get none in time last."""
    waiting, deadline = list(links), time.monotonic() + _OPEN_S
    while waiting:
        link = next((link for link in waiting if link.is_open), None)
        if link is None and time.monotonic() < deadline:
            if cancel.wait(_LOOK_S):
                raise StepAborted("loading was cancelled")
            continue
        link = link or waiting[0]
        waiting.remove(link)
        yield link
