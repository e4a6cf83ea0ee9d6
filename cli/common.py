"""What the commands share: sizes in words, errors, and logging."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Coroutine
from typing import Any, NoReturn, TypeVar

import typer

T = TypeVar("T")
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

    if isinstance(exc, BaseExceptionGroup):
        ours, others = exc.split(SkyNetError)
        if others is None and ours is not None:
            exc = next(iter(ours.exceptions))
            while isinstance(exc, BaseExceptionGroup):
                exc = exc.exceptions[0]
    if not isinstance(exc, SkyNetError):
        raise exc
    typer.echo(f"error: {exc}", err=True)
    sys.exit(exc.exit_code)


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
