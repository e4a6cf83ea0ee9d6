"""What the commands share: sizes in words, errors, and logging."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Coroutine
from typing import Any, NoReturn, TypeVar

import typer

logger = logging.getLogger(__name__)
T = TypeVar("T")
EXIT_WRONG_FILE = 2
EXIT_BROKEN_PIPE = 141  # as a shell shows a process that SIGPIPE ended
SIZE = re.compile(r"(?i)^\s*([0-9]+(?:\.[0-9]+)?)\s*(b|kb|mb|gb|tb|kib|mib|gib|tib|k|m|g|t|ki|mi|gi|ti)?\s*$")
FACTORS = {"": 1, "b": 1} | {
    unit + suffix: base**power
    for power, letter in enumerate("kmgt", start=1)
    for unit, base, suffixes in ((letter, 1000, ("", "b")), (letter + "i", 1024, ("", "b")))
    for suffix in suffixes
}


def parse_size(text: str | None) -> int | None:
    """`8GiB`, `500MB` or plain bytes as bytes."""
    if text is None:
        return None
    found = SIZE.match(text)
    if not found:
        raise typer.BadParameter(f"{text!r} isn't a size; write for example 8GiB or 500MB")
    return int(float(found[1]) * FACTORS[(found[2] or "").lower()])


def fail(exc: BaseException) -> NoReturn:
    """One line on stderr and the error's exit code; an error that isn't ours is a bug and shows its traceback."""
    from skynet.errors import SkyNetError

    while isinstance(exc, BaseExceptionGroup) and (len(exc.exceptions) == 1 or exc.split(SkyNetError)[1] is None):
        exc = exc.exceptions[0]
    if isinstance(exc, BrokenPipeError) and exc.filename is None:
        # Whoever read our output has gone (`| head`); what is buffered must not fail once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_BROKEN_PIPE)
    if isinstance(exc, SkyNetError):
        typer.echo(f"error: {exc}", err=True)
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


def set_up_logging(verbosity: str) -> None:
    """One event per line on stderr, facts as key=value."""
    logging.basicConfig(
        level=verbosity.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)-7s %(name)s %(message)s"
    )
    for noisy in ("asyncio", "httpx", "httpcore", "alembic", "filelock", "zeroconf"):
        logging.getLogger(noisy).setLevel("WARNING")


def run_async(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on uvloop where there is one."""
    import asyncio

    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    return uvloop.run(main)
