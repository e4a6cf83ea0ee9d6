"""Ranks in threads: sums in rank order, gradients through them, and no wait without an end."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from skynet.errors import WorkerTimeout
from skynet.testing.loopback import LoopbackGroup, run_ranks
from skynet.worker.collectives import SoloGroup, copy_to_ranks, sum_over_ranks


def test_sums_are_taken_in_rank_order_and_equal_on_all_ranks() -> None:
    parts = [torch.tensor([1e8, 1.0]), torch.tensor([1.0, 2.0]), torch.tensor([-1e8, 4.0])]
    results = run_ranks(LoopbackGroup.create(3), lambda group: group.all_reduce(parts[group.rank].clone()))
    expected = (parts[0] + parts[1]) + parts[2]
    assert expected[0] == 0  # another order would give 1
    assert all(torch.equal(result, expected) for result in results)


def test_gather_takes_unequal_shapes_to_the_root_alone() -> None:
    results = run_ranks(LoopbackGroup.create(3), lambda group: group.gather(torch.full((group.rank,), 7.0), root=1))
    assert results[0] is None
    assert results[2] is None
    assert [len(part) for part in results[1] or ()] == [0, 1, 2]


def test_broadcast_gives_everyone_a_copy_of_the_roots_tensor() -> None:
    sent, like = torch.arange(4.0), torch.empty(4)
    results = run_ranks(
        LoopbackGroup.create(2), lambda group: group.broadcast(sent if group.rank == 1 else None, root=1, like=like)
    )
    results[0].zero_()
    assert torch.equal(results[1], torch.arange(4.0))


def test_a_rank_that_stays_away_ends_the_others_wait() -> None:
    groups = LoopbackGroup.create(2, timeout_s=0.05)
    with pytest.raises(WorkerTimeout, match="rank 0 of 2"):
        groups[0].all_reduce(torch.zeros(1))


def test_an_error_of_one_rank_is_what_the_caller_sees() -> None:
    def work(group: LoopbackGroup) -> Tensor:
        if group.rank == 1:
            raise KeyError("rank 1 failed")
        return group.all_reduce(torch.zeros(1))

    with pytest.raises(KeyError, match="rank 1 failed"):
        run_ranks(LoopbackGroup.create(2), work)


def test_gradients_through_a_split_layer_equal_those_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    x0, up0, down0 = (torch.randn(shape, generator=generator) for shape in ((3, 6), (10, 6), (6, 10)))

    def loss(weights: list[Tensor], group: LoopbackGroup | SoloGroup) -> Tensor:
        x, up, down = weights
        inner = F.silu(F.linear(copy_to_ranks(x, group), up))
        return (x + sum_over_ranks(F.linear(inner, down), group)).square().sum()

    whole = [t.clone().requires_grad_() for t in (x0, up0, down0)]
    loss(whole, SoloGroup()).backward()

    def work(group: LoopbackGroup) -> list[Tensor]:
        columns = slice(0, 7) if group.rank == 0 else slice(7, 10)
        mine = [t.clone().requires_grad_() for t in (x0, up0[columns], down0[:, columns])]
        loss(mine, group).backward()
        return [t.grad for t in mine if t.grad is not None]

    first, second = run_ranks(LoopbackGroup.create(2), work)
    expected = [t.grad for t in whole if t.grad is not None]
    assert torch.allclose(first[0], expected[0], atol=1e-4)
    assert torch.equal(first[0], second[0])
    assert torch.allclose(torch.cat((first[1], second[1])), expected[1], atol=1e-4)
    assert torch.allclose(torch.cat((first[2], second[2]), 1), expected[2], atol=1e-4)
    assert expected[0].abs().max() > 1
