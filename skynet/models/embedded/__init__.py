"""The embedded model: small, ships with the package, and is the default, so that the first command works offline."""

from __future__ import annotations

from pathlib import Path
from typing import Final

EMBEDDED_NAME: Final = "embedded"
EMBEDDED_DIR: Final = Path(__file__).parent
