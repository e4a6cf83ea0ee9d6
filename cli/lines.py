"""Lines that a user types, without holding up the event loop or the end of the process."""

from __future__ import annotations

import asyncio
import os
import select
import sys
import threading

POLL_S = 0.1  # how long an interrupted command may wait for the thread that reads


class Lines:
    """Reads stdin line by line. A thread that waits for the user ends with whoever waits for it."""

    def __init__(self) -> None:
        self._descriptor = sys.stdin.fileno()
        self._read = b""

    async def next(self) -> str:
        """The next line, stripped; empty at the end of input."""
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        is_over = threading.Event()
        try:
            return await asyncio.to_thread(self._next, is_over)
        finally:
            is_over.set()

    def _next(self, is_over: threading.Event) -> str:
        while b"\n" not in self._read:
            if is_over.is_set():
                return ""
            if select.select([self._descriptor], [], [], POLL_S)[0]:
                if not (more := os.read(self._descriptor, 1 << 16)):
                    break
                self._read += more
        line, _, self._read = self._read.partition(b"\n")
        return line.decode("utf-8", errors="replace").strip()
