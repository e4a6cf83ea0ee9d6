"""LocalSwarm: a real coordinator and real workers as processes on loopback, for tests, benchmarks and demos."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from skynet.client.swarm import ClientConfig, Completion, CompletionStream, Event, Swarm
from skynet.coordinator.planner.config import Layout
from skynet.testing.cuts import CutError, Cuts
from skynet.testing.processes import NodeProcess

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalSwarmConfig:
    """What to start."""

    layout: str | None = "1x1"  # tensor-parallel x pipeline; None: the planner chooses
    num_workers: int | None = None  # default: as many as the layout needs
    model: str = "embedded"
    dtype: str | None = None
    threads: int = 1  # of each worker
    memory: str | None = None  # of each worker; default: its share of what is free
    context: int | None = None
    lease_s: float = 4.0
    coordinator_arguments: tuple[str, ...] = ()
    worker_arguments: tuple[str, ...] = ()
    log_level: str = "info"
    start_timeout_s: float = 90.0


class LocalSwarm:
    """Real processes on loopback. A context manager: everything it starts, it stops.

    >>> with LocalSwarm(LocalSwarmConfig(layout="2x1")) as swarm:
    ...     print(swarm.complete(Completion(prompt="Once upon a time")).text)
    """

    def __init__(self, config: LocalSwarmConfig | None = None, directory: Path | None = None) -> None:
        self.config = config or LocalSwarmConfig()
        self._temporary = None if directory else tempfile.TemporaryDirectory(prefix="skynet-")
        self.directory = directory or Path(self._temporary.name if self._temporary else ".")
        self.environment = {
            "SKYNET_CONFIG_DIR": str(self.directory / "config"),
            "SKYNET_CACHE_DIR": str(self.directory / "cache"),
            "OMP_NUM_THREADS": str(self.config.threads),
            **dict.fromkeys(("SKYNET_COORDINATOR", "SKYNET_SWARM", "SKYNET_INVITE"), ""),  # meant for another swarm
        }
        self.coordinator: NodeProcess | None = None
        self.workers: dict[str, NodeProcess] = {}
        self.port = 0
        self._names = 0
        self._loop = _LoopThread()
        self._cuts: Cuts | None = None

    # -- starting and stopping

    def __enter__(self) -> Self:
        try:
            self.start_coordinator()
            for _ in range(self.num_workers):
                self.start_worker()
            self.wait_serving()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def num_workers(self) -> int:
        """How many it starts with."""
        if self.config.num_workers is not None:
            return self.config.num_workers
        return Layout.parse(self.config.layout).num_workers if self.config.layout else 1

    def start_coordinator(self) -> NodeProcess:
        """Start it, again if it was killed; the port stays the same."""
        config = self.config
        arguments = ["coordinator", "--no-mdns", "--port", str(self.port), "--model", config.model]
        arguments += ["--lease-s", str(config.lease_s), "--log-level", config.log_level]
        arguments += ["--http", "127.0.0.1:0"]
        for option, value in (("--layout", config.layout), ("--dtype", config.dtype), ("--context", config.context)):
            arguments += [option, str(value)] if value is not None else []
        self.coordinator = self._start("coordinator", [*arguments, *config.coordinator_arguments])
        self.port = int(self.coordinator.wait_for(r"coordinator ready .*port=(\d+)", 60)[1])
        return self.coordinator

    def serve(self, config: LocalSwarmConfig) -> None:
        """Serve something else with the same workers: a coordinator with these settings takes the old one's place."""
        if self.coordinator is not None:
            self.coordinator.stop()
        self.config = config
        self.start_coordinator()
        self.wait_serving()

    def start_worker(
        self,
        name: str | None = None,
        arguments: Sequence[str] = (),
        *,
        home: Path | None = None,
        prefix: Sequence[str] = (),
    ) -> NodeProcess:
        """Start one more worker; it joins by itself. With a `home` for keys and cache it is another node."""
        if name is None:
            name = f"w{self._names}"
            self._names += 1
        config = self.config
        options = ["worker", "--device", "cpu", "--name", name, "--coordinator", f"127.0.0.1:{self.port}"]
        options += ["--threads", str(config.threads), "--log-level", config.log_level]
        options += ["--memory", config.memory] if config.memory else []
        self.workers[name] = self._start(name, [*options, *config.worker_arguments, *arguments], home, prefix)
        return self.workers[name]

    def _start(
        self, name: str, arguments: Sequence[str], home: Path | None = None, prefix: Sequence[str] = ()
    ) -> NodeProcess:
        own = {"SKYNET_CONFIG_DIR": str(home / "config"), "SKYNET_CACHE_DIR": str(home / "cache")} if home else {}
        environment = self.environment | own
        return NodeProcess.start(name, arguments, environment, prefix, log_path=self.directory / f"{name}.log")

    def cut(self, name: str, other: str) -> None:
        """Lose the packets of all connections between two processes (a worker's name, or "coordinator") without a word.

        Connections that they make later work. Raises CutError where there is none to cut, or it isn't permitted here:
        `cuts.missing()` says so beforehand.
        """
        self._cuts = self._cuts or Cuts()
        if not self._cuts.cut(self._pid(name), self._pid(other)):
            raise CutError(f"{name} and {other} have no connection")

    def mend(self) -> None:
        """Undo every `cut`; what is still open goes on."""
        if self._cuts is not None:
            self._cuts.mend()

    def _pid(self, name: str) -> int:
        node = self.coordinator if name == "coordinator" else self.workers[name]
        assert node is not None
        return node.process.pid

    def stop(self) -> None:
        """End every process and thread it started; works twice."""
        if self._cuts is not None:
            self._cuts.close()
        nodes = [*self.workers.values(), *([self.coordinator] if self.coordinator else [])]
        for node in nodes:
            node.resume()
            if not node.is_interrupted:
                node.interrupt()
        for node in reversed(nodes):  # without their coordinator, workers have nobody to take leave of
            node.stop()
        self._loop.stop()
        if self._temporary is not None:
            self._temporary.cleanup()

    # -- asking

    @property
    def client_config(self) -> ClientConfig:
        address, keys = f"127.0.0.1:{self.port}", self.directory / "config"
        return ClientConfig(coordinator=address, config_dir=keys, find_s=30)  # all of it starts at once, on few cores

    @property
    def url(self) -> str:
        """Of the HTTP API, without the /v1. Raises TimeoutError if the coordinator has none."""
        assert self.coordinator is not None
        return self.coordinator.wait_for(r"gateway ready url=(\S+)", 10)[1]

    def run(self, work: Callable[[Swarm], Coroutine[Any, Any, T]], timeout_s: float = 120.0) -> T:
        """Run asynchronous client code against the swarm from synchronous code."""

        async def connected() -> T:
            async with Swarm(self.client_config) as swarm:
                return await work(swarm)

        return self._loop.run(connected(), timeout_s)

    def status(self) -> dict[str, Any]:
        """What `skynet status --json` prints."""
        return self.run(lambda swarm: swarm.status())

    def wait_serving(self, timeout_s: float | None = None, *, num_workers: int | None = None) -> dict[str, Any]:
        """Until a replica serves (on so many workers). Raises TimeoutError with the last status."""

        facts: dict[str, Any] = {}

        async def wait(swarm: Swarm) -> dict[str, Any]:
            nonlocal facts
            revision = -1
            while True:
                facts = await swarm.status(newer_than=revision)
                serving = [
                    w for r in facts["replicas"] if r["phase"] == "serving" for s in r["stages"] for w in s["workers"]
                ]
                if serving and (num_workers is None or len(serving) == num_workers):
                    return facts
                revision = facts["revision"]

        try:
            return self.run(wait, timeout_s or self.config.start_timeout_s)
        except TimeoutError as exc:
            raise TimeoutError(f"no replica serves; the last status: {facts}") from exc

    def complete(
        self,
        completion: Completion,
        on_event: Callable[[CompletionStream, Event], None] | None = None,
        timeout_s: float = 120.0,
    ) -> CompletionStream:
        """Run one completion to its end; `on_event` sees it grow (and may hurt the swarm meanwhile)."""

        async def work(swarm: Swarm) -> CompletionStream:
            stream = swarm.complete(completion)
            async for event in stream:
                if on_event is not None:
                    await asyncio.to_thread(on_event, stream, event)
            return stream

        return self.run(work, timeout_s)


class _LoopThread:
    """An event loop in a thread of its own, for synchronous callers."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="local-swarm", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        async def bounded() -> T:
            async with asyncio.timeout(timeout_s):
                return await work

        return asyncio.run_coroutine_threadsafe(bounded(), self._loop).result(timeout_s + 5)

    def stop(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(5)
            self._loop.close()
