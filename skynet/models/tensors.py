"""Where weights come from, tensor by tensor and slice by slice."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from skynet.errors import WeightError
from skynet.protocol.plan import Span

INDEX_NAME = "model.safetensors.index.json"


class TensorSource(Protocol):
    """A checkpoint that hands out slices. Reading holds no more in memory than the tensor being read."""

    def names(self) -> frozenset[str]:
        """Every tensor there is."""

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's full shape. Raises WeightError for a name that isn't there."""

    def read(self, name: str, dim: int | None = None, spans: Sequence[Span] = ()) -> Tensor:
        """The tensor on the CPU in its stored dtype; with `dim`, only these spans of it, concatenated along it.

        Raises WeightError when the tensor is missing, truncated or altered, and names the file and the fix.
        """


class DirectorySource:
    """The safetensors files of a local directory, trusted as they are."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files = _find_files(path)

    def names(self) -> frozenset[str]:
        """Every tensor of every file."""
        return frozenset(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """From the file's header."""
        file = self._file(name)
        try:
            with safe_open(file, framework="pt") as opened:
                return tuple(opened.get_slice(name).get_shape())
        except (SafetensorError, OSError) as exc:
            raise _unreadable(file, name, exc) from exc

    def read(self, name: str, dim: int | None = None, spans: Sequence[Span] = ()) -> Tensor:
        """The slices, copied; the file is mapped for the length of this call alone."""
        file = self._file(name)
        try:
            with safe_open(file, framework="pt") as opened:
                if dim is None:
                    whole: Tensor = opened.get_tensor(name).clone()
                    return whole
                lazy = opened.get_slice(name)
                before = (slice(None),) * dim
                pieces = [lazy[(*before, slice(span.start, span.end))] for span in spans if len(span)]
                if not pieces:
                    empty: Tensor = lazy[(*before, slice(0, 0))]
                    return empty.clone()
                return torch.cat(pieces, dim)
        except (SafetensorError, OSError) as exc:
            raise _unreadable(file, name, exc) from exc

    def _file(self, name: str) -> Path:
        file = self._files.get(name)
        if file is None:
            raise WeightError(
                f"{self._path}: tensor {name} isn't in any of its safetensors files; fetch the checkpoint again"
            )
        return file


def _find_files(path: Path) -> Mapping[str, Path]:
    """Which file holds which tensor: from the index if there is one, else from the files' headers."""
    index = path / INDEX_NAME
    if index.exists():
        try:
            weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
            return {name: path / file for name, file in weight_map.items()}
        except (OSError, ValueError, KeyError, AttributeError) as exc:
            raise WeightError(f"{index}: unreadable ({exc}); fetch this file again") from exc
    found: dict[str, Path] = {}
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                found.update(dict.fromkeys(opened.keys(), file))
        except (SafetensorError, OSError) as exc:
            raise WeightError(f"{file}: not a readable safetensors file ({exc}); fetch it again") from exc
    if not found:
        raise WeightError(f"{path}: holds no *.safetensors file; give a directory in Hugging Face layout")
    return found


def _unreadable(file: Path, name: str, exc: Exception) -> WeightError:
    return WeightError(f"{file}: can't read tensor {name} ({exc}); fetch this file again")
