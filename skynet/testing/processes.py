"""A SkyNet process under test: its lines as they come, its signals, its end."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil

MAX_LINES = 20_000  # of one process's log that are kept


def popen(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    prefix: Sequence[str] = (),
    *,
    stdout: int = subprocess.PIPE,
) -> subprocess.Popen[str]:
    """Start `skynet` with these arguments, beside ours in a session of its own; its errors come by a pipe."""
    return subprocess.Popen(
        [*_with_parent(), *prefix, sys.executable, "-m", "skynet.cli", *arguments],
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@dataclass(slots=True, eq=False)
class NodeProcess:
    """One real process. Everything it prints is kept; waits end at a matching line, at its end, or at a deadline."""

    name: str
    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _reader: threading.Thread | None = None
    is_interrupted: bool = False

    @classmethod
    def start(
        cls,
        name: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        prefix: Sequence[str] = (),
        log_path: Path | None = None,
    ) -> NodeProcess:
        """Run `skynet` with these arguments; `prefix` goes before it (to enter a network namespace, say)."""
        process = popen(arguments, environment, prefix, stdout=subprocess.DEVNULL)
        node = cls(name, process)
        assert process.stderr is not None
        node._reader = threading.Thread(
            target=node._read, args=(process.stderr, log_path), daemon=True, name=f"log-{name}"
        )
        node._reader.start()
        return node

    def _read(self, stream: IO[str], log_path: Path | None) -> None:
        with stream, open(log_path or os.devnull, "a", encoding="utf-8") as log:
            for line in stream:
                log.write(line)
                log.flush()
                with self._changed:
                    self.lines.append(line.rstrip("\n"))
                    del self.lines[:-MAX_LINES]
                    self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def wait_for(self, pattern: str, timeout_s: float = 30.0, start: int = 0) -> re.Match[str]:
        """The first line from number `start` on that matches. Raises TimeoutError with the end of the log."""
        expression = re.compile(pattern)
        deadline = time.monotonic() + timeout_s
        seen = start
        with self._changed:
            while True:
                for line in self.lines[seen:]:
                    if found := expression.search(line):
                        return found
                seen = len(self.lines)
                has_ended = self.process.poll() is not None and (self._reader is None or not self._reader.is_alive())
                left = deadline - time.monotonic()
                if has_ended or left <= 0:
                    why = f"ended with {self.process.returncode}" if has_ended else f"{timeout_s:.0f} s passed"
                    raise TimeoutError(
                        f"{self.name}: {why} without a line like {pattern!r}; log:\n" + "\n".join(self.lines[-30:])
                    )
                self._changed.wait(min(left, 0.5))

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    @property
    def memory_bytes(self) -> int:
        """Resident memory now."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def kill(self) -> None:
        """SIGKILL: gone without a word."""
        self._signal(signal.SIGKILL)
        self.wait(10)

    def pause(self) -> None:
        """SIGSTOP: hangs, its connections stay open."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    def interrupt(self) -> None:
        """What Ctrl-C sends."""
        self.is_interrupted = True
        self._signal(signal.SIGINT)

    def _signal(self, number: int) -> None:
        if self.is_running:
            os.kill(self.process.pid, number)

    def wait(self, timeout_s: float) -> int:
        """Its exit code. Raises TimeoutError."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired as exc:
            raise TimeoutError(
                f"{self.name} still runs after {timeout_s:.0f} s; log:\n" + "\n".join(self.lines[-30:])
            ) from exc

    def stop(self, timeout_s: float = 10.0) -> None:
        """End it for certain: a second interrupt leaves at once, SIGKILL if even that doesn't help."""
        self.resume()
        if not self.is_interrupted:
            self.interrupt()
        try:
            self.process.wait(timeout_s / 2)
        except subprocess.TimeoutExpired:
            self.interrupt()
            try:
                self.process.wait(timeout_s / 2)
            except subprocess.TimeoutExpired:
                self.kill()
        if self._reader is not None:
            self._reader.join(5)


def _with_parent() -> list[str]:
    """Where Linux's setpriv is there: end with the thread that started it, so that nothing outlives a killed test."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL"] if setpriv else []
