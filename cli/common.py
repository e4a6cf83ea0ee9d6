"""What the commands share: sizes in words, errors, and logging."""

from __future__ import annotations

import logging
import re
import signal
import sys
from collections.abc import Coroutine
from typing import Any, NoReturn, TextIO, TypeVar

import typer

logger = logging.getLogger(__name__)
T = TypeVar("T")
EXIT_WRONG_FILE = 2
EXIT_BROKEN_PIPE = 141  # whoever read our output has gone (`| head`); as a shell shows what SIGPIPE ended
EXIT_TERMINATED = 143  # by SIGTERM
# What moves a terminal's cursor, changes its settings or the order in which it shows text; tabs and newlines are fine.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
SIZE = re.compile(r"(?i)^\s*([0-9]+(?:\.[0-9]+)?)\s*(b|kb|mb|gb|tb|kib|mib|gib|tib|k|m|g|t|ki|mi|gi|ti)?\s*$")
FACTORS = {"": 1, "b": 1} | {
    unit + suffix: base**power
    for power, letter in enumerate("kmgt", start=1)
    for unit, base, suffixes in ((letter, 1000, ("", "b")), (letter + "i", 1024, ("", "b")))
    for suffix in suffixes
}


def printable(text: str) -> str:
    """Text of others, safe to show: an escape sequence can be read, and isn't obeyed."""
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def printable_line(text: str) -> str:
    """The same in one line, so that nobody's text looks like a line of ours."""
    return printable(text).replace("\n", "\\n")


def parse_size(text: str | None, option: str) -> int | None:
    """`8GiB`, `500MB` or plain bytes as bytes, as given by this option."""
    if text is None:
        return None
    found = SIZE.match(text)
    if not found:
        raise typer.BadParameter(f"{text!r} isn't a size; write for example 8GiB or 500MB", param_hint=option)
    return int(float(found[1]) * FACTORS[(found[2] or "").lower()])


def fail(exc: BaseException) -> NoReturn:
    """One line on stderr and the error's exit code; an error that isn't ours is a bug and shows its traceback."""
    from skynet.errors import SkyNetError

    while isinstance(exc, BaseExceptionGroup) and (len(exc.exceptions) == 1 or exc.split(SkyNetError)[1] is None):
        exc = exc.exceptions[0]
    if isinstance(exc, BrokenPipeError) and exc.filename is None:
        sys.exit(EXIT_BROKEN_PIPE)
    if isinstance(exc, SkyNetError):
        typer.echo(f"error: {printable(str(exc))}", err=True)
        sys.exit(exc.exit_code)
    if isinstance(exc, OSError) and exc.filename is not None:
        logger.debug("a file couldn't be used", exc_info=exc)
        typer.echo(f"error: {exc.filename}: {exc.strerror}; check its permissions or name another place", err=True)
        sys.exit(EXIT_WRONG_FILE)
    raise exc


def read_stdin() -> str:
    """All of stdin as text. Raises ConfigError for what isn't UTF-8."""
    from skynet.errors import ConfigError

    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as exc:
        raise ConfigError(
            f"stdin: byte {exc.start} isn't UTF-8 text; a prompt is text, not a file of another kind"
        ) from exc


class _Handler(logging.StreamHandler[TextIO]):
    """Writes to what stderr is at the moment: while a progress bar is shown, above the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class _Formatter(logging.Formatter):
    """One event is one line, whatever a peer's text in it contains; a traceback keeps its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802, the library's name
        return printable_line(super().formatMessage(record))


def set_up_warnings() -> None:
    """For commands without a log: warnings appear on stderr as bare words."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_Formatter("%(message)s"))


def set_up_logging(verbosity: str) -> None:
    """One event per line on stderr, facts as key=value."""
    handler = _Handler(sys.stderr)
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)-7s %(name)s %(message)s"))
    logging.basicConfig(level=verbosity.upper(), handlers=[handler])
    for noisy in ("asyncio", "httpx", "httpcore", "alembic", "filelock", "zeroconf"):
        logging.getLogger(noisy).setLevel("WARNING")


def run_async(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on uvloop where there is one. SIGTERM ends it as Ctrl-C does, with an exit code of its own."""
    import asyncio

    try:
        import uvloop
    except ImportError:
        return asyncio.run(_until_terminated(main))
    return uvloop.run(_until_terminated(main))


async def _until_terminated(main: Coroutine[Any, Any, T]) -> T:
    """What runs may handle the signal in its own way instead, as coordinator and worker do."""
    import asyncio

    is_terminated = False
    task = asyncio.current_task()
    assert task is not None

    def terminate() -> None:
        nonlocal is_terminated
        is_terminated = True
        task.cancel()

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminate)
    try:
        return await main
    except asyncio.CancelledError:
        if not is_terminated:
            raise
        raise SystemExit(EXIT_TERMINATED) from None
