"""What the coordinator gives to workers in bulk: the model's manifest, and chunks of its own copy."""

from __future__ import annotations

from pathlib import Path

from skynet.coordinator.served import ServedModel
from skynet.models.store.serving import ModelShelf
from skynet.models.store.store import StoreConfig
from skynet.protocol.bulk import BulkServer
from skynet.protocol.sockets import Port, SocketFactory
from skynet.protocol.toll import Toll


class ModelSharing:
    """Serves the model to admitted workers. Owns its socket."""

    def __init__(self, factory: SocketFactory, port: Port, model: ServedModel, cache_dir: Path) -> None:
        shelf = ModelShelf(StoreConfig(cache_dir=cache_dir))
        shelf.add(model.manifest, [model.directory] if model.directory else [])
        self.port = port.number
        self._port = factory.asynchronous(port)
        self._server = BulkServer(
            self._port, shelf.open_source, on_protocol_error=factory.punish, toll=Toll(factory.suspend)
        )

    async def run(self) -> None:
        """Serve until cancelled."""
        await self._server.run()

    def close(self) -> None:
        """Close the socket; twice is fine."""
        self._port.close()
