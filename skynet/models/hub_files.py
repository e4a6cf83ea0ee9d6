"""Configuration and tokenizer of a model on the hub: small files, had before any weight is looked at."""

from __future__ import annotations

from pathlib import Path

from skynet.errors import WeightError
from skynet.models.checkpoint import MAX_SMALL_FILE_BYTES, SMALL_FILES
from skynet.models.hashes import write_atomically
from skynet.models.hub import Hub, HubModel


def hub_small_files(hub: Hub, model: HubModel, cache_dir: Path) -> Path:
    """A directory with the revision's configuration and tokenizer, downloaded once.

    So an unsupported architecture is refused before weights are hashed. Raises ModelError (hub) or WeightError (too
    large, disk full).
    """
    directory = cache_dir / "hub" / f"{model.repo_id.replace('/', '--')}@{model.revision}"
    for name in SMALL_FILES:
        file, path = model.file(name), directory / name
        if file is None or (path.is_file() and path.stat().st_size == file.num_bytes):
            continue
        if file.num_bytes > MAX_SMALL_FILE_BYTES:
            raise WeightError(
                f"{model.repo_id}/{name}: {file.num_bytes} bytes, at most {MAX_SMALL_FILE_BYTES} are allowed; "
                "choose another model"
            )
        data = b"".join(hub.stream(model, name, 0, file.num_bytes))
        try:
            write_atomically(path, data)
        except OSError as exc:
            raise WeightError(
                f"{path}: can't be written: {exc.strerror}; free space or name another directory in SKYNET_CACHE_DIR"
            ) from exc
    return directory
