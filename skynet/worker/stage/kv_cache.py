"""The paged KV cache of one rank: fixed-size blocks, owned by whoever the coordinator's block tables say."""

# h KV heads held by this rank, K head size, S positions

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from skynet.errors import StepRejected


class KvCache:
    """Keys and values of this rank's layers; slot = block * block_size + offset, heads first.

    A head's positions are neighbours in memory, so that a sequence whose blocks are consecutive is read as a view.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_size: int,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        shape = (2, num_kv_heads, num_blocks * block_size, head_size)
        self._layers = [_zeros(shape, dtype, device) for _ in range(num_layers)]

    def like(self, num_blocks: int, block_size: int) -> KvCache:
        """An empty cache for the same layers and heads, with so many blocks."""
        some = self._layers[0]
        return KvCache(
            num_layers=len(self._layers),
            num_kv_heads=some.shape[1],
            head_size=some.shape[3],
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=some.dtype,
            device=some.device,
        )

    @property
    def nbytes(self) -> int:
        """What is set aside, used or not."""
        return sum(layer.nbytes for layer in self._layers)

    def layer(self, index: int) -> Tensor:
        """[2, h, slots, K] of this stage's layer `index`: keys, then values; writing it changes the cache."""
        return self._layers[index]

    def export_blocks(self, layer: int, blocks: Sequence[int]) -> Tensor:
        """A copy of one layer's blocks, [2, h, len(blocks), block_size, K], to be sent elsewhere."""
        return self._paged(layer)[:, :, self._checked(blocks)]

    def import_blocks(self, layer: int, blocks: Sequence[int], content: Tensor) -> None:
        """Puts an exported copy at `blocks`. Raises StepRejected for blocks or a shape that don't fit."""
        index, paged = self._checked(blocks), self._paged(layer)
        expected = (*paged.shape[:2], len(blocks), *paged.shape[3:])
        if tuple(content.shape) != expected or content.dtype != paged.dtype:
            raise StepRejected(
                f"KV copy of {content.dtype}{list(content.shape)}; {paged.dtype}{list(expected)} belongs there"
            )
        paged[:, :, index] = content.to(paged.device)

    def _paged(self, layer: int) -> Tensor:
        flat = self._layers[layer]
        return flat.view(2, flat.shape[1], self.num_blocks, self.block_size, flat.shape[3])

    def _checked(self, blocks: Sequence[int]) -> Tensor:
        if any(not 0 <= block < self.num_blocks for block in blocks):
            raise StepRejected(f"blocks {list(blocks)[:8]} aren't all within [0, {self.num_blocks})")
        return torch.tensor(blocks, dtype=torch.int64, device=self._layers[0].device)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, since what a mask hides must still be finite. On the CPU pages cost nothing until they are written.

    torch.zeros writes every page. And the kernel's huge pages would give each head of each layer 2 MiB for its first
    position: 900 MB for a cache of 64 MB, measured on the benchmark model with one sequence of 560 tokens.
    """
    if device.type != "cpu" or 0 in shape:  # a rank may hold no heads
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
