"""A configuration directory belongs to one running coordinator."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from skynet.coordinator.administration import Administration
from skynet.coordinator.instance import sole_coordinator
from skynet.coordinator.server import serve
from skynet.coordinator.server_config import CoordinatorConfig
from skynet.errors import ConfigError
from skynet.protocol.admin_socket import socket_path


def test_a_second_coordinator_is_refused_and_told_who_runs(tmp_path: Path) -> None:
    config = CoordinatorConfig(config_dir=tmp_path / "config", cache_dir=tmp_path, port=0, mdns=False)
    with sole_coordinator(config.config_dir):
        running = socket_path(config.config_dir)
        running.touch()
        with pytest.raises(ConfigError, match=rf"runs with this directory already \(pid {os.getpid()}\)"):
            asyncio.run(serve(config))
        assert running.exists()
        assert not (config.config_dir / "coordinator.db").exists(), "it opened the store all the same"
    with sole_coordinator(config.config_dir):
        pass  # the first one has ended


def test_closing_removes_no_admin_socket_that_somebody_else_made(tmp_path: Path) -> None:
    server = cast("Any", SimpleNamespace(config=SimpleNamespace(config_dir=tmp_path)))
    path = socket_path(tmp_path)

    async def act() -> None:
        never_ran = Administration(server)
        first = Administration(server)
        running = asyncio.create_task(first.run())
        while first._made is None:  # noqa: ASYNC110  (it says nothing when it listens)
            await asyncio.sleep(0)
        never_ran.close()
        assert path.exists()
        first.close()
        assert not path.exists()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(act())
