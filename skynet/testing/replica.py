"""A whole replica inside one process: every stage and rank with the real shard and collective code, over loopback."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from skynet.models.config import read_spec
from skynet.models.split import split_group
from skynet.models.tensors import TensorSource
from skynet.protocol.ids import PeerId, WorkerId
from skynet.protocol.plan import Dtype, LayerSpan, RankShare, StageAssignment
from skynet.protocol.steps import RunStep
from skynet.testing.loopback import LoopbackGroup, run_ranks
from skynet.worker.collectives import Collective
from skynet.worker.stage.loader import load_stage
from skynet.worker.stage.sampler import Sampled, sample
from skynet.worker.stage.stage import Stage

T = TypeVar("T")
GroupWrapper = Callable[[int, LoopbackGroup], Collective]  # (stage index, a rank's end) -> what that rank uses


class StepResult(NamedTuple):
    """What a step gave: the sampled ids, and the logits [n, vocabulary] they were sampled from, in float32."""

    token_ids: tuple[int, ...]
    logits: Tensor


def assignments(
    config: Mapping[str, object],
    weights: Sequence[Sequence[float]],
    *,
    dtype: Dtype = "float32",
    num_blocks: int = 64,
    block_size: int = 4,
) -> list[list[StageAssignment]]:
    """One assignment per stage and rank; `weights` has one list of shares per stage. Layers are spread evenly."""
    spec = read_spec(config, dtype)
    edges = [spec.num_layers * i // len(weights) for i in range(len(weights) + 1)]
    names = tuple(tuple(WorkerId(PeerId(f"s{s}r{r}")) for r in range(len(ranks))) for s, ranks in enumerate(weights))
    return [
        [
            StageAssignment(
                layers=LayerSpan(edges[s], edges[s + 1]),
                num_layers=spec.num_layers,
                stage_index=s,
                stages=names,
                rank=r,
                share=share,
                num_blocks=num_blocks,
                block_size=block_size,
                dtype=dtype,
            )
            for r, share in enumerate(split_group(spec, ranks))
        ]
        for s, ranks in enumerate(weights)
    ]


def with_shares(stage: Sequence[StageAssignment], shares: Sequence[RankShare]) -> list[StageAssignment]:
    """The same stage with other shares."""
    return [replace(rank, share=share) for rank, share in zip(stage, shares, strict=True)]


class LoopbackReplica:
    """Stages of a layout, run one after another; the ranks of a stage run in threads."""

    def __init__(
        self,
        config: Mapping[str, object],
        source: TensorSource,
        layout: Sequence[Sequence[StageAssignment]],
        wrap: GroupWrapper | None = None,
    ) -> None:
        cpu = torch.device("cpu")
        self.stages: list[list[Stage]] = [[load_stage(config, rank, source, cpu) for rank in ranks] for ranks in layout]
        self._groups = [LoopbackGroup.create(len(ranks)) for ranks in layout]
        self._wrap: GroupWrapper = wrap or (lambda _, group: group)

    def run(self, step: RunStep) -> tuple[int, ...]:
        """The sampled tokens. Raises StepRejected like any stage."""
        return self.sample(step).token_ids

    def sample(self, step: RunStep) -> Sampled:
        """The sampled tokens and their logprobs. Raises StepRejected like any stage."""
        hidden: Tensor | None = None
        for s in range(len(self.stages)):
            results = self._each_rank(s, partial(_run, step=step, hidden=hidden))
            if s < len(self.stages) - 1:
                hidden = _tensor(results[0])
        sampled = results[0]
        if not isinstance(sampled, Sampled) or any(result is not None for result in results[1:]):
            raise AssertionError(f"rank 0 alone gives tokens, got {results}")
        return sampled

    @torch.inference_mode()
    def run_with_logits(self, step: RunStep) -> StepResult:
        """Like `run`, and the logits beside it."""
        hidden: Tensor | None = None
        for s in range(len(self.stages) - 1):
            hidden = self._each_rank(s, partial(_forward, step=step, hidden=hidden))[0]

        def finish(stage: Stage, group: Collective) -> tuple[Sampled | None, Tensor]:
            with torch.inference_mode():
                batch = stage.check(step, hidden)
                rows = [wanted.row for wanted in batch.samples]
                logits = stage.logits(stage.forward(batch, hidden, group), rows)
                return sample(logits, batch.samples, stage.vocab, group), logits.float()

        results = self._each_rank(len(self.stages) - 1, finish)
        sampled = results[0][0] or Sampled(())
        return StepResult(sampled.token_ids, torch.cat([logits for _, logits in results], -1))

    def _each_rank(self, s: int, work: Callable[[Stage, Collective], T]) -> list[T]:
        return run_ranks(self._groups[s], lambda group: work(self.stages[s][group.rank], self._wrap(s, group)))


def _run(stage: Stage, group: Collective, *, step: RunStep, hidden: Tensor | None) -> Tensor | Sampled | None:
    return stage.run(step, hidden, group)


def _forward(stage: Stage, group: Collective, *, step: RunStep, hidden: Tensor | None) -> Tensor:
    with torch.inference_mode():
        return stage.forward(stage.check(step, hidden), hidden, group)


def _tensor(result: object) -> Tensor:
    assert isinstance(result, Tensor)
    return result
