"""The agent sees what becomes of its tasks."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from skynet.errors import WorkerError
from skynet.worker.agent import Agent, WorkerConfig


def test_task_that_fails_ends_the_worker_with_the_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> None:
        raise OSError("the bulk socket is gone")

    async def act() -> None:
        agent = Agent(WorkerConfig(device="cpu", config_dir=tmp_path, cache_dir=tmp_path))
        try:
            agent._link = object()  # type: ignore[assignment]  # never used: the beat ends before it sends
            agent._spawn(fail(), "sharing")
            async with asyncio.timeout(5):
                await asyncio.gather(*agent._tasks, return_exceptions=True)
                await asyncio.sleep(0)  # done callbacks run after this
                with pytest.raises(WorkerError, match=r"sharing ended .*the bulk socket is gone"):
                    await agent._beat()
        finally:
            agent._link = None
            await agent.close()

    asyncio.run(act())
    assert "task failed task=sharing" in caplog.text
