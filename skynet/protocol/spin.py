"""When to look again at once instead of sleeping: only as long as it pays.

Waking a sleeping thread costs more than an exchange itself on idle cores; on busy ones a spinning thread takes the core
from whoever it waits for. So a wait spins for a moment, and after a few moments in vain the next waits don't.
"""

from __future__ import annotations

from typing import Final

PATIENCE: Final = 4  # waits in vain, in a row, before it rests
MAX_REST: Final = 256  # waits


class Spinner:
    """Decides for each wait. `spin_s` 0 never spins. One thread's."""

    def __init__(self, spin_s: float) -> None:
        self._spin_s = spin_s
        self._num_misses = 0
        self._rest = 0  # waits that don't spin before the next that does
        self._next_rest = PATIENCE

    def begin(self, now: float) -> float:
        """Until when this wait spins; `now` or earlier: not at all."""
        if self._rest:
            self._rest -= 1
            return 0.0
        return now + self._spin_s if self._spin_s else 0.0

    def hit(self) -> None:
        """What was waited for came while spinning."""
        self._num_misses = 0
        self._next_rest = PATIENCE

    def miss(self) -> None:
        """It didn't: the wait goes to sleep."""
        self._num_misses += 1
        if self._num_misses >= PATIENCE:
            self._rest = self._next_rest
            self._next_rest = min(MAX_REST, 2 * self._next_rest)
            self._num_misses = PATIENCE - 1  # after the rest, one miss more is enough
