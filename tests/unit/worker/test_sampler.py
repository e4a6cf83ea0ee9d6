"""The sampler's choices depend on logits and key alone, and follow the distributions they are asked for."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from skynet.protocol.plan import Span
from skynet.protocol.steps import SamplingParams
from skynet.testing.loopback import LoopbackGroup, run_ranks
from skynet.worker.collectives import SoloGroup
from skynet.worker.stage.batch import Sample
from skynet.worker.stage.sampler import Sampled, gumbel_noise, sample

VOCAB = 37
GOLDEN = [1.2217504218391175, -0.031173686123884766, 0.7949567298661121]
KINDS = [
    SamplingParams(),
    SamplingParams(temperature=0.8, seed=3),
    SamplingParams(temperature=1.3, top_k=5, seed=2**63),
    SamplingParams(temperature=1.0, top_p=0.7, seed=9, index=4),
    SamplingParams(temperature=2.0, top_k=11, top_p=0.9, seed=1),
    SamplingParams(temperature=0.5, top_k=1, seed=1),
    SamplingParams(temperature=0.5, top_k=500, top_p=0.5, seed=1),
]


def wanted(params: Sequence[SamplingParams], position: int = 10) -> list[Sample]:
    return [Sample(row, position, p) for row, p in enumerate(params)]


def sample_split(logits: Tensor, samples: list[Sample], edges: Sequence[int]) -> Sampled:
    spans = [Span(a, b) for a, b in itertools.pairwise(edges)]

    def work(group: LoopbackGroup) -> Sampled | None:
        span = spans[group.rank]
        return sample(logits[:, span.start : span.end], samples, span, group)

    results = run_ranks(LoopbackGroup.create(len(spans)), work)
    assert results[1:] == [None] * (len(spans) - 1)
    assert results[0] is not None
    return results[0]


@pytest.mark.parametrize("edges", [(0, 20, VOCAB), (0, 3, 3, 30, VOCAB), (0, 0, VOCAB), (0, 1, 2, 3, VOCAB)])
def test_any_split_of_the_vocabulary_chooses_the_same_tokens(edges: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    for position in range(20):
        logits = torch.randn(len(KINDS), VOCAB, generator=generator)
        samples = wanted(KINDS, position)
        alone = sample(logits, samples, Span(0, VOCAB), SoloGroup())
        assert sample_split(logits, samples, edges) == alone


def test_a_choice_does_not_depend_on_the_rest_of_the_batch() -> None:
    logits = torch.randn(len(KINDS), VOCAB, generator=torch.Generator().manual_seed(1))
    together = sample(logits, wanted(KINDS), Span(0, VOCAB), SoloGroup())
    assert together is not None
    for i, params in enumerate(KINDS):
        alone = sample(logits[i : i + 1], [Sample(0, 10, params)], Span(0, VOCAB), SoloGroup())
        assert alone == ((together.token_ids[i],), ())


@pytest.mark.parametrize("edges", [(0, VOCAB), (0, 15, VOCAB)])
def test_equal_logits_go_to_the_lowest_id(edges: tuple[int, ...]) -> None:
    logits = torch.zeros(2, VOCAB)
    logits[0, [7, 21]] = 5.0
    samples = wanted([SamplingParams(), SamplingParams(temperature=1, top_k=1)])
    assert sample_split(logits, samples, edges).token_ids == (7, 0)


def test_the_same_key_gives_the_same_noise_whatever_span_is_asked_for() -> None:
    params = SamplingParams(temperature=1, seed=12, index=3)
    whole = gumbel_noise(params, 100, Span(0, 64))
    for span in (Span(0, 1), Span(5, 9), Span(31, 64), Span(8, 8)):
        assert np.array_equal(gumbel_noise(params, 100, span), whole[span.start : span.end])
    for other in (SamplingParams(temperature=1, seed=13, index=3), SamplingParams(temperature=1, seed=12, index=4)):
        assert not np.array_equal(gumbel_noise(other, 100, Span(0, 64)), whole)
    assert not np.array_equal(gumbel_noise(params, 101, Span(0, 64)), whole)


def test_the_noise_of_a_key_never_changes() -> None:
    """Golden values: a running answer is continued by another version of this package."""
    noise = gumbel_noise(SamplingParams(temperature=1, seed=1, index=2), 3, Span(0, 3))
    assert noise.tolist() == pytest.approx(GOLDEN, rel=1e-12)


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        ({}, 8),
        ({"top_k": 3}, 3),
        ({"top_p": 0.6}, None),
    ],
)
def test_frequencies_follow_the_distribution(params: dict[str, float], allowed: int | None) -> None:
    logits = torch.tensor([[2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5]])
    temperature = 0.9
    p = torch.softmax(logits[0].double() / temperature, 0).numpy()
    if allowed is None:  # the fewest that reach top_p
        allowed = int(np.searchsorted(np.cumsum(p), 0.6)) + 1
    p[allowed:] = 0
    p /= p.sum()
    count = 4000
    seen = np.zeros(8)
    for position in range(count):
        chosen = Sample(0, position, SamplingParams(temperature=temperature, seed=5, **params))  # type: ignore[arg-type]
        result = sample(logits, [chosen], Span(0, 8), SoloGroup())
        assert result is not None
        seen[result.token_ids[0]] += 1
    assert seen[allowed:].sum() == 0
    deviation = (seen - count * p)[:allowed] / np.sqrt(count * p[:allowed] * (1 - p[:allowed]))
    assert np.abs(deviation).max() < 4


def test_logits_that_are_not_finite_still_give_a_token_of_the_vocabulary() -> None:
    logits = torch.full((len(KINDS), VOCAB), float("nan"))
    logits[:, 3] = float("-inf")
    result = sample(logits, wanted(KINDS), Span(0, VOCAB), SoloGroup())
    assert result is not None
    assert all(0 <= token < VOCAB for token in result.token_ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_takes_the_largest_in_every_dtype(dtype: torch.dtype) -> None:
    logits = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(4)).to(dtype)
    samples = wanted([SamplingParams()] * 5)
    expected = tuple(logits.float().argmax(-1).tolist())
    assert sample(logits, samples, Span(0, VOCAB), SoloGroup()) == (expected, ())
    assert sample_split(logits, samples, (0, 11, VOCAB)) == (expected, ())
