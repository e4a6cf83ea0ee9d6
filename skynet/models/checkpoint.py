"""A checkpoint directory in Hugging Face layout: which files it has, what they hold, and its manifest. No torch."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Final

import msgspec

from skynet.errors import WeightError
from skynet.models.hashes import HashIndex, Progress, hash_file
from skynet.models.manifest import FILE_NAME, MAX_FILES, FileEntry, Manifest, TensorEntry
from skynet.models.safetensors_header import HeaderTensor, read_header

SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
SMALL_FILES: Final = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip
MAX_SMALL_FILE_BYTES: Final = 64 << 20
_FIX: Final = "download or save the checkpoint again"


def weight_files(directory: Path) -> dict[str, frozenset[str]]:
    """The weight files of a checkpoint directory, with the tensors an index promises (empty: no index)."""
    if (directory / SINGLE_FILE).exists():
        return {SINGLE_FILE: frozenset()}
    index = directory / INDEX_FILE
    if not index.exists():
        others = sorted(p.name for p in directory.glob("*.bin")) if directory.is_dir() else []
        seen = (
            f"it holds {', '.join(others)[:200]}; convert it to safetensors"
            if others
            else "check the path or download it again"
        )
        raise WeightError(f"{directory}: holds neither {SINGLE_FILE} nor {INDEX_FILE}; {seen}")
    try:
        if index.stat().st_size > MAX_SMALL_FILE_BYTES:
            raise WeightError(
                f"{index}: {index.stat().st_size} bytes, at most {MAX_SMALL_FILE_BYTES} are allowed; download it again"
            )
        return parse_index(index.read_bytes(), str(index))
    except OSError as exc:
        raise WeightError(f"{index}: can't be read: {exc.strerror}; check its permissions and its disk") from exc


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def parse_index(data: bytes, subject: str) -> dict[str, frozenset[str]]:
    """Weight file -> tensors it must hold, from the bytes of a `model.safetensors.index.json`. Raises WeightError."""
    try:
        weight_map = msgspec.json.decode(data, type=_Index).weight_map
    except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
        raise WeightError(f"{subject}: unreadable: {exc}; download it again") from exc
    files: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        files.setdefault(file, set()).add(tensor)
    bad = next((f for f in files if not FILE_NAME.match(f)), None)
    if bad is not None or not files or len(files) > MAX_FILES:
        raise WeightError(f"{subject}: names {len(files)} weight files, {str(bad)[:80]!r} isn't one; download it again")
    return {file: frozenset(tensors) for file, tensors in sorted(files.items())}


def assemble(
    files: list[FileEntry],
    headers: dict[str, tuple[HeaderTensor, ...]],
    promised: dict[str, frozenset[str]],
    subject: str,
) -> Manifest:
    """A manifest from hashed files and parsed headers. Raises WeightError where they disagree with the index."""
    tensors = []
    for name, header in headers.items():
        missing = promised.get(name, frozenset()) - {t.name for t in header}
        if missing:
            raise WeightError(
                f"{subject}/{name}: tensor {min(missing)} is missing, {INDEX_FILE} says it is there; "
                "download both again"
            )
        tensors += [TensorEntry(t.name, name, t.offset, t.shape, t.dtype) for t in header]
    try:
        return Manifest(tuple(sorted(files, key=lambda f: f.name)), tuple(sorted(tensors, key=lambda t: t.name)))
    except ValueError as exc:
        raise WeightError(f"{subject}: {exc}; save the checkpoint again") from exc


def build_manifest(
    directory: Path, cache_dir: Path, progress: Progress | None = None, cancel: threading.Event | None = None
) -> Manifest:
    """The manifest of a checkpoint directory: each file is read once, in chunks; unchanged files aren't read again.

    `progress` gets bytes done and in all. Raises WeightError naming the file and the fix, StepAborted when cancelled.
    """
    promised = weight_files(directory)
    headers = {name: read_header(directory / name) for name in promised}
    names = [*promised, *(name for name in SMALL_FILES if (directory / name).is_file())]
    if "config.json" not in names:
        raise WeightError(f"{directory}: has no config.json; download or save the checkpoint again")
    sizes = {name: (directory / name).stat().st_size for name in names}
    total, before, files = sum(sizes.values()), 0, []
    index = HashIndex(cache_dir / "hashes")
    for name in names:
        if name in SMALL_FILES and sizes[name] > MAX_SMALL_FILE_BYTES:
            raise WeightError(
                f"{directory / name}: {sizes[name]} bytes, at most {MAX_SMALL_FILE_BYTES} are allowed; {_FIX}"
            )
        num_bytes, digests = hash_file(directory / name, index, _shifted(progress, before, total), cancel)
        files.append(FileEntry(name, num_bytes, digests))
        before += num_bytes
    return assemble(files, headers, promised, str(directory))


def _shifted(progress: Progress | None, before: int, total: int) -> Progress | None:
    return None if progress is None else lambda done, _: progress(before + done, total)
