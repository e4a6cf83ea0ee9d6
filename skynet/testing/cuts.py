"""Silent cuts of TCP connections between two processes on loopback: their packets vanish, later connections work.

Needs root and Linux's `nft`; `missing()` says in words what isn't there. The rules stand in a table of their own that
the kernel removes when its owner, an `nft` process that we keep, ends: nothing is left behind, however a test ends.

    with Cuts() as cuts:
        cuts.cut(worker.pid, coordinator.pid)
"""

from __future__ import annotations

import itertools
import os
import re
import selectors
import shutil
import subprocess
import time
from types import TracebackType
from typing import Final, Self

import psutil

from skynet.errors import SkyNetError

ANSWER_S: Final = 10.0
_names: Final = itertools.count()
_RULES: Final = """\
add table inet {name} {{ flags owner; }}
add set inet {name} cut {{ type inet_service . inet_service; }}
add chain inet {name} input {{ type filter hook input priority filter; policy accept; }}
add rule inet {name} input iifname "lo" tcp sport . tcp dport @cut drop
"""


class CutError(SkyNetError):
    """The system refused to cut a connection; the text is what it said."""


def missing() -> str | None:
    """Why connections can't be cut here; None if they can."""
    if shutil.which("nft") is None:
        return "there is no `nft` command here"
    try:
        with Cuts():
            return None
    except CutError as exc:
        return f"packet filters aren't permitted here: {exc}"


class Cuts:
    """The connections that are cut now. A context manager; `close` works twice."""

    def __init__(self) -> None:
        self._name = f"skynet_test_{os.getpid()}_{next(_names)}"
        self._nft = subprocess.Popen(
            ["nft", "-i"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            self._tell(_RULES.format(name=self._name))
        except CutError:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def cut(self, pid: int, other_pid: int) -> int:
        """Lose the packets of every connection that these two processes have now; how many there were."""
        pairs = _port_pairs(pid, other_pid)
        if pairs:
            both = [pair for near, far in pairs for pair in (f"{near} . {far}", f"{far} . {near}")]
            self._tell(f"add element inet {self._name} cut {{ {', '.join(both)} }}\n")
        return len(pairs)

    def mend(self) -> None:
        """Let all packets through again."""
        self._tell(f"flush set inet {self._name} cut\n")

    def close(self) -> None:
        """Undo everything."""
        if self._nft.poll() is None:
            self._nft.kill()
        self._nft.wait(ANSWER_S)
        for pipe in (self._nft.stdin, self._nft.stdout):
            if pipe is not None and not pipe.closed:
                pipe.close()

    def _tell(self, commands: str) -> None:
        """Have `nft` do this and wait until it has: it says nothing when it succeeds, so the table is listed behind."""
        assert self._nft.stdin is not None
        assert self._nft.stdout is not None
        try:
            self._nft.stdin.write(f"{commands}list chain inet {self._name} input\n")
            self._nft.stdin.flush()
        except BrokenPipeError as exc:
            raise CutError(f"nft ended with {self._nft.wait(ANSWER_S)}") from exc
        heard, deadline = "", time.monotonic() + ANSWER_S
        with selectors.DefaultSelector() as selector:
            selector.register(self._nft.stdout, selectors.EVENT_READ)
            while not heard.endswith("}\n}\n"):
                if not selector.select(deadline - time.monotonic()):
                    raise CutError(f"nft didn't answer within {ANSWER_S:.0f} s: {heard!r}")
                piece = os.read(self._nft.stdout.fileno(), 65536).decode()
                heard += piece
                if not piece or re.search(r"(Error: .+|not permitted.*)\n", heard):
                    raise CutError(heard.strip() or "nft ended")


def _port_pairs(pid: int, other_pid: int) -> set[tuple[int, int]]:
    """Both ends' ports of the connections between two processes, each once."""
    near, far = (
        {(c.laddr.port, c.raddr.port) for c in psutil.Process(p).net_connections(kind="tcp") if c.raddr}
        for p in (pid, other_pid)
    )
    return {pair for pair in near if (pair[1], pair[0]) in far}
