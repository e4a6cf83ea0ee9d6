"""Which bytes of a checkpoint a shard needs, and how they lie in the slice it keeps. No torch.

A tensor [d0, ..., dk, ..., dn] cut along dimension k is d0*...*d(k-1) periods of dk*...*dn elements; of each period the
same byte ranges are wanted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from skynet.errors import WeightError
from skynet.models.hashes import CHUNK_BYTES
from skynet.models.manifest import ChunkRef, Manifest, TensorEntry
from skynet.protocol.codec import DTYPE_SIZES
from skynet.protocol.plan import Span

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class TensorRead:
    """A tensor, or the parts of it inside `spans` of dimension `dim`, one after the other."""

    name: str
    dim: int | None = None  # None: the whole tensor
    spans: tuple[Span, ...] = ()


class Run(NamedTuple):
    """Bytes [start, end) of the tensor go to `target` of the slice."""

    start: int
    end: int
    target: int


@dataclass(frozen=True, slots=True)
class Selection:
    """The wanted bytes of one tensor: `parts` of each of `num_periods` periods."""

    num_periods: int
    period: int  # bytes
    parts: tuple[tuple[int, int], ...]  # byte ranges within a period, in the order of the slice
    shape: tuple[int, ...]  # of the slice

    @property
    def width(self) -> int:
        """Wanted bytes per period."""
        return sum(end - start for start, end in self.parts)

    @property
    def num_bytes(self) -> int:
        return self.num_periods * self.width

    def runs(self, start: int, end: int) -> Iterator[Run]:
        """The wanted byte ranges inside [start, end) of the tensor, one by one."""
        if not self.period:
            return
        for period in range(start // self.period, -(-end // self.period)):
            base, target = period * self.period, period * self.width
            for part_start, part_end in self.parts:
                low, high = max(start, base + part_start), min(end, base + part_end)
                if low < high:
                    yield Run(low, high, target + low - base - part_start)
                target += part_end - part_start

    def bounds(self, start: int, end: int) -> tuple[int, int] | None:
        """The smallest range inside [start, end) that has every wanted byte of it; None if none is wanted."""
        first_full, last_full = -(-start // max(1, self.period)), end // max(1, self.period)
        edges = list(self.runs(start, min(end, (first_full + 1) * self.period)))
        edges += self.runs(max(start, (last_full - 1) * self.period), end)
        return (min(r.start for r in edges), max(r.end for r in edges)) if edges else None

    def copy(self, source: Bytes, start: int, target: Bytes) -> None:
        """Copy what is wanted of `source`, bytes [start, start + len) of the tensor, into the slice's bytes."""
        end = start + len(source)
        first_full, last_full = -(-start // self.period), end // self.period
        if first_full >= last_full:
            self._copy_runs(source, start, end, start, target)
            return
        self._copy_runs(source, start, first_full * self.period, start, target)
        block = source[first_full * self.period - start : last_full * self.period - start].reshape(-1, self.period)
        rows, column = target.reshape(self.num_periods, self.width)[first_full:last_full], 0
        for part_start, part_end in self.parts:
            rows[:, column : column + part_end - part_start] = block[:, part_start:part_end]
            column += part_end - part_start
        self._copy_runs(source, last_full * self.period, end, start, target)

    def _copy_runs(self, source: Bytes, start: int, end: int, origin: int, target: Bytes) -> None:
        for run in self.runs(start, end):
            target[run.target : run.target + run.end - run.start] = source[run.start - origin : run.end - origin]


def select(tensor: TensorEntry, dim: int | None, spans: Iterable[Span]) -> Selection:
    """What a read wants of a tensor. Raises WeightError if the tensor has no such dimension or range."""
    if dim is None:
        return Selection(1, tensor.num_bytes, ((0, tensor.num_bytes),), tensor.shape)
    spans = tuple(spans)
    if not 0 <= dim < len(tensor.shape) or any(span.end > tensor.shape[dim] for span in spans):
        raise WeightError(
            f"tensor {tensor.name} of {tensor.file} has shape {list(tensor.shape)}, which has no {list(spans)} in "
            f"dimension {dim}: config.json and weights don't fit together; download both again"
        )
    inner = math.prod(tensor.shape[dim + 1 :]) * DTYPE_SIZES[tensor.dtype]
    shape = (*tensor.shape[:dim], sum(map(len, spans)), *tensor.shape[dim + 1 :])
    parts: list[tuple[int, int]] = []
    for span in spans:
        if parts and parts[-1][1] == span.start * inner:  # neighbours are read as one
            parts[-1] = (parts[-1][0], span.end * inner)
        elif len(span):
            parts.append((span.start * inner, span.end * inner))
    return Selection(math.prod(tensor.shape[:dim]), tensor.shape[dim] * inner, tuple(parts), shape)


class Piece(NamedTuple):
    """The part of a chunk that one read wants: bytes [start, end) of the tensor, at `offset` of the chunk."""

    chunk: ChunkRef
    offset: int
    start: int
    end: int


def pieces(manifest: Manifest, tensor: TensorEntry, selection: Selection) -> Iterator[Piece]:
    """The chunks that hold what is wanted, each with the smallest range that has all of it, in order of the file."""
    file = manifest.file(tensor.file)
    if not selection.num_bytes:
        return
    for index in range(tensor.offset // CHUNK_BYTES, -(-(tensor.offset + tensor.num_bytes) // CHUNK_BYTES)):
        chunk = file.chunk(index)
        low = max(chunk.offset, tensor.offset) - tensor.offset
        high = min(chunk.offset + chunk.num_bytes, tensor.offset + tensor.num_bytes) - tensor.offset
        wanted = selection.bounds(low, high)
        if wanted is not None:
            yield Piece(chunk, tensor.offset + wanted[0] - chunk.offset, *wanted)


def chunks_for(manifest: Manifest, reads: Iterable[TensorRead]) -> tuple[ChunkRef, ...]:
    """Every chunk that these reads touch, once, in order of the reads. Raises WeightError for a missing tensor."""
    found: dict[bytes, ChunkRef] = {}
    for read in reads:
        tensor = manifest.tensor(read.name)
        for piece in pieces(manifest, tensor, select(tensor, read.dim, read.spans)):
            found.setdefault(piece.chunk.digest, piece.chunk)
    return tuple(found.values())
