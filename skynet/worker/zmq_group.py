"""Collectives and hand-over of hidden states over the data channel.

Sums are taken elementwise in rank order on whoever sums, so every rank ends up with the same bits. Half-precision sums
of more than two ranks are accumulated in float32 and rounded once.
"""

from __future__ import annotations

import math
import struct
import time
from collections.abc import Sequence
from enum import IntEnum
from typing import Final

import torch
from torch import Tensor

from skynet.errors import Nonsense
from skynet.protocol.channel import DataChannel
from skynet.protocol.data_frame import Tag
from skynet.protocol.ids import PeerId
from skynet.protocol.plan import Epoch

MAX_DIMENSIONS: Final = 8
MAX_ELEMENTS: Final = 1 << 40  # of a gathered shape, empty dimensions counted as 1: what torch can address by far
SCATTER_BYTES: Final = 512 << 10  # from here on, three ranks and more reduce-scatter; docs/decisions/0054


class PayloadKind(IntEnum):
    """The `kind` of a data frame's tag."""

    SUM = 1  # a rank's addend
    SUMMED = 2  # a piece that its owner has summed
    GATHER = 3
    BROADCAST = 4
    HIDDEN = 5  # hidden states from the stage before
    OTHER = 64  # from here on: whatever the caller agrees on with itself


def bytes_of(x: Tensor) -> memoryview:
    """The tensor's bytes, any dtype, without a copy if it is contiguous. On the CPU."""
    if not x.numel():
        return memoryview(b"")
    flat = x.detach().cpu().contiguous()
    if flat.dtype is torch.bfloat16:
        flat = flat.view(torch.int16)  # numpy knows no bfloat16
    elements: memoryview = flat.numpy().data
    return elements.cast("B")


def tensor_from(payload: memoryview, dtype: torch.dtype, shape: Sequence[int], sender: PeerId) -> Tensor:
    """The tensor that these bytes are: a view that shares them. Raises Nonsense if their number is wrong."""
    expected = math.prod(shape) * dtype.itemsize
    if payload.nbytes != expected:
        raise Nonsense(
            f"peer {sender}: sent {payload.nbytes} bytes where {dtype}{list(shape)} has {expected}; "
            "do both run this plan?",
            sender,
        )
    if not expected:
        return torch.empty(tuple(shape), dtype=dtype)
    return torch.frombuffer(payload, dtype=dtype).view(tuple(shape))


def sum_in_order(parts: Sequence[Tensor]) -> Tensor:
    """The elementwise sum, from the first to the last; a new tensor."""
    if len(parts) == 2 or parts[0].dtype.itemsize >= 4 or not parts[0].is_floating_point():
        total = parts[0] + parts[1]
        for part in parts[2:]:
            total += part
        return total
    wide = parts[0].float()
    for part in parts[1:]:
        wide += part
    return wide.to(parts[0].dtype)


