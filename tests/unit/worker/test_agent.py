"""The agent sees what becomes of its tasks and its compute thread, at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from skynet.coordinator.planner import PlannerConfig
from skynet.coordinator.served import open_model
from skynet.coordinator.server import CoordinatorServer
from skynet.coordinator.server_config import CoordinatorConfig
from skynet.errors import WorkerError
from skynet.worker.agent import Agent, WorkerConfig
from skynet.worker.compute import Stop

LEASE_S = 60.0  # a heartbeat every 15 s, much later than these tests wait


def end_a_task(agent: Agent) -> None:
    async def fail() -> None:
        raise OSError("the bulk socket is gone")

    agent._spawn(fail(), "sharing")


def end_the_compute_thread(agent: Agent) -> None:
    agent._compute.order(Stop())


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (end_a_task, r"sharing ended .*the bulk socket is gone"),
        (end_the_compute_thread, "the compute thread ended"),
    ],
)
def test_worker_of_which_a_part_has_ended_ends_at_once_with_the_reason(
    end: Callable[[Agent], None], reason: str, tmp_path: Path
) -> None:
    model = open_model("embedded", None, tmp_path / "cache", None)

    async def act() -> None:
        config = CoordinatorConfig(
            port=0, bind=("127.0.0.1",), mdns=False, lease_s=LEASE_S, config_dir=tmp_path / "coordinator",
            cache_dir=tmp_path / "cache",
        )  # fmt: skip
        server = CoordinatorServer(config, PlannerConfig(), model)
        serving = asyncio.create_task(server.run())
        await asyncio.sleep(0)
        agent = Agent(
            WorkerConfig(
                device="cpu",
                coordinator=f"127.0.0.1:{server.listener.port}",
                memory_bytes=1 << 30,
                config_dir=tmp_path / "worker",
                cache_dir=tmp_path / "cache",
            )
        )
        running = asyncio.create_task(agent.run())
        try:
            async with asyncio.timeout(20):
                while not server.engine.replicas:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            end(agent)
            async with asyncio.timeout(5):
                with pytest.raises(WorkerError, match=reason):
                    await running
        finally:
            await agent.close()
            serving.cancel()
            await asyncio.gather(running, serving, return_exceptions=True)
            await server.close()

    asyncio.run(act())
