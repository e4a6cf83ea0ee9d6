"""One run through all that a replica has to do: chunked prefill, mixed batches, batched decode, torn blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from skynet.models.tensors import DirectorySource, TensorSource
from skynet.protocol.ids import SequenceId
from skynet.protocol.plan import Dtype, Epoch
from skynet.protocol.steps import RunStep, SamplingParams, SequencePart
from skynet.testing.replica import GroupWrapper, LoopbackReplica, StepResult, assignments
from tests.oracle.checkpoints import Checkpoint

LONG = [5, 77, 12, 99, 3, 64, 31, 8, 120, 45, 17, 60, 23, 88, 41, 2, 110, 9, 54, 70, 33, 6, 101]
SHORT = [44, 7, 125, 19, 81]
TABLES = (tuple(range(8, 20)), (3, 30, 1, 25, 40, 2))  # consecutive blocks, and torn ones
NEW_TOKENS = 5


def make_step(number: int, parts: Sequence[tuple[int, Sequence[int], int, bool]], adapter: int = 0) -> RunStep:
    """parts: (sequence, token ids, start, whether it samples)."""
    return RunStep(
        epoch=Epoch(1, 0),
        step=number,
        timeout_s=30,
        parts=tuple(
            SequencePart(
                sequence_id=SequenceId(which),
                token_ids=tuple(ids),
                start=start,
                block_table=TABLES[which],
                sample=SamplingParams() if samples else None,
                adapter=adapter,
            )
            for which, ids, start, samples in parts
        ),
    )


def run_scenario(replica: LoopbackReplica) -> tuple[tuple[list[int], list[int]], Tensor]:
    """Both sequences with their continuations, and the logits of each sampled token in order of sampling."""
    sequences = (list(LONG), list(SHORT))
    logits = []
    replica.run(make_step(0, [(0, LONG[:13], 0, False)]))
    replica.run(make_step(1, [(0, LONG[13:14], 13, False)]))  # one row alone
    result = replica.run_with_logits(make_step(2, [(0, LONG[14:], 14, True), (1, SHORT, 0, True)]))
    for number in range(3, 3 + NEW_TOKENS):
        logits.append(result.logits)
        for sequence, token in zip(sequences, result.token_ids, strict=True):
            sequence.append(token)
        last = [(which, [sequence[-1]], len(sequence) - 1, True) for which, sequence in enumerate(sequences)]
        if number % 2:  # together
            result = replica.run_with_logits(make_step(number, last))
        else:  # each alone
            each = [replica.run_with_logits(make_step(number, [one])) for one in last]
            tokens, rows = zip(*each, strict=True)
            result = StepResult(sum(tokens, ()), torch.cat(rows))
    return sequences, torch.stack(logits, 1)  # [2, NEW_TOKENS, vocabulary]


def expected_logits(checkpoint: Checkpoint, sequences: tuple[list[int], list[int]]) -> Tensor:
    """What transformers gives for the same positions of the same tokens."""
    rows = []
    for prompt, sequence in zip((LONG, SHORT), sequences, strict=True):
        rows.append(checkpoint.logits(sequence[:-1])[len(prompt) - 1 :])
    return torch.stack(rows)


class Measured(NamedTuple):
    """A layout beside transformers; distances of logits in units of max(1, max |logit|)."""

    distance: float  # the largest
    mean_distance: float
    tokens_agree: bool  # each greedy choice is transformers' own


def measure(
    checkpoint: Checkpoint,
    weights: Sequence[Sequence[float]],
    *,
    dtype: Dtype = "float32",
    source: TensorSource | None = None,
    wrap: GroupWrapper | None = None,
) -> Measured:
    """Runs the scenario in a layout."""
    layout = assignments(checkpoint.config, weights, dtype=dtype)
    replica = LoopbackReplica(checkpoint.config, source or DirectorySource(checkpoint.path), layout, wrap)
    sequences, logits = run_scenario(replica)
    expected = expected_logits(checkpoint, sequences)
    chosen = torch.tensor([s[len(p) :] for s, p in zip(sequences, (LONG, SHORT), strict=True)])
    distances = (logits - expected).abs() / expected.abs().max().clamp(min=1)
    return Measured(float(distances.max()), float(distances.mean()), torch.equal(expected.argmax(-1), chosen))
