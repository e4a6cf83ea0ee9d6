"""Manifests of real checkpoint directories, and what is said about broken ones."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from skynet.coordinator.served import open_model
from skynet.errors import MalformedMessage, StepAborted, WeightError
from skynet.models import hashes
from skynet.models.checkpoint import build_manifest
from skynet.models.hashes import CHUNK_BYTES, DIGEST_BYTES
from skynet.models.manifest import (
    FileEntry,
    Manifest,
    ManifestDigest,
    TensorEntry,
    decode_manifest,
    encode_manifest,
)

from .conftest import settle


def sharded(directory: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """The same tensors in two files under an index."""
    directory.mkdir()
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[:3], "model-00002-of-00002.safetensors": names[3:]}
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, directory / file)
    weight_map = {name: file for file, held in files.items() for name in held}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text("{}")
    return directory


def test_a_manifest_survives_the_wire_and_its_digest_names_its_content(checkpoint: Path, tmp_path: Path) -> None:
    manifest = build_manifest(checkpoint, tmp_path / "cache")
    data = encode_manifest(manifest)
    assert decode_manifest(data, manifest.digest) == manifest
    with pytest.raises(MalformedMessage, match="doesn't have that digest"):
        decode_manifest(data, ManifestDigest("0" * 64))
    assert build_manifest(checkpoint, tmp_path / "another-cache").digest == manifest.digest
    assert [f.name for f in manifest.small_files] == ["config.json", "tokenizer.json"]


def test_tensors_lie_where_the_manifest_says(
    checkpoint: Path, tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    manifest = build_manifest(checkpoint, tmp_path / "cache")
    data = (checkpoint / "model.safetensors").read_bytes()
    for name, tensor in tensors.items():
        entry = manifest.tensor(name)
        raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        assert data[entry.offset : entry.offset + entry.num_bytes] == raw


def test_a_sharded_checkpoint_is_read_through_its_index(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    directory = sharded(tmp_path / "sharded", tensors)
    manifest = build_manifest(directory, tmp_path / "cache")
    assert manifest.tensor_names == frozenset(tensors)
    assert {t.file for t in manifest.tensors} == {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}


def test_unchanged_files_are_not_read_again_and_changed_ones_are(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(checkpoint)
    os.utime(checkpoint, None)
    monkeypatch.setattr(hashes, "_TOO_FRESH_S", -1.0)  # ctime can't be set back
    first = build_manifest(checkpoint, tmp_path / "cache")
    read: list[Any] = []
    hash_chunks: Callable[..., None] = hashes._hash_chunks

    def watched(fd: int, path: Path, *rest: Any) -> None:
        read.append(path.name)
        hash_chunks(fd, path, *rest)

    monkeypatch.setattr(hashes, "_hash_chunks", watched)
    assert build_manifest(checkpoint, tmp_path / "cache") == first
    assert read == []
    path = checkpoint / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, (1_600_000_000, 1_600_000_000))  # same size, same time of change
    assert build_manifest(checkpoint, tmp_path / "cache") != first
    assert read == ["model.safetensors"]


def test_a_file_that_was_just_written_is_not_remembered(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "_TOO_FRESH_S", 60.0)
    build_manifest(checkpoint, tmp_path / "cache")
    assert not (tmp_path / "cache" / "hashes").exists()


def test_progress_counts_every_byte_and_a_cancel_is_heard(checkpoint: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    manifest = build_manifest(checkpoint, tmp_path / "cache", lambda done, total: seen.append((done, total)))
    assert seen[-1] == (sum(f.num_bytes for f in manifest.files),) * 2
    assert seen == sorted(seen)

    class Cancelled:
        def is_set(self) -> bool:
            return True

    with pytest.raises(StepAborted, match=r"model\.safetensors: hashing was cancelled"):
        build_manifest(checkpoint, tmp_path / "other", cancel=Cancelled())  # type: ignore[arg-type]


def _append(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"x")


def _replace_by_directory(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").mkdir()


BROKEN: list[tuple[str, Callable[[Path], Any], str]] = [
    ("no config", lambda d: (d / "config.json").unlink(), r"has no config\.json"),
    ("no weights", lambda d: (d / "model.safetensors").unlink(), r"holds neither model\.safetensors"),
    ("cut short", lambda d: os.truncate(d / "model.safetensors", 5_000_000), r"model\.safetensors: .*cut short.*again"),
    ("only a head", lambda d: os.truncate(d / "model.safetensors", 5), r"model\.safetensors: 5 bytes are too short"),
    ("grown", _append, r"model\.safetensors: .*bytes to spare"),
    ("pytorch", lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), r"pytorch_model\.bin.*convert it"),
    ("a directory", _replace_by_directory, r"model\.safetensors"),
]  # fmt: skip


@pytest.mark.parametrize(("what", "damage", "said"), BROKEN, ids=[b[0] for b in BROKEN])
def test_a_broken_checkpoint_is_named_with_the_fix(
    checkpoint: Path, tmp_path: Path, what: str, damage: Callable[[Path], Any], said: str
) -> None:
    damage(checkpoint)
    with pytest.raises(WeightError, match=said) as caught:
        build_manifest(checkpoint, tmp_path / "cache")
    assert str(checkpoint) in str(caught.value)


def test_a_broken_index_is_named_with_the_fix(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    directory = sharded(tmp_path / "sharded", tensors)
    index = directory / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    (directory / "model-00002-of-00002.safetensors").rename(directory / "elsewhere")
    with pytest.raises(WeightError, match=r"model-00002-of-00002\.safetensors: no such file"):
        build_manifest(directory, tmp_path / "cache")
    (directory / "elsewhere").rename(directory / "model-00002-of-00002.safetensors")
    good["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(good))
    with pytest.raises(WeightError, match=r"model-00001-of-00002\.safetensors: tensor ghost is missing"):
        build_manifest(directory, tmp_path / "cache")
    for bad in ("{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": "../x"}}', '{"weight_map": {"a": 1}}'):
        index.write_text(bad)
        with pytest.raises(WeightError, match=r"model\.safetensors\.index\.json: .*download it again"):
            build_manifest(directory, tmp_path / "cache")


@pytest.mark.parametrize(
    "make",
    [
        lambda: FileEntry("../evil", 0, b""),
        lambda: FileEntry(".hidden", 0, b""),
        lambda: FileEntry("a/b", 0, b""),
        lambda: FileEntry("a", CHUNK_BYTES + 1, bytes(DIGEST_BYTES)),
        lambda: FileEntry("a", -1, b""),
        lambda: TensorEntry("t", "a", 0, (1 << 60,), "float32"),
        lambda: TensorEntry("t", "a", -1, (1,), "float32"),
        lambda: TensorEntry("t", "a", 0, (1,), "float31"),
        lambda: TensorEntry("", "a", 0, (1,), "float32"),
        lambda: Manifest((), (TensorEntry("t", "a", 0, (1,), "float32"),)),
        lambda: Manifest((FileEntry("a", 3, bytes(32)),), (TensorEntry("t", "a", 0, (1,), "float32"),)),
        lambda: Manifest((FileEntry("a", 0, b""), FileEntry("a", 0, b"")), ()),
        lambda: Manifest((FileEntry("b", 0, b""), FileEntry("a", 0, b"")), ()),
    ],
)
def test_an_impossible_entry_cannot_be_made(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        make()


def test_opening_a_model_ends_soon_after_a_cancel(tmp_path: Path) -> None:
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(StepAborted):
        open_model("embedded", None, tmp_path, None, cancel)
