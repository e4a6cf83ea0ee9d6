"""The paged KV cache of one rank: fixed-size blocks, owned by whoever the coordinator's block tables say."""

# h KV heads held by this rank, K head size, S positions

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor


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
