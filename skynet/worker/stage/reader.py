"""Reads one rank's slices of a checkpoint into the dtype and onto the device where they stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from skynet.errors import WeightError
from skynet.models.tensors import TensorSource
from skynet.protocol.plan import Span

Progress = Callable[[int], None]  # bytes of this shard read so far, as they will be held


class ShardReader:
    """Every read checks the tensor's full shape against what the config promises; one tensor is in flight at a time."""

    def __init__(
        self, source: TensorSource, dtype: torch.dtype, device: torch.device, progress: Progress | None = None
    ) -> None:
        self._source = source
        self.dtype = dtype
        self.device = device
        self._progress = progress
        self._bytes_read = 0

    def has(self, name: str) -> bool:
        """Whether the checkpoint has this tensor."""
        return name in self._source.names()

    def whole(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """All of a small tensor."""
        return self._keep(name, shape, None, ())

    def slices(self, name: str, shape: tuple[int, ...], dim: int, spans: Sequence[Span]) -> Tensor:
        """These spans along `dim`, one after another."""
        return self._keep(name, shape, dim, spans)

    def stacked(self, pieces: Sequence[tuple[str, tuple[int, ...], Sequence[Span]]]) -> Tensor:
        """Spans of rows of several tensors as one: a fused matrix, filled tensor by tensor."""
        count = sum(len(span) for _, _, spans in pieces for span in spans)
        fused = torch.empty((count, *pieces[0][1][1:]), dtype=self.dtype, device=self.device)
        row = 0
        for name, shape, spans in pieces:
            piece = self._read(name, shape, 0, spans)
            fused[row : row + len(piece)].copy_(piece)
            row += len(piece)
        return fused

    def _keep(self, name: str, shape: tuple[int, ...], dim: int | None, spans: Sequence[Span]) -> Tensor:
        return self._read(name, shape, dim, spans).to(device=self.device, dtype=self.dtype).contiguous()

    def _read(self, name: str, shape: tuple[int, ...], dim: int | None, spans: Sequence[Span]) -> Tensor:
        if not self.has(name):
            raise WeightError(
                f"the checkpoint has no tensor {name}; fetch it again, or check that config.json belongs to it"
            )
        found = self._source.shape(name)
        if found != shape:
            raise WeightError(
                f"tensor {name} is {list(found)}, config.json makes it {list(shape)}; one of them is wrong"
            )
        tensor = self._source.read(name, dim, spans)
        self._bytes_read += tensor.numel() * self.dtype.itemsize
        if self._progress is not None:
            self._progress(self._bytes_read)
        return tensor
