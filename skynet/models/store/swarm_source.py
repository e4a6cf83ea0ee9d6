"""Tensors out of a weight store: only the slice that is asked for stays in memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from skynet.errors import WeightError
from skynet.models.manifest import ChunkRef
from skynet.models.store.reads import Bytes, Piece, Selection, TensorRead, chunks_for, pieces, select
from skynet.models.store.store import WeightStore
from skynet.protocol.plan import Span

TORCH_DTYPES: Final = {
    "bool": torch.bool, "uint8": torch.uint8, "int8": torch.int8, "int16": torch.int16, "int32": torch.int32,
    "int64": torch.int64, "float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32,
    "float64": torch.float64,
}  # fmt: skip


class SwarmSource:
    """Reads slices of a checkpoint's tensors, chunk by chunk, each of them verified (see `TensorSource`)."""

    def __init__(self, store: WeightStore) -> None:
        self._store = store

    def names(self) -> frozenset[str]:
        """Every tensor of the checkpoint."""
        return self._store.manifest.tensor_names

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole tensor's shape. Raises WeightError if there is no such tensor."""
        return self._store.manifest.tensor(name).shape

    def announce(self, reads: Iterable[TensorRead]) -> None:
        """Say what will be read, so that it is fetched ahead and progress has a total. Raises WeightError."""
        self._store.prefetch(chunks_for(self._store.manifest, reads))

    def read(self, name: str, dim: int | None = None, spans: Sequence[Span] = ()) -> Tensor:
        """The tensor, or its parts inside `spans` of dimension `dim`, joined along it; stored dtype, CPU, contiguous.

        Blocks until every chunk it touches is here. Holds the slice and a few chunks in memory. Raises WeightError
        (missing tensor, no source, disk full), StepAborted (cancelled).
        """
        entry = self._store.manifest.tensor(name)
        selection = select(entry, dim, spans)
        try:
            tensor = torch.empty(selection.shape, dtype=TORCH_DTYPES[entry.dtype])
        except RuntimeError as exc:
            raise WeightError(
                f"tensor {name}: no memory for {selection.num_bytes} bytes; lend less or use more workers"
            ) from exc
        if not selection.num_bytes:
            return tensor
        target: Bytes = tensor.flatten().view(torch.uint8).numpy()
        wanted = {piece.chunk: piece for piece in pieces(self._store.manifest, entry, selection)}

        self._store.fetch_soon(wanted)

        def fill(chunk: ChunkRef) -> None:
            self._fill(wanted[chunk], selection, target)

        self._store.map_read(fill, wanted)
        return tensor

    def _fill(self, piece: Piece, selection: Selection, target: Bytes) -> None:
        size = piece.end - piece.start
        if size == 0:
            return
        runs = selection.runs(piece.start, piece.end)
        first = next(runs)
        if next(runs, None) is None:  # one range: straight to its place
            self._store.read(piece.chunk, piece.offset, target[first.target : first.target + size].data)
            return
        buffer = np.empty(size, dtype=np.uint8)
        self._store.read(piece.chunk, piece.offset, buffer.data)
        selection.copy(buffer, piece.start, target)
