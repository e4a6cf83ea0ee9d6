"""A stage beside its arithmetic: what it refuses, reports, hands over, and doesn't import."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from skynet.errors import ModelError, StepRejected, UnsupportedArchitecture, WeightError
from skynet.models.config import read_spec
from skynet.models.tensors import DirectorySource
from skynet.protocol.plan import Span
from skynet.testing.replica import LoopbackReplica, assignments
from skynet.worker.collectives import SoloGroup
from skynet.worker.stage.adapters import LowRank, shard_adapter
from skynet.worker.stage.loader import load_stage
from tests.oracle.checkpoints import Checkpoint
from tests.oracle.scenario import LONG, make_step, run_scenario

Named = Callable[[str], Checkpoint]
CPU = torch.device("cpu")


@pytest.mark.parametrize("hidden", [None, torch.zeros(3, 63), torch.zeros(2, 64), torch.zeros(3, 64).bfloat16()])
def test_hidden_states_that_do_not_fit_the_step_are_refused(checkpoint_named: Named, hidden: Tensor | None) -> None:
    checkpoint = checkpoint_named("llama")
    assignment = assignments(checkpoint.config, [(1.0,), (1.0,)])[1][0]
    stage = load_stage(checkpoint.config, assignment, DirectorySource(checkpoint.path), CPU)
    with pytest.raises(StepRejected, match=r"needs hidden states torch.float32\[3, 64\]"):
        stage.run(make_step(0, [(1, [1, 2, 3], 0, True)]), hidden, SoloGroup())


def test_a_refused_step_leaves_the_cache_as_it_was(checkpoint_named: Named) -> None:
    checkpoint = checkpoint_named("qwen3")
    replica = LoopbackReplica(
        checkpoint.config, DirectorySource(checkpoint.path), assignments(checkpoint.config, [(1.0,)])
    )
    replica.run(make_step(0, [(0, LONG, 0, True)]))
    cache = replica.stages[0][0].cache
    before = [cache.layer(i).clone() for i in range(4)]
    with pytest.raises(StepRejected):
        replica.run(make_step(1, [(0, [1], len(LONG), True), (1, [131], 0, True)]))
    assert all(torch.equal(cache.layer(i), layer) for i, layer in enumerate(before))


def test_ranks_hold_between_them_each_matrix_once(checkpoint_named: Named) -> None:
    checkpoint = checkpoint_named("qwen2")
    source = DirectorySource(checkpoint.path)
    seen: list[int] = []
    alone = load_stage(checkpoint.config, assignments(checkpoint.config, [(1.0,)])[0][0], source, CPU, seen.append)
    pair = [load_stage(checkpoint.config, a, source, CPU) for a in assignments(checkpoint.config, [(3.0, 1.0)])[0]]
    assert seen == sorted(seen)
    assert seen[-1] >= alone.weight_bytes  # norms are read, and too small to be counted
    assert seen[-1] - alone.weight_bytes <= 9 * 64 * 4
    o_bias_free = sum(stage.weight_bytes for stage in pair)
    assert o_bias_free == alone.weight_bytes
    assert sum(stage.kv_bytes for stage in pair) == alone.kv_bytes


class WithoutTensor:
    """A checkpoint that lacks one tensor, or has it in another shape."""

    def __init__(self, path: Path, name: str, shape: tuple[int, ...] | None) -> None:
        self._source, self._name, self._shape = DirectorySource(path), name, shape

    def names(self) -> frozenset[str]:
        return self._source.names() - ({self._name} if self._shape is None else set())

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shape if name == self._name and self._shape else self._source.shape(name)

    def read(self, name: str, dim: int | None = None, spans: Sequence[Span] = ()) -> Tensor:
        return self._source.read(name, dim, spans)


@pytest.mark.parametrize(("shape", "reason"), [(None, "has no tensor"), ((64, 95), r"is \[64, 95\]")])
def test_a_missing_or_misshapen_tensor_is_named(
    checkpoint_named: Named, shape: tuple[int, ...] | None, reason: str
) -> None:
    checkpoint = checkpoint_named("llama")
    name = "model.layers.2.mlp.down_proj.weight"
    source = WithoutTensor(checkpoint.path, name, shape)
    with pytest.raises(WeightError, match=rf"{name}.*{reason}|{reason} {name}"):
        load_stage(checkpoint.config, assignments(checkpoint.config, [(1.0,)])[0][0], source, CPU)


def test_a_truncated_weight_file_is_named_with_the_fix(checkpoint_named: Named, tmp_path: Path) -> None:
    whole = (checkpoint_named("llama").path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightError, match=r"model\.safetensors.*fetch it again"):
        DirectorySource(tmp_path)


def test_a_plan_for_another_model_is_refused(checkpoint_named: Named) -> None:
    checkpoint = checkpoint_named("llama")
    other = {**checkpoint.config, "num_hidden_layers": 3}
    assignment = assignments(checkpoint.config, [(1.0,)])[0][0]
    with pytest.raises(ModelError, match=r"layers up to 4, the model has 3"):
        load_stage(other, assignment, DirectorySource(checkpoint.path), CPU)


@pytest.mark.parametrize(("name", "projection"), [("gpt2", "q"), ("qwen3_moe", "up")])
def test_an_adapter_on_a_projection_that_takes_none_is_refused(
    checkpoint_named: Named, name: str, projection: str
) -> None:
    checkpoint = checkpoint_named(name)
    adapter = {(0, projection): LowRank(torch.zeros(1, 64), torch.zeros(40, 1))}
    with pytest.raises(UnsupportedArchitecture, match="adapters"):
        shard_adapter(
            adapter,  # type: ignore[arg-type]
            read_spec(checkpoint.config),
            assignments(checkpoint.config, [(1.0,)])[0][0],
        )


def test_blocks_that_follow_each_other_and_torn_ones_give_the_same_tokens(checkpoint_named: Named) -> None:
    """Both tables of the scenario hold the same sequence."""
    checkpoint = checkpoint_named("mistral")
    layout = assignments(checkpoint.config, [(1.0,)])
    replica = LoopbackReplica(checkpoint.config, DirectorySource(checkpoint.path), layout)
    result = replica.run_with_logits(make_step(0, [(0, LONG[:20], 0, True), (1, LONG[:20], 0, True)]))
    assert torch.allclose(result.logits[0], result.logits[1], atol=1e-5)
    result = replica.run_with_logits(make_step(1, [(0, LONG[20:21], 20, True), (1, LONG[20:21], 20, True)]))
    assert torch.allclose(result.logits[0], result.logits[1], atol=1e-5)


def test_lean_stages_import_nothing_of_transformers(checkpoint_named: Named) -> None:
    checkpoint = checkpoint_named("qwen3")
    code = (
        "import json, pathlib, sys, torch; from skynet.models.tensors import DirectorySource;"
        "from skynet.testing.replica import assignments; from skynet.worker.stage.loader import load_stage;"
        f"path = pathlib.Path({str(checkpoint.path)!r}); config = json.loads((path / 'config.json').read_text());"
        "load_stage(config, assignments(config, [(1.0,)])[0][0], DirectorySource(path), torch.device('cpu'));"
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_the_scenario_is_repeatable_to_the_bit(checkpoint_named: Named) -> None:
    checkpoint = checkpoint_named("qwen3_moe")
    runs = []
    for _ in range(2):
        layout = assignments(checkpoint.config, [(1.0, 2.0)])
        runs.append(run_scenario(LoopbackReplica(checkpoint.config, DirectorySource(checkpoint.path), layout)))
    assert torch.equal(runs[0][1], runs[1][1])
