"""Slices of tensors from a local copy, checked against the tensors that were saved."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from skynet.errors import StepAborted, WeightError
from skynet.models.checkpoint import build_manifest
from skynet.models.store.reads import TensorRead, chunks_for
from skynet.models.store.store import StoreConfig, WeightStore
from skynet.models.store.swarm_source import SwarmSource
from skynet.protocol.plan import Span


@pytest.fixture
def store(checkpoint: Path, tmp_path: Path) -> Iterator[WeightStore]:
    config = StoreConfig(cache_dir=tmp_path / "cache")
    with WeightStore(build_manifest(checkpoint, tmp_path / "cache"), config, local=[checkpoint]) as opened:
        yield opened


def test_whole_tensors_come_back_bit_for_bit(store: WeightStore, tensors: dict[str, torch.Tensor]) -> None:
    source = SwarmSource(store)
    assert source.names() == frozenset(tensors)
    for name, expected in tensors.items():
        got = source.read(name)
        assert got.dtype == expected.dtype
        assert source.shape(name) == tuple(expected.shape)
        assert torch.equal(got, expected)


SPANS = [
    ((0, 5),), ((3, 40),), ((0, 7), (7, 20)), ((0, 3), (10, 20), (33, 40)), ((20, 30), (0, 10)), ((4, 4),), (),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "dim"), [("embed.weight", 0), ("embed.weight", 1), ("wide.weight", 0), ("wide.weight", 1)]
)
@pytest.mark.parametrize("spans", SPANS)
def test_a_slice_equals_the_slice_of_the_saved_tensor(
    store: WeightStore, tensors: dict[str, torch.Tensor], name: str, dim: int, spans: tuple[tuple[int, int], ...]
) -> None:
    whole = tensors[name]
    scale = whole.shape[dim] // 40
    scaled = [Span(a * scale, b * scale) for a, b in spans]
    got = SwarmSource(store).read(name, dim, scaled)
    parts = [whole.narrow(dim, s.start, len(s)) for s in scaled] or [whole.narrow(dim, 0, 0)]
    assert got.is_contiguous()
    assert torch.equal(got, torch.cat(parts, dim))


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_three_dimensional_tensors_are_cut_along_any_dimension(
    store: WeightStore, tensors: dict[str, torch.Tensor], dim: int
) -> None:
    whole = tensors["experts"]
    for start, end in itertools.combinations((0, 1, 3, 4), 2):
        assert torch.equal(
            SwarmSource(store).read("experts", dim, [Span(start, end)]), whole.narrow(dim, start, end - start)
        )


def test_a_row_slice_touches_only_its_chunks_and_a_column_slice_touches_all(store: WeightStore) -> None:
    tensor = store.manifest.tensor("wide.weight")
    everything = chunks_for(store.manifest, [TensorRead("wide.weight")])
    assert tensor.num_bytes > 4 << 20
    assert len(everything) >= 2
    rows = chunks_for(store.manifest, [TensorRead("wide.weight", 0, (Span(0, 10),))])
    assert rows == everything[:1]
    assert chunks_for(store.manifest, [TensorRead("wide.weight", 1, (Span(0, 10),))]) == everything


def test_a_missing_tensor_is_named_with_the_file_and_the_fix(store: WeightStore) -> None:
    with pytest.raises(WeightError, match=r"tensor absent is missing from model\.safetensors.*save it again"):
        SwarmSource(store).read("absent")
    with pytest.raises(WeightError, match=r"norm\.weight of model\.safetensors has shape \[77\]"):
        SwarmSource(store).read("norm.weight", 0, [Span(0, 78)])


def test_an_altered_local_copy_is_not_believed(store: WeightStore, checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    data = bytearray(path.read_bytes())
    entry = store.manifest.tensor("norm.weight")
    data[entry.offset] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightError, match=r"model\.safetensors: bytes .* nowhere to be had"):
        SwarmSource(store).read("norm.weight")


def test_progress_names_the_source_and_reaches_its_total(store: WeightStore, tensors: dict[str, torch.Tensor]) -> None:
    source = SwarmSource(store)
    reads = [TensorRead(name) for name in tensors]
    source.announce(reads)
    assert store.progress.bytes_total == sum(c.num_bytes for c in chunks_for(store.manifest, reads))
    assert store.progress.bytes_done == 0
    for read in reads:
        source.read(read.name)
    assert store.progress.bytes_by_source == {"local": store.progress.bytes_total}


def test_a_cancelled_store_aborts_reads(store: WeightStore) -> None:
    store.cancel()
    with pytest.raises(StepAborted):
        SwarmSource(store).read("norm.weight")


def test_small_files_are_laid_out_in_a_directory(store: WeightStore, checkpoint: Path) -> None:
    directory = store.small_files()
    assert {p.name for p in directory.iterdir()} == {"config.json", "tokenizer.json"}
    assert (directory / "config.json").read_bytes() == (checkpoint / "config.json").read_bytes()
