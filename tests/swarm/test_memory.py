"""What a worker no longer holds isn't its any more."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path
from typing import Any

import psutil

from skynet.client.swarm import Completion, Swarm
from skynet.testing.local_swarm import LocalSwarm, LocalSwarmConfig

from .test_models import save_checkpoint

PATIENCE_S = 30.0
BIG = {  # 134 MB of fp32 layers
    "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 2048, "max_position_embeddings": 512,
}  # fmt: skip


def test_weights_that_moved_elsewhere_go_back_to_the_system(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model", "llama", BIG)
    config = LocalSwarmConfig(layout="1x2", model=str(tmp_path / "model"), dtype="float32", context=256)
    with LocalSwarm(config) as swarm:
        swarm.workers.pop("w1").kill()
        (whole,) = _workers(swarm.wait_serving(num_workers=1))
        process = psutil.Process(swarm.workers["w0"].process.pid)
        before = process.memory_info().rss
        swarm.start_worker()
        part = next(w for w in _workers(swarm.wait_serving(num_workers=2)) if w["id"] == whole["id"])
        moved = whole["weight_bytes"] - part["weight_bytes"]
        assert moved > 30e6
        deadline = time.monotonic() + PATIENCE_S
        while (rss := process.memory_info().rss) > before - 0.6 * moved:
            assert time.monotonic() < deadline, f"{moved} bytes of weights moved away, {before} resident became {rss}"
            time.sleep(0.1)


def _workers(facts: dict[str, Any]) -> list[dict[str, Any]]:
    return [worker for worker in facts["workers"] if worker["state"] == "serving"]


def test_a_worker_takes_no_more_than_its_owner_lends(tmp_path: Path) -> None:
    """Weights and a KV cache that is filled to its last block; what the process ever took counts, not just now."""
    save_checkpoint(tmp_path / "model", "llama", BIG | {"max_position_embeddings": 2048})
    cap = 640 << 20
    config = LocalSwarmConfig(
        layout="1x1", model=str(tmp_path / "model"), dtype="float32", context=2048, memory=f"{cap >> 20}MiB"
    )
    with LocalSwarm(config) as swarm:
        (worker,) = _workers(swarm.wait_serving())
        assert worker["weight_bytes"] > 130e6
        positions = worker["kv_bytes"] // (BIG["num_hidden_layers"] * 2 * BIG["hidden_size"] * 4)
        assert positions >= 2048
        status = Path(f"/proc/{swarm.workers['w0'].process.pid}/status")
        before = _peak_bytes(status)

        async def answer(client: Swarm, index: int) -> None:
            async for _ in client.complete(Completion(prompt=f"{index} " + "the " * 2000, max_tokens=8)):
                pass

        async def fill(client: Swarm) -> None:
            async with asyncio.TaskGroup() as tasks:
                for index in range(-(-positions // 2048)):
                    tasks.create_task(answer(client, index))

        swarm.run(fill)
        peak = _peak_bytes(status)
        assert peak > before + 0.5 * worker["kv_bytes"], "the cache wasn't filled"
        assert peak <= cap, f"{peak >> 20} MiB taken, {cap >> 20} MiB lent"


def _peak_bytes(status: Path) -> int:
    """What the kernel says a process had in memory at most."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10
