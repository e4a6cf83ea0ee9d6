"""Sequences with and without an adapter in one batch, against checkpoints with the adapter merged in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from skynet.errors import StepRejected
from skynet.models.config import read_spec
from skynet.models.tensors import DirectorySource
from skynet.protocol.ids import SequenceId
from skynet.protocol.plan import Epoch, Span
from skynet.protocol.steps import RunStep, SamplingParams, SequencePart
from skynet.testing.replica import LoopbackReplica, assignments
from skynet.worker.stage.adapters import LowRank, Projection, shard_adapter
from skynet.worker.stage.stage import Stage
from tests.oracle.checkpoints import Checkpoint

Named = Callable[[str], Checkpoint]
RANK = 3
MODULES: dict[Projection, str] = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
PROMPT = [5, 77, 12, 99, 3, 64, 31]


class MergedSource(DirectorySource):
    """The checkpoint with W + B A in place of W."""

    def __init__(self, path: Path, adapter: dict[tuple[int, Projection], LowRank]) -> None:
        super().__init__(path)
        self._deltas = {
            f"model.layers.{layer}.{MODULES[projection]}.weight": weights.b @ weights.a
            for (layer, projection), weights in adapter.items()
        }

    def read(self, name: str, dim: int | None = None, spans: Sequence[Span] = ()) -> Tensor:
        tensor = super().read(name, dim, spans)
        if name not in self._deltas:
            return tensor
        delta = self._deltas[name]
        if dim is not None:
            delta = torch.cat([delta.narrow(dim, span.start, len(span)) for span in spans], dim)
        return tensor + delta


def make_adapter(source: DirectorySource) -> dict[tuple[int, Projection], LowRank]:
    """Random, on every projection of layers 0, 2 and 3."""
    generator = torch.Generator().manual_seed(11)
    adapter = {}
    for layer in (0, 2, 3):
        for projection, module in MODULES.items():
            rows, columns = source.shape(f"model.layers.{layer}.{module}.weight")
            a = torch.randn(RANK, columns, generator=generator) * 0.2
            adapter[layer, projection] = LowRank(a, torch.randn(rows, RANK, generator=generator) * 0.2)
    return adapter


def step(number: int, token_ids: Sequence[Sequence[int]], start: int, adapters: Sequence[int]) -> RunStep:
    parts = tuple(
        SequencePart(
            sequence_id=SequenceId(i),
            token_ids=tuple(ids),
            start=start,
            block_table=(2 * i, 2 * i + 1, 20 + i),
            sample=SamplingParams(),
            adapter=adapters[i],
        )
        for i, ids in enumerate(token_ids)
    )
    return RunStep(epoch=Epoch(0, 0), step=number, parts=parts, timeout_s=30)


def logits_of(replica: LoopbackReplica, adapters: Sequence[int]) -> Tensor:
    """Of a prompt and two more tokens, for as many equal sequences as there are adapters given."""
    count = len(adapters)
    results = [replica.run_with_logits(step(0, [PROMPT] * count, 0, adapters))]
    for i, token in enumerate((50, 60)):
        results.append(replica.run_with_logits(step(1 + i, [[token]] * count, len(PROMPT) + i, adapters)))
    return torch.stack([result.logits for result in results], 1)  # [sequences, 3, vocabulary]


def load(stage: Stage, checkpoint: Checkpoint, adapter: dict[tuple[int, Projection], LowRank]) -> None:
    spec = read_spec(checkpoint.config, "float32")
    stage.adapters.put(1, shard_adapter(adapter, spec, stage.assignment))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("weights", [[(1.0,)], [(2.0, 1.0)], [(1.0,), (1.0, 1.0, 2.0)]], ids=["tp1", "tp2", "pp2-tp3"])
def test_a_batch_that_mixes_adapters_equals_runs_with_merged_weights(
    checkpoint_named: Named, name: str, weights: list[tuple[float, ...]]
) -> None:
    checkpoint = checkpoint_named(name)
    source = DirectorySource(checkpoint.path)
    adapter = make_adapter(source)
    layout = assignments(checkpoint.config, weights)
    replica = LoopbackReplica(checkpoint.config, source, layout)
    for stage in (stage for ranks in replica.stages for stage in ranks):
        load(stage, checkpoint, adapter)
    mixed = logits_of(replica, [0, 1, 0])

    merged = LoopbackReplica(
        checkpoint.config, MergedSource(checkpoint.path, adapter), assignments(checkpoint.config, [(1.0,)])
    )
    plain = LoopbackReplica(checkpoint.config, source, assignments(checkpoint.config, [(1.0,)]))
    with_adapter, without = logits_of(merged, [0])[0], logits_of(plain, [0])[0]
    scale = without.abs().max().clamp(min=1)
    assert (with_adapter - without).abs().max() / scale > 0.01
    for got, expected in zip(mixed, (without, with_adapter, without), strict=True):
        assert (got - expected).abs().max() / scale <= 1e-4


def test_an_adapter_that_is_not_loaded_is_refused(checkpoint_named: Named) -> None:
    checkpoint = checkpoint_named("llama")
    layout = assignments(checkpoint.config, [(1.0,)])
    replica = LoopbackReplica(checkpoint.config, DirectorySource(checkpoint.path), layout)
    with pytest.raises(StepRejected, match="adapter 1 isn't loaded"):
        replica.run(step(0, [PROMPT], 0, [1]))
    stage = replica.stages[0][0]
    load(stage, checkpoint, make_adapter(DirectorySource(checkpoint.path)))
    replica.run(step(0, [PROMPT], 0, [1]))
    stage.adapters.remove(1)
    with pytest.raises(StepRejected, match="adapter 1 isn't loaded"):
        replica.run(step(1, [PROMPT], 0, [1]))
