"""Gets a shard into memory: manifest, chunks, layers; on a thread of its own, beside what is being served."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from skynet.errors import ModelError
from skynet.models.embedded import EMBEDDED_DIR, EMBEDDED_NAME
from skynet.models.manifest import Manifest, ManifestDigest
from skynet.models.shard_reads import shard_reads
from skynet.models.store.sources import ChunkSource
from skynet.models.store.store import Progress, StoreConfig, WeightStore
from skynet.models.store.swarm_source import SwarmSource
from skynet.protocol.messages import ModelRef, Prepare
from skynet.worker.sharing import ChunkSharing
from skynet.worker.stage.loader import load_stage
from skynet.worker.stage.stage import Stage

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ShardKey:
    """What makes two shards the same weights."""

    digest: str
    layers: tuple[int, int]
    is_first: bool
    is_last: bool
    share: object
    dtype: str

    @classmethod
    def of(cls, order: Prepare) -> ShardKey:
        a = order.assignment
        return cls(order.model.digest, (a.layers.start, a.layers.end), a.is_first, a.is_last, a.share, a.dtype)


@dataclass(slots=True)
class _Model:
    manifest: Manifest
    config: dict[str, object]


class Loader:
    """Loads shards one after the other. Weights that a worker still holds are used again."""

    def __init__(
        self,
        device: torch.device,
        store: StoreConfig,
        sharing: ChunkSharing,
        hub_endpoint: str | None = None,
    ) -> None:
        self._hub_endpoint = hub_endpoint
        self._device = device
        self._store = store
        self._sharing = sharing
        self._models: dict[str, _Model] = {}
        self._held: dict[ShardKey, Stage] = {}

    def load(self, order: Prepare, cancel: threading.Event, on_progress: Callable[[Progress], None]) -> Stage:
        """The stage of this order, ready to serve. Raises a SkyNetError naming the file and the fix."""
        key = ShardKey.of(order)
        held = self._held.get(key)
        if held is not None:
            logger.info("shard reused epoch=%s layers=%d-%d", order.epoch, key.layers[0], key.layers[1] - 1)
            return held.with_fresh_cache(order.assignment)
        local, remote = self._places(order.model)
        model = self._models.get(order.model.digest)
        manifest = model.manifest if model else self._sharing.manifest(ManifestDigest(order.model.digest), cancel)
        self._sharing.offer(manifest, local)
        with (
            WeightStore(manifest, self._store, local=local, remote=remote) as store,
            cancelled_by(cancel, store),
        ):
            if model is None:
                model = self._models[order.model.digest] = _Model(manifest, _config_of(store, manifest))
            source = SwarmSource(store)
            source.announce(shard_reads(model.config, order.assignment, source.names()))
            store.report_to(on_progress)
            stage = load_stage(model.config, order.assignment, source, self._device)
        # Weights alone: the cache belongs to its epoch and must go with it.
        self._held[key] = stage.with_fresh_cache(dataclasses.replace(order.assignment, num_blocks=1))
        return stage

    def _places(self, ref: ModelRef) -> tuple[tuple[Path, ...], list[ChunkSource]]:
        """Directories of this machine that may hold the model, and where chunks come from that they lack."""
        if not ref.revision:
            return local_copies(ref), [self._sharing.chunks()]
        from skynet.models.hub import Hub, HubConfig, HubModel  # slow to import, and seldom needed
        from skynet.models.store.hub_chunks import HubChunks

        hub = Hub(HubConfig(endpoint=self._hub_endpoint) if self._hub_endpoint else HubConfig())
        snapshot = hub.snapshot(ref.name, ref.revision)
        chunks = HubChunks(hub, HubModel(ref.name, ref.revision))
        return ((snapshot,) if snapshot else ()), [chunks, self._sharing.chunks()]

    def keep_only(self, orders: Sequence[Prepare]) -> None:
        """Forget weights that none of these orders needs."""
        needed = {ShardKey.of(order) for order in orders}
        for key in [k for k in self._held if k not in needed]:
            del self._held[key]


def local_copies(ref: ModelRef) -> tuple[Path, ...]:
    """Directories where a model that isn't from the hub may lie; what they hold is verified chunk by chunk."""
    if ref.name == EMBEDDED_NAME:
        return (EMBEDDED_DIR,)
    path = Path(ref.name).expanduser()
    return (path,) if not ref.revision and path.is_dir() else ()


def _config_of(store: WeightStore, manifest: Manifest) -> dict[str, object]:
    try:
        config = json.loads(store.file_bytes(manifest.file("config.json")))
    except ValueError as exc:
        raise ModelError(f"config.json: isn't JSON ({exc}); fetch the model again") from exc
    if not isinstance(config, dict):
        raise ModelError(f"config.json: holds {type(config).__name__}, expected an object")
    return config


@contextlib.contextmanager
def cancelled_by(cancel: threading.Event, store: WeightStore) -> Iterator[None]:
    """Cancel the store's reads when this event is set."""
    is_done = threading.Event()

    def watch() -> None:
        while not is_done.is_set():
            if cancel.wait(0.1):
                store.cancel()
                return

    watcher = threading.Thread(target=watch, name="cancel-load", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        is_done.set()
        watcher.join(5)
