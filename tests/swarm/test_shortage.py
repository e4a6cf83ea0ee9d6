"""Too little memory: who asks is told how much is missing, waits, and is answered when a worker joins."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from skynet.client.swarm import Completion
from skynet.errors import CapacityError
from skynet.testing.local_swarm import LocalSwarm, LocalSwarmConfig

from .conftest import User, end, skynet_environment
from .test_models import save_checkpoint

PROMPT = "Once upon a time"
BIG: dict[str, Any] = {  # 150 MB in float32; a worker that lends 450 MiB needs most of it for itself
    "vocab_size": 2048, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 5,
    "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 256,
    "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": True,
}  # fmt: skip
LITTLE = "450MiB"
MISSING = re.compile(r"(\d+(?:\.\d+)? [KMG]iB)")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("big") / "model"
    save_checkpoint(directory, "llama", BIG)
    return directory


@pytest.fixture(scope="module")
def swarm(model: Path) -> Iterator[LocalSwarm]:
    """One worker that can't hold the model."""
    config = LocalSwarmConfig(layout=None, model=str(model), num_workers=1, memory=LITTLE, context=64)
    running = LocalSwarm(config)
    try:
        running.start_coordinator()
        running.start_worker().wait_for("worker ready", 60)
        yield running
    finally:
        running.stop()


@pytest.fixture
def user(swarm: LocalSwarm, tmp_path: Path) -> User:
    return User(skynet_environment(tmp_path, f"127.0.0.1:{swarm.port}"))


def shortage(swarm: LocalSwarm) -> str:
    """What status says is missing, once the worker counts."""

    async def wait(client: object) -> str:
        from skynet.client.swarm import Swarm

        assert isinstance(client, Swarm)
        revision = -1
        while True:
            facts = await client.status(newer_than=revision)
            if facts["missing_bytes"]:
                return str(facts["shortage"])
            revision = facts["revision"]

    return swarm.run(wait, 30)


def test_who_cannot_wait_is_told_how_much_memory_is_missing(swarm: LocalSwarm, user: User) -> None:
    missing = shortage(swarm)
    assert MISSING.search(missing)
    done = user.run("infer", PROMPT, "--timeout", "1")
    assert done.returncode == CapacityError.exit_code
    assert f"waiting for workers: {missing}" in done.stderr  # at once
    assert f"waited 1 s for workers: {missing}" in done.stderr  # at the end
    assert missing in " ".join(user.run("status").stdout.split())


def test_a_killed_client_is_forgotten_and_who_waits_is_answered_when_a_worker_joins(
    swarm: LocalSwarm, user: User
) -> None:
    killed = user.start("infer", PROMPT, "--max-tokens", "4")
    waiting = user.start("infer", PROMPT, "--max-tokens", "4", "--json")
    try:
        for process in (killed, waiting):
            assert process.stderr is not None
            assert any("waiting for workers" in line for line in process.stderr)
        assert swarm.status()["num_queued"] == 2
        killed.send_signal(signal.SIGKILL)
        killed.communicate(timeout=10)

        async def until_one_is_left(client: object) -> None:
            from skynet.client.swarm import Swarm

            assert isinstance(client, Swarm)
            facts = await client.status()
            while facts["num_requests"] != 1:
                facts = await client.status(newer_than=facts["revision"])

        swarm.run(until_one_is_left, 40)
        assert waiting.poll() is None
        swarm.start_worker()
        answer, errors = waiting.communicate(timeout=60)
    finally:
        for process in (killed, waiting):
            end(process)
    assert waiting.returncode == 0, errors
    assert '"completion_tokens": 4' in answer
    assert swarm.status()["shortage"] is None
    assert len(swarm.complete(Completion(prompt=PROMPT, max_tokens=4, ignore_eos=True)).token_ids) == 4
