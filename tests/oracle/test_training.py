"""Gradients of lean stages against transformers' own, with the low-rank additions written out by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from skynet.errors import StepRejected, UnsupportedArchitecture
from skynet.models.config import read_spec
from skynet.models.tensors import DirectorySource
from skynet.protocol.ids import SequenceId
from skynet.protocol.plan import Epoch
from skynet.protocol.steps import RunStep, SequencePart
from skynet.testing.loopback import LoopbackGroup, run_ranks
from skynet.testing.replica import LoopbackReplica, assignments
from skynet.worker.collectives import Collective, SoloGroup, copy_to_ranks, sum_gradients
from skynet.worker.stage.adapters import LowRank, Projection, shard_adapter
from skynet.worker.stage.loader import load_stage
from skynet.worker.stage.matrix import PackedMatrix, PlainMatrix, make_matrix
from tests.oracle.checkpoints import Checkpoint
from tests.oracle.scenario import make_step, run_scenario
from tests.oracle.test_adapters import MODULES

Named = Callable[[str], Checkpoint]
Adapter = dict[tuple[int, Projection], LowRank]
CPU = torch.device("cpu")
SEQUENCES = ([5, 77, 12, 99, 3, 64, 31, 8, 120], [44, 7, 125, 19, 81], [17], [60, 23, 88, 41])
ADAPTERS = (1, 0, 1, 2)  # of each sequence
STEP = RunStep(
    epoch=Epoch(0, 0),
    step=0,
    timeout_s=30,
    parts=tuple(
        SequencePart(
            sequence_id=SequenceId(i), token_ids=tuple(ids), start=0, block_table=(3 * i, 3 * i + 1, 3 * i + 2),
            sample=None, adapter=ADAPTERS[i],
        )
        for i, ids in enumerate(SEQUENCES)
    ),
)  # fmt: skip


def adapters_for(source: DirectorySource, projections: tuple[Projection, ...]) -> dict[int, Adapter]:
    """Two, of ranks 3 and 2, on layers 0, 2 and 3."""
    generator = torch.Generator().manual_seed(11)
    made: dict[int, Adapter] = {}
    for number, rank in ((1, 3), (2, 2)):
        made[number] = {}
        for layer in (0, 2, 3):
            for projection in projections:
                rows, columns = source.shape(f"model.layers.{layer}.{MODULES[projection]}.weight")
                a = torch.randn(rank, columns, generator=generator) * 0.2
                made[number][layer, projection] = LowRank(a, torch.randn(rows, rank, generator=generator) * 0.2)
    return made


def trainable(adapters: Mapping[int, Adapter]) -> dict[int, Adapter]:
    """A copy whose matrices collect gradients."""
    return {
        number: {
            key: LowRank(a.clone().requires_grad_(), b.clone().requires_grad_()) for key, (a, b) in adapter.items()
        }
        for number, adapter in adapters.items()
    }


def matrices(adapters: Mapping[int, Adapter]) -> list[Tensor]:
    return [matrix for adapter in adapters.values() for low_rank in adapter.values() for matrix in low_rank]


class Gradients(NamedTuple):
    logits: Tensor  # [T, vocabulary]
    adapters: list[Tensor]
    hidden: Tensor  # [T, D], of the hidden states that enter layer 2


def expected(checkpoint: Checkpoint, adapters: dict[int, Adapter], weights: Tensor) -> Gradients:
    """What transformers gives for each sequence by itself; the loss is the sum of `weights` times the logits."""
    logits, hidden, row = [], [], 0
    adapters = trainable(adapters)
    for ids, number in zip(SEQUENCES, ADAPTERS, strict=True):
        hooks = [
            checkpoint.model.get_submodule(f"model.layers.{layer}.{MODULES[projection]}").register_forward_hook(
                partial(_add, low_rank)
            )
            for (layer, projection), low_rank in adapters.get(number, {}).items()
        ]
        embedded = checkpoint.model.get_input_embeddings()(torch.tensor([ids])).detach().requires_grad_()
        out = checkpoint.model(inputs_embeds=embedded, output_hidden_states=True)
        out.hidden_states[2].retain_grad()
        (out.logits[0] * weights[row : row + len(ids)]).sum().backward()
        logits.append(out.logits[0].detach())
        hidden.append(out.hidden_states[2].grad[0])
        row += len(ids)
        for hook in hooks:
            hook.remove()
    return Gradients(torch.cat(logits), [_grad(m) for m in matrices(adapters)], torch.cat(hidden))


def _add(low_rank: LowRank, _module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    return output + inputs[0] @ low_rank.a.T @ low_rank.b.T


def _grad(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def ours(checkpoint: Checkpoint, adapters: dict[int, Adapter], weights: Tensor, shares: tuple[float, ...]) -> Gradients:
    """Of two stages, layers 0-1 and 2-3, each of as many ranks as there are shares."""
    layout = assignments(checkpoint.config, [shares, shares])
    source = DirectorySource(checkpoint.path)
    stages = [[load_stage(checkpoint.config, rank, source, CPU) for rank in ranks] for ranks in layout]

    def run(group: Collective) -> Gradients:
        held = trainable(adapters)
        first, last = stages[0][group.rank], stages[1][group.rank]
        for stage in (first, last):
            spec = read_spec(checkpoint.config, "float32")
            for number, adapter in held.items():
                stage.adapters.put(number, shard_adapter(adapter, spec, stage.assignment))
        handed_on = first.forward(first.check(STEP), None, group)
        hidden = handed_on.detach().requires_grad_()
        out = last.forward(last.check(STEP, hidden), hidden, group)
        vocab = last.vocab
        logits = last.logits(copy_to_ranks(out, group), range(len(out)))
        (logits * weights[:, vocab.start : vocab.end]).sum().backward()
        handed_on.backward(hidden.grad)
        sum_gradients(matrices(held), group)
        return Gradients(logits.detach(), [_grad(m) for m in matrices(held)], _grad(hidden))

    if len(shares) == 1:
        return run(SoloGroup())
    ranks = run_ranks(LoopbackGroup.create(len(shares), timeout_s=20), run)
    for rank in ranks[1:]:
        assert torch.equal(rank.hidden, ranks[0].hidden), "ranks hand the same gradient to the stage before"
        assert all(map(torch.equal, rank.adapters, ranks[0].adapters)), "optimizers of all ranks see the same gradients"
    return ranks[0]._replace(logits=torch.cat([rank.logits for rank in ranks], -1))


def distance(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-3))


ALL = tuple(MODULES)


SHARES = {"tp1": (1.0,), "tp2": (2.0, 1.0), "tp3-shared-kv-heads": (1.0, 1.0, 6.0), "tp2-one-empty": (1.0, 1e-9)}


@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize(
    ("name", "projections"),
    [("llama", ALL), ("qwen3", ALL), ("mistral", ALL), ("qwen3_moe", ("q", "k", "v", "o"))],
)
def test_gradients_of_adapters_and_hidden_states_equal_those_of_transformers(
    checkpoint_named: Named, name: str, projections: tuple[Projection, ...], shares: tuple[float, ...]
) -> None:
    checkpoint = checkpoint_named(name)
    adapters = adapters_for(DirectorySource(checkpoint.path), projections)
    weights = torch.randn(sum(map(len, SEQUENCES)), 131, generator=torch.Generator().manual_seed(3))
    wanted, got = expected(checkpoint, adapters, weights), ours(checkpoint, adapters, weights, shares)
    assert distance(got.logits, wanted.logits) <= 1e-4
    assert distance(got.hidden, wanted.hidden) <= 1e-4
    assert max(map(distance, got.adapters, wanted.adapters)) <= 1e-4
    assert min(float(grad.abs().max()) for grad in wanted.adapters) > 1e-3


def test_a_training_pass_between_two_answers_changes_nothing_of_them(checkpoint_named: Named) -> None:
    """Neither caches nor logits, to the bit; and the layers' own weights collect no gradients."""
    checkpoint = checkpoint_named("qwen3")
    source = DirectorySource(checkpoint.path)
    replica = LoopbackReplica(checkpoint.config, source, assignments(checkpoint.config, [(1.0,)]))
    _, before = run_scenario(replica)
    stage = replica.stages[0][0]
    cache = [stage.cache.layer(layer).clone() for layer in range(4)]
    held = trainable(adapters_for(source, ALL))
    for number, adapter in held.items():
        stage.adapters.put(number, adapter)
    stage.forward(stage.check(STEP), None, SoloGroup()).square().sum().backward()
    assert all(float(_grad(matrix).abs().max()) > 0 for matrix in matrices(held))
    assert all(torch.equal(stage.cache.layer(layer), kept) for layer, kept in enumerate(cache))
    assert torch.equal(run_scenario(replica)[1], before)


