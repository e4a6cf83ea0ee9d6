"""Whole replicas with every way of sampling against transformers' logits and its logits processors, in fp32."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from skynet.coordinator.scheduler import Scheduler, SchedulerConfig
from skynet.coordinator.scheduler import Sequence as Answer
from skynet.models.tensors import DirectorySource
from skynet.protocol.ids import SequenceId
from skynet.protocol.plan import Epoch, Span
from skynet.protocol.steps import Penalties, RunStep, SamplingParams, TokenLogprobs
from skynet.testing.replica import LoopbackReplica, assignments
from skynet.worker.stage.sampler import gumbel_noise
from tests.oracle.checkpoints import Checkpoint

Named = Callable[[str], Checkpoint]
PROMPT = [5, 77, 12, 99, 3, 64, 31, 8, 120, 45, 17, 60, 5, 5, 77]
NUM_TOKENS = 12
VOCAB = 131
Layout = Sequence[Sequence[float]]
LAYOUTS: dict[str, Layout] = {
    "1": [(1.0,)],
    "2": [(5.0, 1.0)],
    "3": [(2.0, 5.0, 3.0)],
    "3-one-empty": [(1.0,), (2.0, 0.0, 3.0)],
}
EVERYTHING = SamplingParams(
    temperature=1.4, top_k=40, top_p=0.95, min_p=0.02, seed=5, logprobs=4,
    penalties=Penalties(repetition=1.2, presence=0.3, frequency=0.4), logit_bias=((17, 3.5), (60, -100.0)),
)  # fmt: skip
WAYS = {
    "greedy": SamplingParams(),
    "temperature": SamplingParams(temperature=1.5, seed=1),
    "top-k": SamplingParams(temperature=1.5, top_k=9, seed=2),
    "top-p": SamplingParams(temperature=1.5, top_p=0.6, seed=3),
    "min-p": SamplingParams(temperature=2.0, min_p=0.2, seed=4),
    "top-p-then-min-p": SamplingParams(temperature=2.0, top_p=0.9, min_p=0.15, seed=4),
    "top-k-then-min-p": SamplingParams(temperature=3.0, top_k=30, min_p=0.3, seed=4),
    "repetition": SamplingParams(penalties=Penalties(repetition=1.7)),
    "repetition-sampled": SamplingParams(temperature=1.0, seed=6, penalties=Penalties(repetition=0.6)),
    "presence": SamplingParams(penalties=Penalties(presence=2.0)),
    "frequency": SamplingParams(penalties=Penalties(frequency=1.5)),
    "frequency-negative": SamplingParams(temperature=1.0, seed=7, penalties=Penalties(frequency=-2.0, presence=-1)),
    "bias": SamplingParams(logit_bias=((0, 4.0), (45, 6.0), (46, 6.0), (130, 5.0))),
    "bias-bans": SamplingParams(temperature=0.7, seed=8, logit_bias=tuple((i, -100.0) for i in range(0, VOCAB, 2))),
    "logprobs": SamplingParams(logprobs=20),
    "logprobs-of-the-chosen-alone": SamplingParams(temperature=1.0, seed=9, logprobs=0),
    "everything": EVERYTHING,
    "everything-greedy": SamplingParams(
        logprobs=2, penalties=EVERYTHING.penalties, logit_bias=EVERYTHING.logit_bias, min_p=0.1, top_p=0.5
    ),
}


class Harness:
    """A scheduler and a replica in one process; `move` is a loss: another layout, with an empty cache."""

    def __init__(self, checkpoint: Checkpoint, weights: Layout) -> None:
        self._checkpoint = checkpoint
        self.scheduler = Scheduler(SchedulerConfig(num_blocks=64, block_size=4, max_step_tokens=8, max_running=8))
        self.logprobs: dict[SequenceId, list[TokenLogprobs | None]] = {}
        self._number = 0
        self.move(weights)

    def move(self, weights: Layout) -> None:
        self.scheduler.reset()
        layout = assignments(self._checkpoint.config, weights)
        self._replica = LoopbackReplica(self._checkpoint.config, DirectorySource(self._checkpoint.path), layout)

    def step(self) -> None:
        formed = self.scheduler.form_step(0)
        assert formed is not None
        self._number += 1
        run = RunStep(epoch=Epoch(1, 0), step=self._number, parts=formed.parts, timeout_s=30)
        sampled = self._replica.sample(run)
        for progress in self.scheduler.apply(formed, sampled.token_ids, 0, sampled.logprobs):
            self.logprobs.setdefault(progress.sequence_id, []).append(progress.logprobs)

    def run(self) -> None:
        while self.scheduler.num_sequences:
            self.step()


def answer(params: SamplingParams, sequence_id: int = 1) -> Answer:
    return Answer(
        sequence_id=SequenceId(sequence_id), user="u", token_ids=list(PROMPT), num_prompt=len(PROMPT),
        max_tokens=NUM_TOKENS, eos_ids=frozenset(), sampling=params,
    )  # fmt: skip


def processed(logits: Tensor, params: SamplingParams, token_ids: list[int]) -> Tensor:
    """logits [1, vocabulary] after transformers' processors; presence and frequency, which it lacks, by definition."""
    ids, penalties = torch.tensor([token_ids]), params.penalties or Penalties()
    assert isinstance(ids, torch.LongTensor)
    before = LogitsProcessorList()
    if params.logit_bias:
        before.append(SequenceBiasLogitsProcessor([[[token_id], float(bias)] for token_id, bias in params.logit_bias]))
    if penalties.repetition != 1:
        before.append(RepetitionPenaltyLogitsProcessor(penalties.repetition))
    scores = before(ids, logits.clone())
    for token_id, count in Counter(token_ids[len(PROMPT) :]).items():
        scores[0, token_id] -= penalties.frequency * count + penalties.presence
    after = LogitsProcessorList()
    if params.temperature:
        after.append(TemperatureLogitsWarper(params.temperature))
    if params.temperature and params.top_k:
        after.append(TopKLogitsWarper(params.top_k))
    if params.temperature and params.top_p < 1:
        after.append(TopPLogitsWarper(params.top_p))
    if params.temperature and params.min_p:
        after.append(MinPLogitsWarper(params.min_p))
    return after(ids, scores)


