"""What a rank will read is known beforehand, is what it then reads, and is all that it fetches."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from skynet.models.checkpoint import build_manifest
from skynet.models.embedded import EMBEDDED_DIR, EMBEDDED_NAME
from skynet.models.hashes import CHUNK_BYTES
from skynet.models.manifest import ChunkRef, Manifest, encode_manifest
from skynet.models.shard_reads import shard_reads
from skynet.models.store.reads import TensorRead, select
from skynet.models.store.sources import SourceKind
from skynet.models.store.store import Progress, StoreConfig, WeightStore
from skynet.models.store.swarm_source import SwarmSource
from skynet.models.tensors import DirectorySource
from skynet.protocol.messages import ModelRef, Prepare
from skynet.protocol.plan import Epoch, Span
from skynet.testing.replica import assignments
from skynet.worker.loader import Loader
from skynet.worker.sharing import ChunkSharing
from skynet.worker.stage.loader import load_stage
from tests.oracle.checkpoints import MAIN, VARIANTS, make_checkpoint
from tests.unit.weights.links import socket_factory

CPU = torch.device("cpu")
LAYOUTS = ([[1.0]], [[1.0, 1.0], [1.0]], [[3.0, 1.0, 2.0], [1.0, 0.0]])  # the last rank holds nothing


class Recording(DirectorySource):
    """Remembers the reads that weren't of nothing."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.seen: set[TensorRead] = set()

    def read(self, name: str, dim: int | None = None, spans: Sequence[Span] = ()) -> Tensor:
        tensor = super().read(name, dim, spans)
        if tensor.numel():
            self.seen.add(TensorRead(name, dim, tuple(spans)))
        return tensor


@pytest.mark.parametrize("case", [*MAIN, "qwen3-plain", "qwen3_moe-sparse-step", "gpt2-untied"])
def test_every_rank_reads_what_was_foretold(case: str, tmp_path: Path) -> None:
    model_type, settings = (case, MAIN[case]) if case in MAIN else VARIANTS[case]
    checkpoint = make_checkpoint(tmp_path, model_type, settings)
    for layout in LAYOUTS:
        for assignment in (rank for stage in assignments(checkpoint.config, layout) for rank in stage):
            source = Recording(tmp_path)
            load_stage(checkpoint.config, assignment, source, CPU)
            foretold = list(shard_reads(checkpoint.config, assignment, source.names()))
            assert set(foretold) == source.seen, (layout, assignment.stage_index, assignment.rank)
            assert len(foretold) == len(set(foretold))


WIDE: Mapping[str, object] = {  # 88 MB in float32: every matrix is several chunks
    "vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 1,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 64,
    "tie_word_embeddings": False, "model_type": "llama",
}  # fmt: skip


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """A checkpoint whose bytes don't matter, and its manifest."""
    from safetensors.torch import save_file

    from skynet.models.expected import expected_tensors

    directory = tmp_path_factory.mktemp("wide")
    tensors = {name: torch.full(shape, 0.01) for name, shape in expected_tensors(WIDE)}
    for number, tensor in enumerate(tensors.values()):
        tensor.view(-1)[:: CHUNK_BYTES // 16] += torch.arange(-(-tensor.numel() // (CHUNK_BYTES // 16))) + number
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(WIDE))
    return directory, build_manifest(directory, tmp_path_factory.mktemp("hashes"))


class Counted:
    """A source that has every chunk of a directory, and counts what it gave."""

    kind: SourceKind = "swarm"

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self.num_bytes = 0

    def fetch(self, chunk: ChunkRef, cancel: threading.Event) -> bytes | None:
        with (self._directory / chunk.file).open("rb") as file:
            file.seek(chunk.offset)
            data = file.read(chunk.num_bytes)
        with self._lock:
            self.num_bytes += len(data)
        return data


