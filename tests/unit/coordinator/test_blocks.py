"""KV blocks: none lost, none given to two, contiguous where that is possible."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skynet.coordinator.blocks import BlockManager, BlockTable


def test_a_sequence_grows_into_the_room_reserved_behind_it() -> None:
    manager = BlockManager(16, 4)
    first, second = manager.allocate(2, expected=6), manager.allocate(2, expected=4)
    assert first is not None
    assert second is not None
    assert second.blocks == (6, 7)
    for _ in range(4):
        assert manager.extend(first)
    assert first.blocks == (0, 1, 2, 3, 4, 5)


def test_a_reservation_yields_when_blocks_run_out() -> None:
    manager = BlockManager(8, 4)
    first = manager.allocate(2, expected=8)
    second = manager.allocate(4)
    assert first is not None
    assert second is not None
    assert second.blocks == (4, 5, 6, 7), "taken from the far end of the reservation"
    assert manager.extend(first, 2)
    assert not manager.extend(first)
    assert manager.allocate(1) is None
    manager.check([first, second])


def test_scattered_blocks_serve_when_there_is_no_run() -> None:
    manager = BlockManager(6, 4)
    tables = [table for _ in range(6) if (table := manager.allocate(1)) is not None]
    for table in tables[::2]:
        manager.free(table)
    pieces = manager.allocate(3)
    assert pieces is not None
    assert pieces.blocks == (0, 2, 4)


def test_shared_blocks_stay_until_the_last_reader_frees_them() -> None:
    manager = BlockManager(4, 4)
    parent = manager.allocate(3)
    assert parent is not None
    child = manager.fork(parent, 2)
    assert child.blocks == parent.blocks[:2]
    manager.free(parent)
    assert manager.num_free == 2
    assert manager.extend(child)
    manager.check([child])
    manager.free(child)
    assert manager.num_free == 4


def test_freeing_a_table_twice_is_harmless() -> None:
    manager = BlockManager(4, 4)
    table = manager.allocate(2, expected=3)
    assert table is not None
    manager.free(table)
    manager.free(table)
    manager.check([])


def test_a_cache_of_no_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="can't hold a sequence"):
        BlockManager(0, 16)


@settings(max_examples=150, deadline=None)
@given(
    num_blocks=st.integers(1, 24),
    moves=st.lists(st.tuples(st.sampled_from("aefs"), st.integers(0, 7), st.integers(1, 12)), max_size=60),
)
def test_no_block_is_lost_or_given_to_two(num_blocks: int, moves: list[tuple[str, int, int]]) -> None:
    manager = BlockManager(num_blocks, 4)
    tables: list[BlockTable] = []
    for move, which, count in moves:
        free = manager.num_free
        if move == "a":
            table = manager.allocate(min(count, 5), expected=count)
            assert (table is None) == (min(count, 5) > free)
            if table is not None:
                tables.append(table)
        elif tables:
            table = tables[which % len(tables)]
            if move == "e":
                before = table.blocks
                assert manager.extend(table, count) == (count <= free)
                assert table.blocks[: len(before)] == before
            elif move == "s":
                tables.append(manager.fork(table, count))
            else:
                manager.free(table)
                tables.remove(table)
        manager.check(tables)
    for table in tables:
        manager.free(table)
    assert manager.num_free == num_blocks
    manager.check([])
