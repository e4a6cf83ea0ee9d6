"""A worker that has no copy of the model and no internet gets its shard, and no more, from the swarm."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from skynet.client.swarm import Completion, Swarm
from skynet.models.hashes import CHUNK_BYTES
from skynet.testing.local_swarm import LocalSwarm, LocalSwarmConfig

from .conftest import Oracle
from .test_models import save_checkpoint
from .test_shortage import BIG

PROMPT = "Once upon a time"
HIDE = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"')  # an empty directory in its place


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("big") / "model"
    save_checkpoint(directory, "llama", BIG)
    return directory


@pytest.fixture
def swarm(model: Path, tmp_path: Path) -> Iterator[LocalSwarm]:
    """A coordinator and one worker, who have copies of the model."""
    config = LocalSwarmConfig(layout="1x2", model=str(model), num_workers=2)
    running = LocalSwarm(config, tmp_path)
    try:
        running.start_coordinator()
        running.start_worker()
        yield running
    finally:
        running.stop()


def test_a_worker_without_a_copy_gets_its_shard_from_the_swarm(swarm: LocalSwarm, model: Path, tmp_path: Path) -> None:
    hidden = [*HIDE, str(model)]
    tried = subprocess.run([*hidden, "ls", str(model)], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"mounts of one's own aren't permitted here: {tried.stderr.strip()}")
    assert tried.stdout == ""

    async def loading(client: Swarm) -> list[dict[str, Any]]:
        """What status shows of the newcomer until the replica serves."""
        seen: list[dict[str, Any]] = []
        facts = await client.status()
        while not any(replica["phase"] == "serving" for replica in facts["replicas"]):
            facts = await client.status(newer_than=facts["revision"])
            seen += [w for w in facts["workers"] if w["id"].endswith(".newcomer")]
        return seen

    newcomer = swarm.start_worker("newcomer", home=tmp_path / "elsewhere", prefix=hidden)
    seen = swarm.run(loading, 90)
    progress = [worker["loading"] for worker in seen if worker["loading"]]
    assert progress, "status never showed the newcomer loading"
    assert any(worker["state"].startswith("loading ") for worker in seen)
    last = progress[-1]
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    first_layer, last_layer = map(int, seen[-1]["layers"].split("-"))
    embedding = 4 * BIG["vocab_size"] * BIG["hidden_size"]  # which both stages hold, as its ends are tied
    layers = (size - embedding) * (last_layer - first_layer + 1) / BIG["num_hidden_layers"]
    bound = embedding + layers + 4 * CHUNK_BYTES  # partly needed chunks at the ends of both
    assert {report["bytes_total"] for report in progress} == {last["bytes_done"]}
    assert last["bytes_done"] < bound < size
    assert set(last["bytes_by_source"]) == {"swarm"}
    oracle = Oracle(model)
    stream = swarm.complete(Completion(prompt=PROMPT, max_tokens=12, ignore_eos=True))
    assert stream.token_ids == oracle.answer_ids(oracle.encode(PROMPT), 12)
    kept = sum(file.stat().st_size for file in (tmp_path / "elsewhere" / "cache").rglob("*") if file.is_file())
    assert kept < bound

    swarm.workers.pop("newcomer").stop()  # and what it keeps, it need not get again
    assert newcomer.wait(20) == 0
    again = swarm.start_worker("newcomer", home=tmp_path / "elsewhere", prefix=hidden)
    again.wait_for("shard loaded", 60)
    swarm.wait_serving(60, num_workers=2)
    assert swarm.complete(Completion(prompt=PROMPT, max_tokens=12, ignore_eos=True)).token_ids == stream.token_ids
