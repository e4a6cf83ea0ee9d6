"""Another swarm starts where ours was: those who were in ours wait for it. Real servers in one process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from skynet.client.swarm import ClientConfig, Swarm
from skynet.coordinator.planner import PlannerConfig
from skynet.coordinator.served import open_model
from skynet.coordinator.server import CoordinatorServer
from skynet.coordinator.server_config import CoordinatorConfig
from skynet.errors import DiscoveryError
from skynet.worker.agent import Agent, WorkerConfig


@contextlib.asynccontextmanager
async def serving(directory: Path, port: int = 0) -> AsyncIterator[CoordinatorServer]:
    """A coordinator with the keys of this directory; all of them call their swarm the same."""
    config = CoordinatorConfig(
        port=port, bind=("127.0.0.1",), mdns=False, config_dir=directory, cache_dir=directory / "cache"
    )
    server = CoordinatorServer(config, PlannerConfig(), open_model("embedded", None, directory / "cache", None))
    running = asyncio.create_task(server.run())
    try:
        await until(lambda: bool(server.listener._accepting))
        yield server
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await server.close()


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():  # noqa: ASYNC110  (its deadline is the test's)
        await asyncio.sleep(0.005)


async def visited_in_vain(directory: Path, port: int) -> None:
    """An impostor at our swarm's address: somebody comes, twice, and says nothing."""
    async with serving(directory, port) as impostor:
        await until(lambda: impostor.listener.stats.accepted > 1 and impostor.listener.num_connections == 0)
        assert impostor.listener.stats.welcomed == impostor.listener.stats.refused == 0
        assert not impostor._admitted


def test_a_client_waits_for_its_own_swarm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with serving(tmp_path / "own") as own:
            port = own.listener.port
            config = ClientConfig(coordinator=f"127.0.0.1:{port}", config_dir=tmp_path / "client")
            swarm = await Swarm(config).__aenter__()
            assert f"fingerprint={own.swarm_key.fingerprint}" in caplog.text, "nobody had seen it before"
        try:
            await visited_in_vain(tmp_path / "impostor", port)
            async with serving(tmp_path / "own", port):
                await swarm.status()
        finally:
            await swarm.__aexit__(None, None, None)
        async with serving(tmp_path / "impostor", port) as impostor:
            with pytest.raises(DiscoveryError, match=impostor.swarm_key.fingerprint):
                await Swarm(config).__aenter__()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_worker_waits_for_its_own_swarm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "skynet.worker.agent")

    async def main() -> None:
        async with serving(tmp_path / "own") as own:
            port = own.listener.port
            config = WorkerConfig(
                device="cpu",
                threads=1,
                coordinator=f"127.0.0.1:{port}",
                config_dir=tmp_path / "worker",
                cache_dir=tmp_path / "worker" / "cache",
                memory_bytes=1 << 30,
            )
            agent = Agent(config)
            working = asyncio.create_task(agent.run())
            await until(lambda: bool(own.membership.members))
        try:
            await visited_in_vain(tmp_path / "impostor", port)
            assert "another swarm answers there" in caplog.text
            async with serving(tmp_path / "own", port) as own:
                await until(lambda: bool(own.membership.members))
            assert not working.done()
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
            await agent.close()

    asyncio.run(asyncio.wait_for(main(), 60))
