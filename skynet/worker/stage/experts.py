"""A mixture of experts: every rank holds some columns of each expert; rank 0 decides who computes what."""

# T tokens, D hidden size, k experts per token, e expert columns of this rank

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from skynet.worker.collectives import Collective, broadcast_from_first, no_part
from skynet.worker.stage.batch import StepBatch
from skynet.worker.stage.lean import times
from skynet.worker.stage.matrix import Matrix


class Router:
    """Scores experts. Only rank 0 has the weights: unlike machines might break a tie differently."""

    def __init__(self, weight: Matrix | None, per_token: int, normalises: bool) -> None:
        self._weight = weight  # [experts, D] at rank 0
        self._per_token = per_token
        self._normalises = normalises
        self.nbytes = 0 if weight is None else weight.nbytes

    def __call__(self, x: Tensor, group: Collective) -> tuple[Tensor, Tensor]:
        """x: [T, D] -> expert ids [T, k] int64 and their weights [T, k] float32, equal on all ranks."""
        decision = None if self._weight is None else self._decide(self._weight(x))
        if group.size > 1:
            like = torch.empty((2, x.shape[0], self._per_token), dtype=torch.float32, device=x.device)
            decision = broadcast_from_first(decision, group, like=like, anchor=x)
        assert decision is not None
        return decision[0].to(torch.int64), decision[1]

    def _decide(self, logits: Tensor) -> Tensor:
        """logits: [T, experts] -> [2, T, k] float32: ids (exact below 2^24) and weights."""
        chosen, ids = torch.topk(torch.softmax(logits, -1, dtype=torch.float32), self._per_token, -1)
        if self._normalises:
            chosen = chosen / chosen.sum(-1, keepdim=True)
        return torch.stack((ids.to(torch.float32), chosen.to(logits.dtype).to(torch.float32)))


class ExpertMlp:
    """Runs each token through its experts."""

    def __init__(
        self,
        router: Router,
        gate_up: Sequence[Matrix],  # per expert [2e, D]; empty where this rank has no expert columns
        down: Sequence[Matrix],  # per expert [D, e]
        activation: Callable[[Tensor], Tensor],
    ) -> None:
        self._router = router
        self._gate_up = gate_up
        self._down = down
        self._activation = activation
        self.nbytes = router.nbytes + sum(matrix.nbytes for matrix in (*gate_up, *down))

    def __call__(self, x: Tensor, batch: StepBatch, group: Collective) -> Tensor:
        """x: [T, D], normed -> this rank's part of the sum, [T, D]."""
        ids, weights = self._router(x, group)
        if not self._gate_up:
            return no_part(x, weights)
        out = torch.zeros_like(x)
        weights = weights.to(x.dtype)
        for expert in torch.unique(ids).tolist():
            row, choice = torch.where(ids == expert)
            gate, up = self._gate_up[expert](x[row]).chunk(2, -1)
            result = self._down[expert](times(self._activation(gate), up))
            out.index_add_(0, row, result * weights[row, choice, None])
        return out
