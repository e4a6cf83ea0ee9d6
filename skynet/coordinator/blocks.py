"""Which KV blocks of a replica belong to whom. Pure bookkeeping: the tensors are the workers'.

A sequence's blocks are kept in one contiguous run where that is possible, since workers then attend over a view of the
cache instead of a gathered copy. For that, room for a sequence's expected growth is reserved behind its first blocks; a
reservation is only a preference and never makes an allocation fail.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

FREE: Final = 0  # in nobody's way
RESERVED: Final = 1  # free, but someone hopes to grow into it
USED: Final = 2
_FORGET_RESERVATIONS: Final = bytes([FREE, FREE, USED]) + bytes(range(3, 256))


@dataclass(slots=True, eq=False)
class BlockTable:
    """The blocks of one sequence, in the order of its positions. Changed by its BlockManager only."""

    blocks: tuple[int, ...]
    reserved: range = field(default=range(0))  # where it hopes to grow


class BlockManager:
    """Hands out blocks [0, num_blocks) and counts who refers to each.

    Invariant: a block is USED exactly while its reference count is positive.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"{num_blocks} KV blocks of {block_size} positions can't hold a sequence")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._states = bytearray(num_blocks)
        self._references = [0] * num_blocks
        self._num_free = num_blocks

    @property
    def num_free(self) -> int:
        return self._num_free

    def blocks_for(self, num_positions: int) -> int:
        """How many blocks hold that many positions."""
        return -(-num_positions // self.block_size)

    def allocate(self, count: int, expected: int = 0) -> BlockTable | None:
        """`count` blocks for a sequence that may grow to `expected`; None when fewer are free."""
        if count > self._num_free:
            return None
        expected = max(count, expected)
        start = self._states.find(bytes(expected))
        if start < 0:
            return BlockTable(self._take_anywhere(count))
        blocks = tuple(range(start, start + count))
        self._use(blocks)
        for block in range(start + count, start + expected):
            self._states[block] = RESERVED
        return BlockTable(blocks, range(start + count, start + expected))

    def extend(self, table: BlockTable, count: int = 1) -> bool:
        """Grow a table by `count` blocks, next to its last one if possible; False, unchanged, if too few are left."""
        if count > self._num_free:
            return False
        following = table.blocks[-1] + 1 if table.blocks else 0
        if self._states[following : following + count].translate(_FORGET_RESERVATIONS) == bytes(count):
            added = tuple(range(following, following + count))
            self._use(added)
        else:
            added = self._take_anywhere(count)
        table.blocks += added
        return True

    def fork(self, table: BlockTable, count: int) -> BlockTable:
        """A table that shares the first `count` blocks of another: equal prefixes are held once."""
        shared = table.blocks[:count]
        for block in shared:
            self._references[block] += 1
        return BlockTable(shared)

    def free(self, table: BlockTable) -> None:
        """Give a table back. Blocks that others share stay; freeing twice is harmless."""
        for block in table.blocks:
            self._references[block] -= 1
            assert self._references[block] >= 0, f"KV block {block} was freed more often than it was taken"
            if not self._references[block]:
                self._states[block] = FREE
                self._num_free += 1
        for block in table.reserved:
            if self._states[block] == RESERVED:
                self._states[block] = FREE
        table.blocks, table.reserved = (), range(0)

    def check(self, tables: list[BlockTable]) -> None:
        """Assert that these tables are all there are: no block lost, none in use unreferenced."""
        counted = [0] * self.num_blocks
        for table in tables:
            for block in table.blocks:
                counted[block] += 1
        assert counted == self._references
        assert all((state == USED) == (n > 0) for state, n in zip(self._states, counted, strict=True))
        assert self._num_free == counted.count(0)

    def _take_anywhere(self, count: int) -> tuple[int, ...]:
        """The best of what is left: one run nobody hopes for, one run at the far end, or pieces."""
        start = self._states.find(bytes(count))
        if start < 0:
            start = self._states.translate(_FORGET_RESERVATIONS).rfind(bytes(count))
        if start >= 0:
            blocks = tuple(range(start, start + count))
        else:
            unwanted = (block for block in range(self.num_blocks) if self._states[block] == FREE)
            hoped_for = (block for block in reversed(range(self.num_blocks)) if self._states[block] == RESERVED)
            blocks = tuple(block for _, block in zip(range(count), (*unwanted, *hoped_for), strict=False))
        self._use(blocks)
        return blocks

    def _use(self, blocks: tuple[int, ...]) -> None:
        for block in blocks:
            assert self._states[block] != USED, f"KV block {block} was given to two sequences"
            self._states[block] = USED
            self._references[block] = 1
        self._num_free -= len(blocks)
