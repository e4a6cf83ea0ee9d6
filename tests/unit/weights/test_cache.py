"""The chunk cache: whole and verified chunks only, bounded, shared by processes, and clear about a full disk."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from skynet.errors import WeightError
from skynet.models.checkpoint import build_manifest
from skynet.models.manifest import ChunkRef
from skynet.models.store.cache import ChunkCache
from skynet.models.store.sources import SourceKind
from skynet.models.store.store import StoreConfig, WeightStore
from skynet.models.store.swarm_source import SwarmSource

from .conftest import LONG_AGO

SIZE = 64 << 10


def chunk(seed: int) -> tuple[bytes, bytes]:
    data = random.Random(seed).randbytes(SIZE)
    return hashlib.sha256(data).digest(), data


def read(cache: ChunkCache, digest: bytes, offset: int = 0, size: int = SIZE) -> bytes | None:
    into = bytearray(size)
    return bytes(into) if cache.read(digest, SIZE, offset, memoryview(into)) else None


def test_a_chunk_comes_back_whole_or_in_part(tmp_path: Path) -> None:
    cache, (digest, data) = ChunkCache(tmp_path, 1 << 30), chunk(1)
    assert read(cache, digest) is None
    cache.put(digest, data)
    assert read(cache, digest) == data
    assert read(ChunkCache(tmp_path, 1 << 30), digest, 100, 50) == data[100:150]
    assert not list(tmp_path.rglob(".tmp-*"))


def test_bytes_that_do_not_match_their_name_are_refused(tmp_path: Path) -> None:
    cache, (digest, data) = ChunkCache(tmp_path, 1 << 30), chunk(1)
    with pytest.raises(WeightError, match="don't match"):
        cache.put(digest, data[:-1])
    assert not cache.has(digest)


@pytest.mark.parametrize("damage", [b"", b"x" * SIZE, b"x" * (SIZE + 1)])
def test_a_damaged_chunk_is_removed_and_not_believed(tmp_path: Path, damage: bytes) -> None:
    cache, (digest, data) = ChunkCache(tmp_path, 1 << 30), chunk(1)
    cache.put(digest, data)
    assert read(cache, digest) == data  # verified before: a later change must still be seen
    cache.path(digest).write_bytes(damage)
    assert read(cache, digest) is None
    assert not cache.has(digest)


def test_the_least_recently_used_chunks_go_first_and_the_bound_holds(tmp_path: Path) -> None:
    cache = ChunkCache(tmp_path, 10 * SIZE)
    chunks = [chunk(i) for i in range(25)]
    for age, (digest, data) in enumerate(chunks[:10]):
        cache.put(digest, data)
        os.utime(cache.path(digest), (LONG_AGO + age, LONG_AGO + age))
    fresh = ChunkCache(tmp_path, 10 * SIZE)
    assert read(fresh, chunks[0][0]) is not None  # used again: no longer the oldest
    for digest, data in chunks[10:12]:
        fresh.put(digest, data)
    assert fresh.has(chunks[0][0])
    assert not fresh.has(chunks[1][0])
    for digest, data in chunks[12:]:
        fresh.put(digest, data)
        assert fresh.stats().num_bytes <= 10 * SIZE
        assert fresh.has(digest)


PUT_AND_READ = """
import hashlib, random, sys
from pathlib import Path
from skynet.models.store.cache import ChunkCache
directory, seed, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
cache, order = ChunkCache(directory, 6 * size), random.Random(seed)
for _ in range(60):
    data = random.Random(order.randrange(12)).randbytes(size)
    digest, into = hashlib.sha256(data).digest(), bytearray(size)
    cache.put(digest, data)
    if cache.read(digest, size, 0, memoryview(into)) and into != data:
        sys.exit("a chunk came back with other bytes")
"""


def test_several_processes_share_a_small_cache(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PUT_AND_READ, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [subprocess.Popen([*command, str(seed), str(SIZE)], env=environment) for seed in range(3)]
    assert [process.wait(30) for process in processes] == [0, 0, 0]
    for path in tmp_path.glob("??/*"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    assert 0 < ChunkCache(tmp_path, 6 * SIZE).trim().num_bytes <= 6 * SIZE


def _fill(cache: ChunkCache) -> None:
    for seed in range(2, 6):
        cache.put(*chunk(seed))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_is_named_with_the_fix_and_leaves_no_rubbish(small_disk: Path) -> None:
    cache = ChunkCache(small_disk, 1 << 30)
    filler = small_disk / "filler"
    filler.write_bytes(bytes((1 << 20) - 2 * SIZE))
    kept, lost = chunk(1), chunk(2)
    cache.put(*kept)
    with pytest.raises(WeightError, match=rf"{small_disk}.*no space for a chunk of {SIZE} bytes.*SKYNET_CACHE_DIR"):
        _fill(cache)
    assert not list(small_disk.rglob(".tmp-*"))
    assert read(cache, kept[0]) == kept[1]
    filler.unlink()
    cache.put(*lost)
    assert read(cache, lost[0]) == lost[1]


class FromMemory:
    """A source that has every chunk of a directory."""

    kind: SourceKind = "swarm"

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def fetch(self, chunk: ChunkRef, cancel: threading.Event) -> bytes | None:
        return (self._directory / chunk.file).read_bytes()[chunk.offset : chunk.offset + chunk.num_bytes]


def test_a_load_onto_a_full_disk_fails_with_the_fix_and_succeeds_once_there_is_room(
    small_disk: Path, checkpoint: Path, tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    manifest = build_manifest(checkpoint, tmp_path / "other-cache")
    with (
        WeightStore(manifest, StoreConfig(cache_dir=small_disk), remote=[FromMemory(checkpoint)]) as store,
        pytest.raises(WeightError, match=r"no space for a chunk of .* bytes"),
    ):
        SwarmSource(store).read("embed.weight")
    with WeightStore(manifest, StoreConfig(cache_dir=tmp_path / "roomy"), remote=[FromMemory(checkpoint)]) as store:
        assert torch.equal(SwarmSource(store).read("embed.weight"), tensors["embed.weight"])


def test_a_cache_smaller_than_the_shard_still_serves_it(
    checkpoint: Path, tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    manifest = build_manifest(checkpoint, tmp_path / "other-cache")
    config = StoreConfig(cache_dir=tmp_path / "tiny", max_cache_bytes=5 << 20)
    with WeightStore(manifest, config, remote=[FromMemory(checkpoint)]) as store:
        for name, expected in tensors.items():
            assert torch.equal(SwarmSource(store).read(name), expected)
        assert store.cache.stats().num_bytes <= 5 << 20


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightError, match=r"file/chunks.*can't be written.*SKYNET_CACHE_DIR"):
        ChunkCache(tmp_path / "file" / "chunks", 1 << 30).put(*chunk(1))