def most_bytes(manifest: Manifest, reads: Sequence[TensorRead]) -> int:
    """The bound of docs/decisions/0044: rows where rows are cut, else whole tensors, and less than a chunk at each end.

    Ranges that touch each other in the file are one range.
    """
    ranges = []
    for read in reads:
        tensor = manifest.tensor(read.name)
        start, end = select(tensor, read.dim, read.spans).bounds(0, tensor.num_bytes) or (0, 0)
        ranges.append((tensor.offset + start, tensor.offset + end))
    total, reached = 0, -1
    for start, end in sorted(ranges):
        if start > reached:
            total += 2 * (CHUNK_BYTES - 1)
        total += end - max(start, reached)
        reached = max(reached, end)
    return total


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_rank_fetches_its_rows_and_no_chunk_beside_them(
    num_ranks: int, wide: tuple[Path, Manifest], tmp_path: Path
) -> None:
    directory, manifest = wide
    rank = assignments(WIDE, [[1.0] * num_ranks])[0][1]
    reads = list(shard_reads(WIDE, rank, manifest.tensor_names))
    source, seen = Counted(directory), list[Progress]()
    with WeightStore(manifest, StoreConfig(cache_dir=tmp_path), remote=[source]) as store:
        tensors = SwarmSource(store)
        store.report_to(seen.append)  # what is announced begins to come at once
        tensors.announce(reads)
        load_stage(WIDE, rank, tensors, CPU)
    assert source.num_bytes <= most_bytes(manifest, reads)
    assert source.num_bytes < 0.8 * sum(tensor.num_bytes for tensor in manifest.tensors)
    assert {progress.bytes_total for progress in seen[1:]} == {source.num_bytes}  # the first: nothing announced yet
    assert (seen[0].bytes_done, seen[-1].bytes_done) == (0, source.num_bytes)


EMBEDDED_CONFIG = json.loads((EMBEDDED_DIR / "config.json").read_text())


def load_embedded(cache: Path, name: str, revision: str, hub_endpoint: str | None = None) -> tuple[Progress, ...]:
    """Load a rank of the embedded model as a worker does that has the manifest already; the progress it reported."""
    manifest = build_manifest(EMBEDDED_DIR, cache)
    path = cache / "manifests" / manifest.digest
    path.parent.mkdir()
    path.write_bytes(encode_manifest(manifest))
    rank = assignments(EMBEDDED_CONFIG, [[1.0, 1.0]])[0][0]
    ref = ModelRef(name=name, revision=revision, digest=manifest.digest, manifest_bytes=path.stat().st_size)
    order = Prepare(epoch=Epoch(1, 1), model=ref, assignment=rank, peers=(), sources=())
    reads = list(shard_reads(EMBEDDED_CONFIG, rank, manifest.tensor_names))
    seen: list[Progress] = []

    async def load() -> None:
        factory, store = socket_factory(), StoreConfig(cache_dir=cache)
        sharing = ChunkSharing(factory, ["127.0.0.1"], store, lambda peer, chunk: None)
        try:
            loader = Loader(CPU, store, sharing, hub_endpoint)
            await asyncio.to_thread(loader.load, order, threading.Event(), seen.append)
        finally:
            await sharing.close()
            factory.close()

    asyncio.run(load())
    tensors = ((manifest.tensor(read.name), read) for read in reads)
    assert seen[0].bytes_total >= sum(select(tensor, read.dim, read.spans).num_bytes for tensor, read in tensors)
    return tuple(seen)


def test_a_loader_says_the_total_before_anything_is_read(tmp_path: Path) -> None:
    seen = load_embedded(tmp_path, EMBEDDED_NAME, "")
    assert {progress.bytes_total for progress in seen} == {seen[-1].bytes_done}


def test_what_huggingface_hub_keeps_on_a_workers_machine_is_a_local_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    revision = "0123456789abcdef0123456789abcdef01234567"
    snapshots = tmp_path / "hf" / "models--Test--Tiny-Model" / "snapshots"
    snapshots.mkdir(parents=True)
    (snapshots / revision).symlink_to(EMBEDDED_DIR)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    seen = load_embedded(tmp_path / "cache", "Test/Tiny-Model", revision, "http://127.0.0.1:9")
    assert set(seen[-1].bytes_by_source) == {"local"}
