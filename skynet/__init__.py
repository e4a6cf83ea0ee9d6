"""SkyNet: a peer-to-peer volunteer inference swarm.

Names are resolved on first use, so that importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from skynet.client.swarm import ClientConfig, Completion, Swarm
    from skynet.testing.local_swarm import LocalSwarm, LocalSwarmConfig

__version__ = "0.1.0"
__all__ = ["ClientConfig", "Completion", "LocalSwarm", "LocalSwarmConfig", "Swarm", "__version__"]

_MODULES: Final = {
    "ClientConfig": "skynet.client.swarm",
    "Completion": "skynet.client.swarm",
    "LocalSwarm": "skynet.testing.local_swarm",
    "LocalSwarmConfig": "skynet.testing.local_swarm",
    "Swarm": "skynet.client.swarm",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'skynet' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULES[name]), name)
