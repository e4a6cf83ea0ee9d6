"""The one place that reads the environment: SKYNET_* variables and their neighbours become plain values.

An option on the command line comes before its variable. An empty variable is as good as none.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

VARIABLES: Final[Mapping[str, str]] = {
    "SKYNET_COORDINATOR": "where the coordinator is, HOST or HOST:PORT",
    "SKYNET_SWARM": "which swarm, when several are found",
    "SKYNET_INVITE": "an invite; unlike --invite it shows in no list of processes",
    "SKYNET_CONFIG_DIR": "keys, pins and the coordinator's state; default ~/.config/skynet",
    "SKYNET_CACHE_DIR": "chunks of models; default ~/.cache/skynet",
    "HF_ENDPOINT": "another hub than https://huggingface.co",
}

OF_LIBRARIES: Final[Mapping[str, str]] = {  # which read these themselves
    "HF_HUB_OFFLINE": "1 keeps to what the hub's cache on this machine holds",
    "HF_TOKEN": "the hub's token, for models that want one",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What the environment says of a swarm and of this user's directories."""

    coordinator: str | None = None
    swarm: str | None = None
    invite: str | None = None
    config_dir: Path
    cache_dir: Path
    hub_endpoint: str | None = None

    @classmethod
    def read(cls, variables: Mapping[str, str] = os.environ) -> Self:
        """From the process's environment."""
        get = variables.get
        config_home, cache_home = get("XDG_CONFIG_HOME") or "~/.config", get("XDG_CACHE_HOME") or "~/.cache"
        return cls(
            coordinator=get("SKYNET_COORDINATOR") or None,
            swarm=get("SKYNET_SWARM") or None,
            invite=get("SKYNET_INVITE") or None,
            config_dir=_directory(get("SKYNET_CONFIG_DIR") or f"{config_home}/skynet"),
            cache_dir=_directory(get("SKYNET_CACHE_DIR") or f"{cache_home}/skynet"),
            hub_endpoint=get("HF_ENDPOINT") or None,
        )


def _directory(text: str) -> Path:
    return Path(text).expanduser()
