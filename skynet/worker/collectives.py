"""What the ranks of one tensor-parallel group exchange, and the forms that gradients can pass through."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Collective(Protocol):
    """The ranks of one stage, in one epoch. Every rank makes the same calls in the same order.

    Each call blocks until it is done, up to the group's own deadline: then it raises WorkerTimeout or WorkerLost, and
    StepAborted when it was ended on purpose, Nonsense when a rank sent what can't be used. Results never share memory
    with arguments that the caller still changes.
    """

    @property
    def rank(self) -> int:
        """This member, from 0."""

    @property
    def size(self) -> int:
        """How many ranks there are."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The elementwise sum of every rank's `x` (same shape and dtype everywhere), taken in rank order.

        Bitwise equal on all ranks. `x` may be overwritten and returned.
        """

    def gather(self, x: Tensor, root: int = 0) -> list[Tensor] | None:
        """Every rank's `x` in rank order at `root`, None elsewhere. Shapes may differ between ranks, dtypes may not."""

    def broadcast(self, x: Tensor | None, root: int = 0, *, like: Tensor) -> Tensor:
        """`root`'s `x` on every rank. `like` states its shape and dtype; its values aren't read (it may be empty)."""


class SoloGroup:
    """A group of one: nothing travels."""

    rank = 0
    size = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        """`x` itself."""
        return x

    def gather(self, x: Tensor, root: int = 0) -> list[Tensor] | None:
        """`x` alone."""
        return [x]

    def broadcast(self, x: Tensor | None, root: int = 0, *, like: Tensor) -> Tensor:
        """`x` itself."""
        if x is None:
            raise ValueError("a group of one broadcasts its own tensor, got None")
        return x


class _SumOverRanks(torch.autograd.Function):
    """Forward: all-reduce. Backward: identity, since what follows the sum runs equally on every rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Collective) -> Tensor:
        return group.all_reduce(x.clone())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _CopyToRanks(torch.autograd.Function):
    """Forward: identity. Backward: all-reduce, since each rank's shard adds to the gradient of what all read."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Collective) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.group.all_reduce(grads[0].contiguous().clone()), None


def sum_over_ranks(x: Tensor, group: Collective) -> Tensor:
    """`all_reduce` where a row-parallel matrix ends; differentiable when gradients are recorded."""
    if group.size == 1:
        return x
    if torch.is_grad_enabled() and x.requires_grad:
        return _differentiable(_SumOverRanks, x, group)
    return group.all_reduce(x)


def copy_to_ranks(x: Tensor, group: Collective) -> Tensor:
    """The input of a column-parallel matrix: itself, with gradients summed over the ranks on the way back."""
    if group.size == 1 or not (torch.is_grad_enabled() and x.requires_grad):
        return x
    return _differentiable(_CopyToRanks, x, group)


def _differentiable(function: type[torch.autograd.Function], x: Tensor, group: Collective) -> Tensor:
    result = function.apply(x, group)  # type: ignore[no-untyped-call]
    assert isinstance(result, Tensor)
    return result
