"""The coordinator's list of tensors is what the stages' loaders read, for every architecture and setting."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from torch import Tensor

from skynet.errors import WeightError
from skynet.models.checkpoint import build_manifest
from skynet.models.expected import check_complete, expected_tensors
from skynet.models.tensors import DirectorySource, TensorSource
from skynet.protocol.plan import Span
from skynet.testing.replica import LoopbackReplica, assignments
from tests.oracle.checkpoints import MAIN, VARIANTS, Checkpoint


class Recording(DirectorySource):
    """Remembers what was read."""

    def __init__(self, source: Checkpoint) -> None:
        super().__init__(source.path)
        self.seen: dict[str, tuple[int, ...]] = {}

    def read(self, name: str, dim: int | None = None, spans: Sequence[Span] = ()) -> Tensor:
        self.seen[name] = self.shape(name)
        return super().read(name, dim, spans)


@pytest.mark.parametrize("case", [*MAIN, *VARIANTS])
def test_loaders_read_the_expected_tensors_and_no_others(
    case: str, checkpoint_named: Callable[[str], Checkpoint]
) -> None:
    checkpoint = checkpoint_named(case)
    recording = Recording(checkpoint)
    source: TensorSource = recording
    LoopbackReplica(checkpoint.config, source, assignments(checkpoint.config, [[1.0]]))
    assert recording.seen == dict(expected_tensors(checkpoint.config))


def test_a_checkpoint_whose_shapes_differ_from_its_config_is_refused(
    checkpoint_named: Callable[[str], Checkpoint], tmp_path_factory: pytest.TempPathFactory
) -> None:
    checkpoint = checkpoint_named("qwen3-plain")
    manifest = build_manifest(checkpoint.path, tmp_path_factory.mktemp("cache"), lambda done, total: None)
    check_complete(manifest, checkpoint.config)
    with pytest.raises(WeightError, match=r"mlp\.gate_proj\.weight has shape \[96, 64\], config\.json makes it \[80"):
        check_complete(manifest, {**checkpoint.config, "intermediate_size": 80})
