from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from tests.oracle.checkpoints import MAIN, VARIANTS, Checkpoint, make_checkpoint


@pytest.fixture(scope="session")
def checkpoint_named(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """Checkpoints by case name, each saved once."""
    made: dict[str, Checkpoint] = {}

    def get(name: str) -> Checkpoint:
        if name not in made:
            model_type, settings = (name, MAIN[name]) if name in MAIN else VARIANTS[name]
            made[name] = make_checkpoint(tmp_path_factory.mktemp(name), model_type, settings)
        return made[name]

    return get


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The ranks are threads themselves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
