"""A stage as one rank sees it: steps in, hidden states or tokens out."""

# T tokens of the step, D hidden size, n rows that sample, v vocabulary rows of this rank

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from skynet.errors import Nonsense, StepRejected
from skynet.protocol.plan import Span, StageAssignment
from skynet.protocol.steps import RunStep
from skynet.worker.collectives import Collective
from skynet.worker.stage.adapters import AdapterTable
from skynet.worker.stage.batch import StepBatch, StepLimits, build_batch
from skynet.worker.stage.candidates import BadCandidates
from skynet.worker.stage.kv_cache import KvCache
from skynet.worker.stage.matrix import Matrix
from skynet.worker.stage.sampler import Sampled, sample


class Body(Protocol):
    """The layers of an architecture, one rank's share of a span of them."""

    nbytes: int

    def embed(self, batch: StepBatch, group: Collective) -> Tensor:
        """The step's tokens as hidden states [T, D]; first stage only."""

    def run(self, hidden: Tensor, cache: KvCache, batch: StepBatch, group: Collective) -> Tensor:
        """hidden: [T, D], equal on all ranks -> the same after this stage's layers."""

    def final_norm(self, hidden: Tensor) -> Tensor:
        """hidden: [n, D] -> what the LM head reads; last stage only."""


class Stage:
    """Weights, cache and layers of one rank; owned by its compute thread, which alone calls it."""

    def __init__(
        self,
        *,
        assignment: StageAssignment,
        limits: StepLimits,
        hidden_size: int,
        body: Body,
        head: Matrix | None,  # last stage: this rank's vocabulary rows; None if it has none
        cache: KvCache,
        adapters: AdapterTable,
        dtype: torch.dtype,
        device: torch.device,
        weight_bytes: int,
    ) -> None:
        self.assignment = assignment
        self.limits = limits
        self.cache = cache
        self.adapters = adapters
        self.dtype = dtype
        self.device = device
        self.weight_bytes = weight_bytes
        self._hidden_size = hidden_size
        self._body = body
        self._head = head

    def with_fresh_cache(self, assignment: StageAssignment) -> Stage:
        """The same weights in a new epoch: another place in the layout and an empty cache of its size."""
        num_blocks, block_size = assignment.num_blocks, assignment.block_size
        return Stage(
            assignment=assignment,
            limits=dataclasses.replace(self.limits, num_blocks=num_blocks, block_size=block_size),
            hidden_size=self._hidden_size,
            body=self._body,
            head=self._head,
            cache=self.cache.like(num_blocks, block_size),
            adapters=self.adapters,
            dtype=self.dtype,
            device=self.device,
            weight_bytes=self.weight_bytes,
        )

    @property
    def hidden_size(self) -> int:
        return self._hidden_size

    @property
    def kv_bytes(self) -> int:
        """Bytes set aside for keys and values."""
        return self.cache.nbytes

    def check(self, step: RunStep, hidden: Tensor | None = None) -> StepBatch:
        """The step laid out for `run_batch`. Raises StepRejected if it doesn't fit this stage; changes nothing."""
        batch = build_batch(step, self.limits, self.adapters.ids(), self.device)
        if not self.assignment.is_first:
            self._check_hidden(step, hidden, batch.num_tokens)
        return batch

    def run(self, step: RunStep, hidden: Tensor | None, group: Collective) -> Tensor | Sampled | None:
        """One forward pass of this stage; every rank of the group calls it with the same step.

        hidden: [T, D] in the model's dtype, from the stage before; None on the first. Returns hidden states [T, D],
        or on the last stage what was sampled, in order of the parts that sample, at rank 0, and None at the others.
        Writes the step's keys and values into the cache. Raises StepRejected before anything is changed, and what the
        group raises.
        """
        return self.run_batch(self.check(step, hidden), hidden, group)

    @torch.inference_mode()
    def run_batch(self, batch: StepBatch, hidden: Tensor | None, group: Collective) -> Tensor | Sampled | None:
        """`run` for a step that `check` has laid out."""
        hidden = self.forward(batch, hidden, group)
        if not self.assignment.is_last:
            return hidden
        if not batch.samples:
            return Sampled(()) if group.rank == 0 else None
        logits = self.logits(hidden, [wanted.row for wanted in batch.samples])
        try:
            return sample(logits, batch.samples, self.vocab, group, self.limits.vocab_size)
        except BadCandidates as exc:
            raise Nonsense(str(exc), self.assignment.group[exc.rank]) from exc

    def forward(self, batch: StepBatch, hidden: Tensor | None, group: Collective) -> Tensor:
        """The layers alone: hidden states [T, D] after this stage.

        Called while torch records gradients, it is a training pass of lean layers: gradients reach `hidden` and the
        adapters' matrices, the model's weights stay frozen, every sequence must be whole (StepRejected), and the cache
        is neither read nor written. Of an adapter cut by `shard_adapter`, each rank gets its part of the gradient:
        `sum_gradients` adds them up. GPT-2's layers raise UnsupportedArchitecture.
        """
        if self.assignment.is_first:
            hidden = self._body.embed(batch, group)
        assert hidden is not None, "check() refuses a later stage's step without hidden states"
        return self._body.run(hidden.to(self.device), self.cache, batch, group)

    def logits(self, hidden: Tensor, rows: Sequence[int]) -> Tensor:
        """This rank's logits [n, v] of the given rows of hidden states [T, D].

        For gradients over several ranks, give it `copy_to_ranks(hidden, group)`.
        """
        if list(rows) != list(range(len(hidden))):
            hidden = hidden[torch.tensor(rows, dtype=torch.int64, device=hidden.device)]
        if self._head is None:
            return hidden[:, :0]
        return self._head(self._body.final_norm(hidden))

    @property
    def vocab(self) -> Span:
        """The vocabulary rows whose logits this rank computes."""
        return self.assignment.share.vocab

    def _check_hidden(self, step: RunStep, hidden: Tensor | None, num_tokens: int) -> None:
        expected = (num_tokens, self._hidden_size)
        if hidden is None or tuple(hidden.shape) != expected or hidden.dtype != self.dtype:
            seen = "none" if hidden is None else f"{hidden.dtype}{list(hidden.shape)}"
            raise StepRejected(
                f"step {step.step}: needs hidden states {self.dtype}{list(expected)} from the stage before, got {seen}"
            )
