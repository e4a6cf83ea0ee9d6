"""A swarm on several hosts of a `Network`: the real `skynet` commands, each host with a home of its own."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from skynet.testing.hosts import Host
from skynet.testing.processes import NodeProcess, popen

COMMAND_S = 90.0  # on a busy machine; idle, a command takes about one second


@dataclass(frozen=True, slots=True)
class Ended:
    """A command that ran to its end."""

    code: int
    output: str
    errors: str
    seconds: float


class Asked:
    """A `skynet infer` that runs: its text so far, its end. What it prints is read by a thread."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._changed = threading.Condition()
        self._pieces: dict[str, str] = {"output": "", "errors": ""}
        self._started = time.monotonic()
        self._readers = [
            threading.Thread(target=self._read, args=(name, stream), daemon=True, name=f"infer-{name}")
            for name, stream in (("output", process.stdout), ("errors", process.stderr))
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, name: str, stream: Any) -> None:
        with stream:
            while piece := stream.read(1):
                with self._changed:
                    self._pieces[name] += piece
                    self._changed.notify_all()

    @property
    def text(self) -> str:
        return self._pieces["output"]

    def wait_for(self, num_chars: int, timeout_s: float = COMMAND_S) -> str:
        """The text once it has that many characters. Raises TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self.text) >= num_chars, timeout_s):
                raise TimeoutError(f"{num_chars} characters expected in {timeout_s} s, got {self._pieces}")
            return self.text

    def end(self, timeout_s: float = COMMAND_S) -> Ended:
        """Its end. Raises TimeoutError with what it printed; the process is ended then."""
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired as exc:
            self._process.kill()
            raise TimeoutError(f"no end of the answer within {timeout_s} s: {self._pieces}") from exc
        for reader in self._readers:
            reader.join(5)
        return Ended(code, self._pieces["output"], self._pieces["errors"], time.monotonic() - self._started)

    def stop(self) -> None:
        """End it if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait(5)


@dataclass(slots=True)
class HostSwarm:
    """Coordinators, workers and users on hosts. A context manager: everything it starts, it stops."""

    directory: Path
    coordinators: dict[str, NodeProcess] = field(default_factory=dict)  # by name of their host
    workers: dict[str, NodeProcess] = field(default_factory=dict)
    _asked: list[Asked] = field(default_factory=list)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for asked in self._asked:
            asked.stop()
        for node in self.nodes:
            node.kill()
            node.stop()

    # -- what runs where

    def environment(self, host: Host) -> dict[str, str]:
        """A home for this host's user; nothing else of ours."""
        home = self.directory / host.name
        return {
            "SKYNET_CONFIG_DIR": str(home / "config"),
            "SKYNET_CACHE_DIR": str(home / "cache"),
            "SKYNET_COORDINATOR": "",
            "OMP_NUM_THREADS": "1",
        }

    def start_coordinator(self, host: Host, *arguments: str) -> NodeProcess:
        """Start a coordinator and wait until it listens."""
        node = self.coordinators[host.name] = self._launch(host, "coordinator", *arguments)
        node.wait_for("coordinator ready", 60)
        return node

    def start_worker(self, host: Host, *arguments: str) -> NodeProcess:
        """Start a worker; it joins by itself."""
        node = self.workers[host.name] = self._launch(host, "worker", *arguments)
        return node

    def _launch(self, host: Host, command: str, *arguments: str) -> NodeProcess:
        log = self.directory / f"{host.name}-{command}.log"
        name = f"{command}@{host.name}"
        return NodeProcess.start(name, (command, *arguments), self.environment(host), host.prefix, log)

    def stop(self, *hosts: Host) -> None:
        """End what runs on these hosts, without a word."""
        for host in hosts:
            for nodes in (self.workers, self.coordinators):
                node = nodes.pop(host.name, None)
                if node is not None:
                    node.kill()
                    node.stop()

    @property
    def nodes(self) -> list[NodeProcess]:
        """Everything that was started and not stopped."""
        return [*self.workers.values(), *self.coordinators.values()]

    def logs(self) -> str:
        """The ends of all logs."""
        return "\n".join(f"-- {node.name}\n" + "\n".join(node.lines[-25:]) for node in self.nodes)

    # -- asking

    def run(self, host: Host, *arguments: str, timeout_s: float = COMMAND_S) -> Ended:
        """Run a `skynet` command on a host to its end. Raises TimeoutError."""
        return self.ask(host, *arguments).end(timeout_s)

    def ask(self, host: Host, *arguments: str) -> Asked:
        """Start a `skynet` command on a host and watch what it prints."""
        process = popen(arguments, self.environment(host), host.prefix)
        asked = Asked(process)
        self._asked.append(asked)
        return asked

    def status(self, host: Host, *arguments: str) -> dict[str, Any]:
        """What `skynet status --json` prints there."""
        ended = self.run(host, "status", "--json", *arguments)
        if ended.code:
            raise RuntimeError(f"status ended with {ended.code}: {ended.errors}")
        facts: dict[str, Any] = json.loads(ended.output)
        return facts

    def host_of(self, worker_id: str) -> str:
        """The name of the host whose worker has this id."""
        node_id = worker_id.partition(".")[0]
        for name, node in self.workers.items():
            found = node.wait_for(r"worker ready worker=([^ .]+)", 30)
            if found[1] == node_id:
                return name
        raise KeyError(worker_id)

    def serving(self, facts: dict[str, Any]) -> list[set[str]]:
        """By replica that serves: the hosts of its workers."""
        return [
            {self.host_of(worker) for stage in replica["stages"] for worker in stage["workers"]}
            for replica in facts["replicas"]
            if replica["phase"] == "serving"
        ]
