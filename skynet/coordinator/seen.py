"""Which tokens a sequence has seen, for its penalties: a pure function of its token ids, kept up as they grow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from skynet.protocol.steps import MAX_SEEN, Penalties, SeenTokens


class Tally:
    """The distinct tokens of one sequence and how often each is in its answer.

    Of more than MAX_SEEN distinct tokens those count that came first. Without a repetition penalty the prompt's don't.
    """

    def __init__(self, penalties: Penalties, num_prompt: int) -> None:
        self._has_counts = penalties.counts_answer
        self._num_prompt = num_prompt
        self._num_read = 0 if penalties.repetition != 1 else num_prompt
        self._ids = np.empty(0, "<u4")  # ascending
        self._counts = np.empty(0, "<u4")  # of each, in the answer

    def after(self, token_ids: Sequence[int]) -> SeenTokens:
        """What was seen by now: `token_ids` are those of the last call, and perhaps more behind them."""
        if self._num_read < self._num_prompt:
            ids, firsts = np.unique(np.array(token_ids[: self._num_prompt], "<u4"), return_index=True)
            self._ids = np.sort(ids[np.argsort(firsts)[:MAX_SEEN]])
            self._counts = np.zeros_like(self._ids)
            self._num_read = self._num_prompt
        for token_id in token_ids[self._num_read :]:
            self._count(token_id)
        self._num_read = len(token_ids)
        return SeenTokens(ids=self._ids.tobytes(), counts=self._counts.tobytes() if self._has_counts else b"")

    def _count(self, token_id: int) -> None:
        at = int(np.searchsorted(self._ids, token_id))
        if at == len(self._ids) or self._ids[at] != token_id:
            if len(self._ids) == MAX_SEEN:
                return
            self._ids = np.insert(self._ids, at, token_id)
            self._counts = np.insert(self._counts, at, 0)
        self._counts[at] += 1
