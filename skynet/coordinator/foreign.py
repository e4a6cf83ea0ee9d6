"""Words of peers that reach our log, our status, or other peers."""

from __future__ import annotations

from typing import Final

MAX_CHARS: Final = 1000


def foreign_text(text: str, limit: int = MAX_CHARS) -> str:
    """One line, bounded, and without what a terminal would obey."""
    shown = "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."
