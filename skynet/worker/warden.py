"""Runs one command of somebody else's under limits. A program of its own: `children.py` starts it, by its path.

It stands between the worker and the command: whatever the command starts is among its descendants, and stays so when it
is orphaned. When the worker's end of standard input closes (also because the worker was killed), when a limit is passed
or when the command ends, all descendants are killed. Only the standard library and Linux are needed.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from typing import NoReturn

LIMIT_PASSED = 70  # exit status; standard error says which
TICK_S = 0.1
_KILL_S = 2.0
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def main() -> NoReturn:
    """argv: {"command", "memory_bytes", "time_s"} as JSON. The command writes to our standard output, we to error."""
    order = json.loads(sys.argv[1])
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)

    def limit() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        _, most = resource.getrlimit(resource.RLIMIT_DATA)  # of memory that a process may write to
        memory = order["memory_bytes"] if most == resource.RLIM_INFINITY else min(order["memory_bytes"], most)
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.nice(10)  # the worker goes first

    deadline = time.monotonic() + order["time_s"]
    try:
        child = subprocess.Popen(
            order["command"], stdin=subprocess.DEVNULL, stderr=1, start_new_session=True, preexec_fn=limit
        )
    except (OSError, subprocess.SubprocessError) as exc:
        _end(LIMIT_PASSED, f"can't be started: {exc}")
    while True:
        ended = _reap(child.pid)
        if ended is not None:
            _end(ended, "")
        if (used := used_bytes(order["memory_bytes"])) > order["memory_bytes"]:
            _end(LIMIT_PASSED, f"used {used} bytes of memory, {order['memory_bytes']} are lent")
        if time.monotonic() >= deadline:
            _end(LIMIT_PASSED, f"ran for {order['time_s']:g} s, longer isn't lent")
        if select.select([0], [], [], TICK_S)[0]:
            _end(LIMIT_PASSED, "")


def descendants() -> list[int]:
    """Processes that are ours, and theirs."""
    found, todo = [], [os.getpid()]
    while todo:
        folder = f"/proc/{todo.pop()}/task"
        with contextlib.suppress(OSError):  # gone meanwhile
            for task in os.listdir(folder):
                with open(f"{folder}/{task}/children") as file:
                    children = [int(pid) for pid in file.read().split()]
                found += children
                todo += children
    return found


def used_bytes(lent: int) -> int:
    """Memory of all descendants; what they share counts once, but that is looked at only if it decides."""
    pids = descendants()
    resident = sum(_resident(pid) for pid in pids)
    return resident if resident <= lent else sum(_proportional(pid) for pid in pids)


def _resident(pid: int) -> int:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * _PAGE_BYTES
    return 0


def _proportional(pid: int) -> int:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/smaps_rollup") as file:
        return 1024 * sum(int(line.split()[1]) for line in file if line.startswith("Pss:"))
    return 0


def _reap(wanted: int) -> int | None:
    """Collects who ended; the exit status of `wanted` if it is among them, 128 + number after a signal."""
    status = None
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == wanted:
                code = os.waitstatus_to_exitcode(ended[1])
                status = code if code >= 0 else 128 - code
    return status


def _end(status: int, why: str) -> NoReturn:
    """Kill all descendants, again until none is left: they may be starting others."""
    deadline = time.monotonic() + _KILL_S
    while (pids := descendants()) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _reap(0)
        time.sleep(0.001)
    if why:
        os.write(2, why.encode())
    os._exit(status)


if __name__ == "__main__":
    main()
