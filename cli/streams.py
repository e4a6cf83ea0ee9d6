"""The three standard streams, when they are closed, full or nobody reads them."""

from __future__ import annotations

import io
import os
import sys


def set_up_streams() -> None:
    """Call first: missing descriptors are opened on nothing, before a socket gets their numbers.

    From then on an output that can't be written is an OSError that names it; what can't be said on stderr is unsaid.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
    sys.stdin = sys.stdin or open(0, encoding="utf-8", closefd=False)  # noqa: SIM115, open as long as we run
    sys.stdout = _Output(1, "standard output", sys.stdout)
    sys.stderr = _Output(2, None, sys.stderr)


class _Output(io.TextIOWrapper):
    def __init__(self, descriptor: int, name: str | None, replaced: object) -> None:
        super().__init__(
            open(descriptor, "wb", closefd=False),  # noqa: SIM115
            encoding=getattr(replaced, "encoding", None) or "utf-8",
            errors=getattr(replaced, "errors", None) or "backslashreplace",
            line_buffering=name is None or os.isatty(descriptor),
        )
        self._descriptor, self._name = descriptor, name

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError as exc:
            self._give_up(exc)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as exc:
            self._give_up(exc)

    def _give_up(self, exc: OSError) -> None:
        """What is still buffered must not fail once more, at exit at the latest."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._descriptor)
        if self._name is None:
            return
        if isinstance(exc, BrokenPipeError):
            raise exc
        raise OSError(exc.errno, exc.strerror, self._name) from exc
