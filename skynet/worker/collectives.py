"""What the ranks of one tensor-parallel group exchange, and the forms that gradients can pass through.

Backward passes exchange too. So that every rank makes the same calls, a rank without a part returns `no_part` instead
of plain zeros, and the hidden states that enter a stage need gradients on all ranks or on none.
"""

from __future__ import annotations

from collections.abc import Iterable
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


class _BroadcastFromFirst(torch.autograd.Function):
    """Forward: rank 0's `x`. Backward: rank 0's `x` gets the sum of every rank's gradient, since each used a copy."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor | None, group: Collective, like: Tensor) -> Tensor:
        ctx.group = group
        return group.broadcast(x, root=0, like=like).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None, None, None]:
        total = ctx.group.all_reduce(grads[0].contiguous().clone())
        return None, total if ctx.group.rank == 0 else None, None, None


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


def broadcast_from_first(x: Tensor | None, group: Collective, *, like: Tensor, anchor: Tensor) -> Tensor:
    """`broadcast` of rank 0's `x`; None on the others. `anchor` needs gradients on all ranks if it does on one."""
    if torch.is_grad_enabled() and anchor.requires_grad:
        result: Tensor = _BroadcastFromFirst.apply(anchor, x, group, like)  # type: ignore[no-untyped-call]
        return result
    return group.broadcast(x, root=0, like=like)


def no_part(x: Tensor, *used_elsewhere: Tensor) -> Tensor:
    """Zeros like `x`: what a rank adds that holds nothing. Gradients of zero pass to all arguments."""
    if not torch.is_grad_enabled():
        return torch.zeros_like(x)
    nothing = torch.ones((), dtype=torch.bool, device=x.device)
    zeros = x.masked_fill(nothing, 0)
    for other in used_elsewhere:
        zeros = zeros + other.masked_fill(nothing, 0).sum()
    return zeros


def sum_gradients(parameters: Iterable[Tensor], group: Collective) -> None:
    """Replaces the gradient of each by its sum over the ranks, in one exchange; same parameters everywhere."""
    parameters = list(parameters)
    if group.size == 1 or not parameters:
        return
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    total = group.all_reduce(torch.cat([grad.flatten() for grad in grads]))
    for parameter, part in zip(parameters, torch.split(total, [grad.numel() for grad in grads]), strict=True):
        parameter.grad = part.view_as(parameter).clone()


def _differentiable(function: type[torch.autograd.Function], x: Tensor, group: Collective) -> Tensor:
    result = function.apply(x, group)  # type: ignore[no-untyped-call]
    assert isinstance(result, Tensor)
    return result