class ZmqGroup:
    """The ranks of one stage in one epoch, as `Collective` describes; used by the thread that owns the channel.

    `begin_step` comes first in every step: exchanges are numbered from there, and no wait goes past its deadline.
    """

    def __init__(
        self,
        channel: DataChannel,
        members: Sequence[PeerId],
        rank: int,
        epoch: Epoch,
        *,
        scatter_bytes: int = SCATTER_BYTES,
    ) -> None:
        if not 0 <= rank < len(members):
            raise ValueError(f"rank {rank} isn't in a group of {len(members)}")
        self._channel = channel
        self._members = tuple(members)
        self._others = tuple((i, peer) for i, peer in enumerate(members) if i != rank)
        self._rank = rank
        self._epoch = epoch
        self._scatter_bytes = scatter_bytes
        self._step = 0
        self._exchange = 0
        self._deadline = 0.0

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return len(self._members)

    def begin_step(self, step: int, timeout_s: float) -> None:
        """Number what follows by this step (0 to 2^64 - 1, growing) and end its waits after `timeout_s`."""
        self._step, self._exchange = step, 0
        self._deadline = time.monotonic() + timeout_s
        self._channel.begin_step(self._epoch, step)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The elementwise sum over ranks, in rank order. Raises WorkerTimeout, WorkerLost, StepAborted, Nonsense."""
        if not self._others:
            return x
        if len(self._others) > 1 and x.nbytes >= self._scatter_bytes:
            return self._scattered_sum(x)
        tag = self._next(PayloadKind.SUM)
        mine = bytes_of(x)
        for _, peer in self._others:
            self._send(peer, tag, mine)
        if len(self._others) == 1:
            peer = self._others[0][1]
            return x.add_(self._receive(peer, tag, x))  # of two, either order gives the same bits
        return sum_in_order([x if i == self._rank else self._receive_from(i, tag, x) for i in range(self.size)])

    def gather(self, x: Tensor, root: int = 0) -> list[Tensor] | None:
        """Every rank's `x` in rank order at `root`, None elsewhere; shapes may differ, dtypes may not."""
        tag = self._next(PayloadKind.GATHER)
        if self._rank != root:
            shape = struct.pack(f"<B{x.dim()}Q", x.dim(), *x.shape)
            self._send(self._members[root], tag, shape + bytes(bytes_of(x)))
            return None
        return [x if i == root else self._gathered(self._members[i], tag, x) for i in range(self.size)]

    def broadcast(self, x: Tensor | None, root: int = 0, *, like: Tensor) -> Tensor:
        """`root`'s `x` on every rank; `like` states its shape and dtype."""
        tag = self._next(PayloadKind.BROADCAST)
        if self._rank != root:
            return self._receive(self._members[root], tag, like).to(like.device, copy=True)
        if x is None or x.shape != like.shape or x.dtype != like.dtype:
            raise ValueError(f"the root broadcasts a tensor like {like.dtype}{list(like.shape)}, got {x}")
        for _, peer in self._others:
            self._send(peer, tag, bytes_of(x))
        return x

    # -- inside --------------------------------------------------------------------------------------------------------

    def _next(self, kind: PayloadKind) -> Tag:
        self._exchange += 1
        return Tag(kind, self._step, self._exchange)

    def _send(self, peer: PeerId, tag: Tag, payload: bytes | memoryview) -> None:
        self._channel.send(peer, self._epoch, tag, payload, self._deadline)

    def _receive(self, peer: PeerId, tag: Tag, like: Tensor) -> Tensor:
        payload = self._channel.recv(peer, self._epoch, tag, self._deadline)
        return tensor_from(payload, like.dtype, like.shape, peer).to(like.device)

    def _receive_from(self, rank: int, tag: Tag, like: Tensor) -> Tensor:
        return self._receive(self._members[rank], tag, like)

    def _gathered(self, peer: PeerId, tag: Tag, like: Tensor) -> Tensor:
        payload = self._channel.recv(peer, self._epoch, tag, self._deadline)
        num_dimensions = payload[0] if payload.nbytes else MAX_DIMENSIONS + 1
        data_start = 1 + 8 * num_dimensions
        if num_dimensions > MAX_DIMENSIONS or payload.nbytes < data_start:
            raise Nonsense(f"peer {peer}: gathered tensor without a readable shape", peer)
        shape = struct.unpack_from(f"<{num_dimensions}Q", payload, 1)
        if math.prod(max(1, extent) for extent in shape) > MAX_ELEMENTS:
            raise Nonsense(f"peer {peer}: gathered tensor of shape {list(shape)}, which nothing can hold", peer)
        return tensor_from(payload[data_start:], like.dtype, shape, peer).to(like.device, copy=True)

    def _scattered_sum(self, x: Tensor) -> Tensor:
        """Each rank sums one piece (they differ by at most one element) and hands it to the others."""
        flat = x.detach().cpu().contiguous().view(-1)
        pieces = torch.tensor_split(flat, self.size)
        tag, summed_tag = self._next(PayloadKind.SUM), self._next(PayloadKind.SUMMED)
        for i, peer in self._others:
            self._send(peer, tag, bytes_of(pieces[i]))
        mine = pieces[self._rank]
        parts = [mine if i == self._rank else self._receive_from(i, tag, mine) for i in range(self.size)]
        total = sum_in_order(parts)
        for _, peer in self._others:
            self._send(peer, summed_tag, bytes_of(total))
        mine.copy_(total)
        for i, _ in self._others:
            pieces[i].copy_(self._receive_from(i, summed_tag, pieces[i]))
        return flat.view(x.shape).to(x.device)


def send_hidden(
    channel: DataChannel, peers: Sequence[PeerId], epoch: Epoch, step: int, x: Tensor, deadline: float
) -> None:
    """Hand hidden states [tokens, hidden] on to the next stage's ranks. Raises what `DataChannel.send` raises."""
    payload = bytes_of(x)
    for peer in peers:
        channel.send(peer, epoch, Tag(PayloadKind.HIDDEN, step), payload, deadline, in_background=True)


def recv_hidden(channel: DataChannel, peer: PeerId, epoch: Epoch, step: int, like: Tensor, deadline: float) -> Tensor:
    """The hidden states of this step from the stage before, of `like`'s shape and dtype; the caller's alone."""
    payload = channel.recv(peer, epoch, Tag(PayloadKind.HIDDEN, step), deadline)
    return tensor_from(payload, like.dtype, like.shape, peer)