def test_without_a_cache_a_part_must_begin_its_sequence(checkpoint_named: Named) -> None:
    checkpoint = checkpoint_named("qwen3")
    assignment = assignments(checkpoint.config, [(1.0,)])[0][0]
    stage = load_stage(checkpoint.config, assignment, DirectorySource(checkpoint.path), CPU)
    with pytest.raises(StepRejected, match="begins at position 3; with gradients"):
        stage.forward(stage.check(make_step(0, [(0, [5, 6], 3, False)])), None, SoloGroup())


def test_layers_that_are_not_ours_refuse_to_be_trained(checkpoint_named: Named) -> None:
    checkpoint = checkpoint_named("gpt2")
    assignment = assignments(checkpoint.config, [(1.0,)])[0][0]
    stage = load_stage(checkpoint.config, assignment, DirectorySource(checkpoint.path), CPU)
    with pytest.raises(UnsupportedArchitecture, match="gpt2"):
        stage.forward(stage.check(make_step(0, [(0, [5, 6], 0, False)])), None, SoloGroup())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_pass_a_packed_matrix_as_they_pass_a_plain_one(dtype: torch.dtype) -> None:
    weight, bias, x = torch.randn(70, 48).to(dtype), torch.randn(70).to(dtype), torch.randn(5, 48).to(dtype)
    packed = make_matrix(weight.clone(), bias)
    if not isinstance(packed, PackedMatrix):
        pytest.skip(f"no packed form of {dtype} on this machine")
    grads = []
    for matrix in (packed, PlainMatrix(weight, bias)):
        leaf = x.clone().requires_grad_()
        matrix(leaf).square().sum().backward()
        grads.append(_grad(leaf).float())
    assert distance(grads[0], grads[1]) <= (1e-5 if dtype == torch.float32 else 3e-2)
