"""Other people's work on this worker: child processes that belong to a lease and end with it, or with the worker.

These are limits for programs that mean well; nothing here keeps one from reading its user's files. Linux only.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from skynet.errors import CapacityError, ConfigError, WorkerError
from skynet.protocol.ids import LeaseId
from skynet.worker import warden

logger = logging.getLogger(__name__)

MAX_CHILDREN: Final = 64
_END_S = 5.0  # a warden needs milliseconds; then it is killed too
_SAID_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildLimits:
    """What a lease gives to one command and all that it starts."""

    memory_bytes: int  # together; each process by itself can't even reserve more of it
    time_s: float  # by the wall clock
    devices: tuple[str, ...] = ()  # CUDA devices it sees, by index or UUID
    output_bytes: int = 1 << 20  # the end of its output is kept

    def __post_init__(self) -> None:
        if min(self.memory_bytes, self.time_s, self.output_bytes) <= 0:
            raise ConfigError(f"limits of a child must be above 0, got {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildEnded:
    """How a command ended."""

    exit_code: int  # 128 + number after a signal
    output: bytes  # the end of its standard output and error
    reason: str  # why it was ended; "" if it ended by itself


@dataclass(slots=True, eq=False)
class _Child:
    process: asyncio.subprocess.Process | None = None
    reason: str = ""  # why it must end
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    def end(self, reason: str) -> None:
        """Cut the lifeline: the warden kills all."""
        self.reason = self.reason or reason
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()


class Children:
    """Every child process of this worker, by the lease it runs under. Used by the event loop's thread alone."""

    def __init__(self) -> None:
        self._running: dict[LeaseId, set[_Child]] = {}

    @property
    def leases(self) -> frozenset[LeaseId]:
        """Leases with a running child."""
        return frozenset(self._running)

    async def run(
        self,
        lease_id: LeaseId,
        command: Sequence[str],
        limits: ChildLimits,
        directory: Path,
        variables: Mapping[str, str] | None = None,
    ) -> ChildEnded:
        """Run a command under a lease until it ends; it and all it started are gone then, also after a cancellation.

        It starts in `directory`, its home, and sees of the environment only `variables` and what is needed to start.
        Raises CapacityError if too many run, WorkerError if its warden had to be killed.
        """
        if sum(map(len, self._running.values())) >= MAX_CHILDREN:
            raise CapacityError(f"lease {lease_id}: {MAX_CHILDREN} children run already; end some")
        order = {"command": list(command), "memory_bytes": limits.memory_bytes, "time_s": limits.time_s}
        child = _Child()
        self._running.setdefault(lease_id, set()).add(child)
        try:
            child.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", warden.__file__, json.dumps(order)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                cwd=directory,
                env=_environment(limits, directory, variables or {}),
                start_new_session=True,
            )
            logger.info("child started lease=%s warden=%d", lease_id, child.process.pid)
            if child.reason:  # ended while it was being started
                child.end(child.reason)
            return await self._watch(child, child.process, limits)
        finally:
            try:
                if child.process is not None:
                    await _bury(child, child.process)
            finally:
                self._forget(lease_id, child)

    async def end_lease(self, lease_id: LeaseId, reason: str = "its lease ended") -> None:
        """Kill all that runs under this lease; returns when it is gone. A lease without children is fine."""
        children = tuple(self._running.get(lease_id, ()))
        for child in children:
            child.end(reason)
        for child in children:
            await child.gone.wait()  # `run` sees to it within seconds

    async def close(self) -> None:
        """Kill all children."""
        for lease_id in self.leases:
            await self.end_lease(lease_id, "its worker ends")

    async def _watch(self, child: _Child, process: asyncio.subprocess.Process, limits: ChildLimits) -> ChildEnded:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            async with asyncio.timeout(limits.time_s + _END_S):
                output, said = await asyncio.gather(
                    _tail(process.stdout, limits.output_bytes), _tail(process.stderr, _SAID_BYTES)
                )
                exit_code = await process.wait()
        except TimeoutError as exc:
            raise WorkerError(f"warden {process.pid}: didn't end its command after {limits.time_s:g} s") from exc
        reason = child.reason or said.decode(errors="replace")
        logger.info("child ended warden=%d exit_code=%d reason=%s", process.pid, exit_code, reason)
        return ChildEnded(exit_code=exit_code, output=output, reason=reason)

    def _forget(self, lease_id: LeaseId, child: _Child) -> None:
        self._running[lease_id].discard(child)
        if not self._running[lease_id]:
            del self._running[lease_id]
        child.gone.set()


async def _bury(child: _Child, process: asyncio.subprocess.Process) -> None:
    child.end("")
    if process.returncode is not None:
        return
    try:
        async with asyncio.timeout(_END_S):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the command dies with its warden
        await process.wait()


async def _tail(stream: asyncio.StreamReader, size: int) -> bytes:
    """The last `size` bytes until the stream ends."""
    kept = bytearray()
    while piece := await stream.read(1 << 16):
        kept += piece
        del kept[:-size]
    return bytes(kept)


def _environment(limits: ChildLimits, directory: Path, variables: Mapping[str, str]) -> dict[str, str]:
    base = {"PATH": os.defpath, "HOME": str(directory), "LANG": "C.UTF-8"}
    return base | dict(variables) | {"CUDA_VISIBLE_DEVICES": ",".join(limits.devices)}
