"""Small real checkpoints on disk."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

torch.set_num_threads(1)
LONG_AGO = 1_600_000_000


def settle(directory: Path) -> None:
    """Let no file look as if it were still being written: the hash index doesn't remember those."""
    for path in directory.rglob("*"):
        os.utime(path, (LONG_AGO, LONG_AGO))


def random_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of several dtypes and shapes; two of them larger than one chunk."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "embed.weight": torch.randn(1100, 1024, generator=generator).bfloat16() * 2,
        "wide.weight": torch.randn(700, 2111, generator=generator),
        "experts": torch.randn(4, 40, 96, generator=generator).half(),
        "norm.weight": torch.randn(77, generator=generator),
        "mask": torch.randint(0, 2, (5, 3), generator=generator).bool(),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 7),
    }


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return random_tensors()


@pytest.fixture
def checkpoint(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A checkpoint in one file."""
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (directory / "tokenizer.json").write_text("{}")
    return directory
