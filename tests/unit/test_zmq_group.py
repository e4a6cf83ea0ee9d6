"""Collectives over real sockets equal a plain sum in rank order, bit for bit, on every rank."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest
import torch
import zmq
from torch import Tensor

from skynet.errors import MalformedMessage
from skynet.protocol.channel import DataChannel
from skynet.protocol.ids import PeerId
from skynet.protocol.plan import Epoch
from skynet.protocol.sockets import SocketFactory
from skynet.worker.zmq_group import ZmqGroup, recv_hidden, send_hidden, sum_in_order

T = TypeVar("T")
EPOCH = Epoch(1, 1)
MAX_RANKS = 4


class Ranks:
    """Up to four workers in one process, linked all to all, each channel on its own thread."""

    def __init__(self) -> None:
        self.peers = [PeerId(f"rank{i}.cpu") for i in range(MAX_RANKS)]
        self.factories = [SocketFactory(*zmq.curve_keypair()) for _ in self.peers]
        self.threads = [ThreadPoolExecutor(1) for _ in self.peers]
        for mine in self.factories:
            for peer, other in zip(self.peers, self.factories, strict=True):
                if other is not mine:
                    mine.allow(other.public_key, peer, {"data"})
        self.channels: list[DataChannel] = self.everywhere(lambda i: DataChannel(self.factories[i], ["127.0.0.1"]))
        self.everywhere(self._link)
        self.step = 0

    def _link(self, rank: int) -> None:
        others = [i for i in range(MAX_RANKS) if i != rank]
        for i in others:
            address = ("127.0.0.1", self.channels[i].port)
            self.channels[rank].dial(self.peers[i], self.factories[i].public_key, [address])
        self.channels[rank].await_links([self.peers[i] for i in others], time.monotonic() + 10)

    def everywhere(self, work: Callable[[int], T], size: int = MAX_RANKS) -> list[T]:
        futures = [self.threads[i].submit(work, i) for i in range(size)]
        return [future.result(30) for future in futures]

    def groups(self, size: int, scatter_bytes: int) -> list[ZmqGroup]:
        self.step += 1
        members = self.peers[:size]
        groups = [ZmqGroup(self.channels[i], members, i, EPOCH, scatter_bytes=scatter_bytes) for i in range(size)]
        for group in groups:
            group.begin_step(self.step, timeout_s=20)
        return groups

    def close(self) -> None:
        self.everywhere(lambda i: self.channels[i].close())
        for factory, thread in zip(self.factories, self.threads, strict=True):
            thread.shutdown()
            factory.close()


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    torch.set_num_threads(1)
    built = Ranks()
    yield built
    built.close()


def addends(size: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(size)
    return [(torch.randn(shape, generator=generator) * 10**i).to(dtype) for i in range(size)]


@pytest.mark.parametrize("is_scattered", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_all_reduce_equals_the_plain_sum_on_every_rank(
    ranks: Ranks, size: int, dtype: torch.dtype, is_scattered: bool
) -> None:
    groups = ranks.groups(size, 0 if is_scattered else 1 << 40)
    for shape in ((1, 1), (3, 67), (1, 2), (0, 5), (129, 1031)):
        parts = addends(size, shape, dtype)
        expected = sum_in_order(parts) if size > 1 else parts[0]
        got = ranks.everywhere(lambda i, parts=parts: groups[i].all_reduce(parts[i].clone()), size)  # type: ignore[misc]
        for result in got:
            assert torch.equal(result, expected)


def test_half_precision_sum_is_rounded_once() -> None:
    parts = [torch.tensor([256.0], dtype=torch.bfloat16)] + [torch.tensor([0.75], dtype=torch.bfloat16)] * 3
    assert sum_in_order(parts).item() == 258.0  # rounding after each addend would stay at 256


@pytest.mark.parametrize("root", [0, 2])
def test_gather_brings_uneven_parts_in_rank_order(ranks: Ranks, root: int) -> None:
    groups = ranks.groups(3, 0)
    parts = [torch.full((2, i * 3), float(i), dtype=torch.bfloat16) for i in range(3)]
    got = ranks.everywhere(lambda i: groups[i].gather(parts[i], root), 3)
    for i, result in enumerate(got):
        if i != root:
            assert result is None
    gathered = got[root]
    assert gathered is not None
    assert all(torch.equal(a, b) for a, b in zip(gathered, parts, strict=True))


def test_broadcast_carries_tokens_from_one_rank(ranks: Ranks) -> None:
    groups = ranks.groups(4, 0)
    tokens = torch.tensor([7, 2**40, -1])
    got = ranks.everywhere(
        lambda i: groups[i].broadcast(tokens if i == 1 else None, 1, like=torch.empty(3, dtype=torch.int64)), 4
    )
    assert all(torch.equal(result, tokens) for result in got)


def test_hidden_states_reach_the_next_stage(ranks: Ranks) -> None:
    hidden = torch.randn(5, 33).bfloat16()
    deadline = time.monotonic() + 10

    def work(rank: int) -> Tensor | None:
        if rank == 0:
            send_hidden(ranks.channels[0], ranks.peers[1:3], EPOCH, 5, hidden, deadline)
            return None
        return recv_hidden(ranks.channels[rank], ranks.peers[0], EPOCH, 5, torch.empty_like(hidden), deadline)

    got = ranks.everywhere(work, 3)
    for result in got[1:]:
        assert result is not None
        assert torch.equal(result, hidden)


def test_tensor_of_another_size_than_agreed_is_an_error_that_names_the_sender(ranks: Ranks) -> None:
    groups = ranks.groups(2, 1 << 40)
    sizes = [4, 5]
    futures = [ranks.threads[i].submit(groups[i].all_reduce, torch.ones(sizes[i])) for i in range(2)]
    for future, other in zip(futures, (1, 0), strict=True):
        with pytest.raises(MalformedMessage, match=rf"rank{other}\.cpu"):
            future.result(10)
