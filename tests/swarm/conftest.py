"""One set of worker processes for the whole session; a module has them serve what it needs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from skynet.testing.local_swarm import LocalSwarm, LocalSwarmConfig

NUM_WORKERS = 6  # enough for 3x2
COMMAND_S = 40


def skynet_environment(
    config_dir: Path, coordinator: str | None = None, cache_dir: Path | None = None
) -> dict[str, str]:
    """The environment of a user with these directories, and no other setting of ours."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SKYNET_")}
    named = {"SKYNET_COORDINATOR": coordinator} if coordinator else {}
    return kept | named | {"SKYNET_CONFIG_DIR": str(config_dir), "SKYNET_CACHE_DIR": str(config_dir)}


@dataclass(frozen=True)
class User:
    """Somebody at a terminal."""

    environment: dict[str, str]

    def run(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run `skynet` to its end."""
        return subprocess.run(
            [sys.executable, "-m", "skynet.cli", *arguments],
            env=self.environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
        )

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Run `skynet` beside the test, which ends it."""
        return subprocess.Popen(
            [sys.executable, "-m", "skynet.cli", *arguments],
            env=self.environment | {"PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def end(process: subprocess.Popen[str]) -> None:
    """Nothing of it is left, whatever the test made of it."""
    process.kill()
    process.communicate(timeout=10)


Serve = Callable[..., LocalSwarm]
_running: list[LocalSwarm] = []


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Starting many processes on a busy machine takes its time."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.timeout(300))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test shows what the processes said."""
    report = yield
    if report.failed:
        for swarm in _running:
            nodes = {"coordinator": swarm.coordinator, **swarm.workers}
            report.sections += [(name, "\n".join(node.lines[-25:])) for name, node in nodes.items() if node]
    return report


@pytest.fixture(scope="session")
def workers() -> Iterator[LocalSwarm]:
    """Real processes that live as long as the session."""
    config = LocalSwarmConfig(layout="2x1", dtype="float32", num_workers=NUM_WORKERS, start_timeout_s=240)
    with LocalSwarm(config) as swarm:
        _running.append(swarm)
        yield swarm
        _running.remove(swarm)


@pytest.fixture(scope="session")
def serve(workers: LocalSwarm) -> Serve:
    """Has the session's workers serve with these settings (of LocalSwarmConfig); nothing happens if they do already."""

    base = workers.config

    def served(**settings: object) -> LocalSwarm:
        wanted = replace(base, **settings)  # type: ignore[arg-type]
        if workers.config != wanted:
            workers.serve(wanted)
        return workers

    return served


@pytest.fixture
def swarm(serve: Serve) -> LocalSwarm:
    """The embedded model on two ranks, fp32."""
    return serve(layout="2x1")


@pytest.fixture
def user(swarm: LocalSwarm, tmp_path: Path) -> User:
    """A client of the swarm with a home of its own, on this machine."""
    return User(skynet_environment(tmp_path, f"127.0.0.1:{swarm.port}"))


@pytest.fixture
def owner(swarm: LocalSwarm) -> User:
    """The user who runs the coordinator."""
    return User(skynet_environment(swarm.directory / "config"))


@pytest.fixture(scope="session")
def embedded_oracle() -> Oracle:
    """transformers with the embedded model in fp32."""
    from skynet.models.embedded import EMBEDDED_DIR

    return Oracle(EMBEDDED_DIR)


class Oracle:
    """What one process's transformers makes of a checkpoint, greedily, in fp32."""

    def __init__(self, directory: Path) -> None:
        import transformers

        self.tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="float32")
        self._model = model.eval()

    def shortfalls(self, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> list[float]:
        """How far each answered token's logit lies below the best one, given the tokens before it."""
        import torch

        with torch.inference_mode():
            logits = self._model(torch.tensor([[*prompt_ids, *answer_ids]])).logits[0, len(prompt_ids) - 1 : -1]
        return [float(row.max() - row[token]) for row, token in zip(logits, answer_ids, strict=True)]

    def answer_ids(self, prompt_ids: Sequence[int], num_tokens: int, *, ends_at_eos: bool = False) -> list[int]:
        """The ids that follow, the end token included where the answer ends with it."""
        import torch

        eos = self._model.generation_config.eos_token_id if ends_at_eos else None
        ids = torch.tensor([list(prompt_ids)])
        with torch.inference_mode():
            output = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=num_tokens,
                eos_token_id=eos,
                pad_token_id=0,
            )
        return [int(i) for i in output[0, len(prompt_ids) :]]

    def encode(self, prompt: str) -> list[int]:
        return list(self.tokenizer.encode(prompt))

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))