def expected_token(scores: Tensor, params: SamplingParams, position: int) -> int:
    noise = torch.from_numpy(gumbel_noise(params, position, Span(0, VOCAB))) if params.temperature else 0
    return int((scores[0].double() + noise).argmax())


def check(checkpoint: Checkpoint, done: Answer, logprobs: list[TokenLogprobs | None]) -> None:
    """Each token and logprob of an answer is what transformers gives for the tokens before it."""
    logits = checkpoint.logits(done.token_ids[:-1])
    params = done.sampling
    for position in range(len(PROMPT), len(done.token_ids)):
        row, before = logits[position - 1], done.token_ids[:position]
        scores = processed(row[None], params, before)
        assert done.token_ids[position] == expected_token(scores, params, position)
        told = logprobs[position - len(PROMPT)]
        if params.logprobs is None:
            assert told is None
            continue
        assert told is not None
        expected = torch.log_softmax(row, -1)
        top = expected.topk(params.logprobs)
        close = partial(pytest.approx, abs=1e-4)
        assert told.logprob == close(float(expected[done.token_ids[position]]))
        assert list(told.top_ids) == top.indices.tolist()
        assert list(told.top_logprobs) == close(top.values.tolist())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_way_of_sampling_chooses_as_transformers_does(checkpoint_named: Named, layout: str) -> None:
    """All of them in one batch, which changes nothing for any."""
    checkpoint = checkpoint_named("llama")
    harness = Harness(checkpoint, LAYOUTS[layout])
    answers = {name: answer(params, i) for i, (name, params) in enumerate(WAYS.items(), 1)}
    for each in answers.values():
        harness.scheduler.add(each)
    harness.run()
    for each in answers.values():
        check(checkpoint, each, harness.logprobs[each.sequence_id])
    assert len({tuple(each.token_ids) for each in answers.values()}) > len(WAYS) - 4, "hardly any way has an effect"


@pytest.mark.parametrize("lost_after", [0, 1, 5, NUM_TOKENS - 1])
def test_an_answer_with_penalties_goes_on_alike_on_new_workers(checkpoint_named: Named, lost_after: int) -> None:
    checkpoint = checkpoint_named("llama")
    undisturbed, moved = answer(EVERYTHING), answer(EVERYTHING)
    for each, is_moved in ((undisturbed, False), (moved, True)):
        harness = Harness(checkpoint, LAYOUTS["1"])
        harness.scheduler.add(each)
        while is_moved and each.num_answered < lost_after:
            harness.step()
        if is_moved:
            harness.move(LAYOUTS["3"])
        harness.run()
        check(checkpoint, each, harness.logprobs[each.sequence_id])
    assert moved.token_ids == undisturbed.token_ids
