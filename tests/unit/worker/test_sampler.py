"""The sampler's choices depend on logits and key alone, and follow the distributions they are asked for."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skynet.protocol.plan import Span
from skynet.protocol.steps import Penalties, SamplingParams, SeenTokens
from skynet.testing.loopback import LoopbackGroup, run_ranks
from skynet.worker.collectives import SoloGroup
from skynet.worker.stage.batch import Sample
from skynet.worker.stage.candidates import BadCandidates
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


biases = st.lists(st.tuples(st.integers(0, VOCAB - 1), st.floats(-100, 100)), max_size=6, unique_by=lambda b: b[0])
penalties = st.builds(
    Penalties, repetition=st.floats(0.01, 3), presence=st.floats(-2, 2), frequency=st.floats(-2, 2)
) | st.none()  # fmt: skip
parameters = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 20.0]),
    top_p=st.sampled_from([0.01, 0.5, 0.95, 1.0]),
    top_k=st.sampled_from([0, 1, 2, 10, VOCAB, 1000]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    seed=st.integers(0, 2**64 - 1),
    logprobs=st.none() | st.integers(0, 20),
    penalties=penalties,
    logit_bias=biases.map(tuple),
)
seen_tokens = st.dictionaries(st.integers(0, VOCAB - 1), st.integers(0, 5), max_size=VOCAB).map(
    lambda counts: SeenTokens(
        ids=np.array(sorted(counts), "<u4").tobytes(),
        counts=np.array([counts[i] for i in sorted(counts)], "<u4").tobytes(),
    )
)


@settings(max_examples=150, deadline=None)
@given(
    params=st.lists(parameters, min_size=1, max_size=4),
    seen=seen_tokens,
    cuts=st.lists(st.integers(0, VOCAB), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
)
def test_no_parameter_lets_the_split_show(
    params: list[SamplingParams], seen: SeenTokens, cuts: list[int], seed: int, scale: float
) -> None:
    logits = scale * torch.randn(len(params), VOCAB, generator=torch.Generator().manual_seed(seed))
    samples = [Sample(row, 10, p, seen if p.penalties else None) for row, p in enumerate(params)]
    before = logits.clone()
    alone = sample(logits, samples, Span(0, VOCAB), SoloGroup())
    split = sample_split(logits, samples, [0, *sorted(cuts), VOCAB])
    assert alone is not None
    assert torch.equal(logits, before)
    assert split.token_ids == alone.token_ids
    assert len(split.logprobs) == len(alone.logprobs)
    for mine, other, p in zip(split.logprobs, alone.logprobs, params, strict=False):
        assert (mine is None) == (other is None) == (p.logprobs is None)
        if mine is not None and other is not None:
            assert mine.top_ids == other.top_ids
            assert mine.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert mine.top_logprobs == pytest.approx(other.top_logprobs, abs=1e-4)


def test_logprobs_are_of_the_logits_before_anything_changes_them() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0]])
    params = SamplingParams(
        temperature=5, top_k=1, logprobs=2, logit_bias=((3, 100.0),), penalties=Penalties(repetition=3)
    )
    seen = SeenTokens(ids=np.array([1], "<u4").tobytes())
    result = sample(logits, [Sample(0, 9, params, seen)], Span(0, 4), SoloGroup())
    assert result is not None
    [told] = result.logprobs
    assert told is not None
    expected = torch.log_softmax(logits[0], -1).tolist()
    assert result.token_ids == (3,)
    assert told.logprob == pytest.approx(expected[3], abs=1e-6)
    assert told.top_ids == (1, 2)
    assert told.top_logprobs == pytest.approx((expected[1], expected[2]), abs=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 3e38])
def test_logprobs_of_logits_that_are_not_finite_can_still_be_sent(value: float) -> None:
    logits = torch.full((1, VOCAB), value)
    logits[0, 3] = 0.0
    samples = wanted([SamplingParams(logprobs=20, logit_bias=((4, 5.0),))])
    for result in (sample(logits, samples, Span(0, VOCAB), SoloGroup()), sample_split(logits, samples, (0, 4, VOCAB))):
        assert result is not None
        assert result.logprobs[0] is not None  # it has checked itself
        assert len(result.logprobs[0].top_ids) == 20


Lie = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]
LIES: dict[str, Lie] = {
    "cut short": lambda sent: sent[:-1],
    "longer": lambda sent: np.append(sent, np.float32(1)),
    "not a number": lambda sent: np.where(np.arange(len(sent)) == len(sent) - 1, np.float32("nan"), sent),
    "an id of another rank": lambda sent: np.where(np.arange(len(sent)) == len(sent) - 1, np.float32(0), sent),
    "an id outside": lambda sent: np.where(np.arange(len(sent)) == len(sent) - 1, np.float32(VOCAB), sent),
    "a sum below its parts": lambda sent: np.where(np.arange(len(sent)) == 5, np.float32(-50), sent),
    "a sum that is none": lambda sent: np.where(np.arange(len(sent)) == 5, np.float32("nan"), sent),
    "too many likely tokens": lambda sent: np.where(np.arange(len(sent)) == 1, np.float32(1e30), sent),
    "less than nothing": lambda sent: np.where(np.arange(len(sent)) == 1, np.float32(-1), sent),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_rank_that_lies_about_how_likely_tokens_are_is_named(lie: str) -> None:
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(2))
    samples = wanted([SamplingParams(logprobs=3)])

    class Liar(LoopbackGroup):
        def gather(self, x: Tensor, root: int = 0) -> list[Tensor] | None:
            return super().gather(torch.from_numpy(LIES[lie](x.numpy()).astype(np.float32)), root)

    def work(group: LoopbackGroup) -> str | None:
        span = (Span(0, 20), Span(20, VOCAB))[group.rank]
        if group.rank == 1:
            group.__class__ = Liar
        try:
            sample(logits[:, span.start : span.end], samples, span, group, VOCAB)
        except BadCandidates as exc:
            return f"{exc.rank} {exc}"
        return None

    assert str(run_ranks(LoopbackGroup.create(2), work)[0]).startswith("1 rank 1: sent")
