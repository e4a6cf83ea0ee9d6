"""Embedding and LM head, split by vocabulary rows."""

# T tokens, D hidden size, v vocabulary rows of this rank

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from skynet.protocol.plan import Span
from skynet.worker.collectives import Collective, sum_over_ranks


class VocabEmbedding:
    """This rank's rows of the embedding; rows of others count as zero and are summed in."""

    def __init__(self, weight: Tensor, span: Span) -> None:
        self.weight = weight  # [v, D]
        self._span = span

    def __call__(self, token_ids: Tensor, group: Collective) -> Tensor:
        """token_ids: [T] int64 -> [T, D]."""
        if group.size == 1:
            return F.embedding(token_ids, self.weight)
        if not len(self._span):
            zeros = torch.zeros(
                (len(token_ids), self.weight.shape[1]), dtype=self.weight.dtype, device=self.weight.device
            )
            return sum_over_ranks(zeros, group)
        foreign = (token_ids < self._span.start) | (token_ids >= self._span.end)
        rows = F.embedding((token_ids - self._span.start).masked_fill_(foreign, 0), self.weight)
        return sum_over_ranks(rows.masked_fill_(foreign[:, None], 0), group)
