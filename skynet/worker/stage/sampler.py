"""Choosing the next token from logits that are split by vocabulary over the ranks of a group.

Random numbers come from Philox keyed by (seed, index, position), one per vocabulary id, and choose by the Gumbel-max
rule: the token is the largest of logit / temperature + noise. So a choice depends on nothing but the logits and the
key: not on batch, rank or layout, and a small change of one logit changes the choice only if two candidates lie close.

Each rank applies bias and penalties to its own rows and sends rank 0 what a row needs and no more: its best (value, id)
for greedy and plain temperature, its k best for top-k, what may be likely enough for min-p, its logits for top-p alone.
docs/decisions/0090-order-of-sampling.md says in which order what is applied, and whose definitions these are.
"""

# n rows that sample, v vocabulary rows of this rank

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from skynet.protocol.plan import Span
from skynet.protocol.steps import LEAST_LOGPROB, Penalties, SamplingParams, SeenTokens, TokenLogprobs
from skynet.worker.collectives import Collective
from skynet.worker.stage.batch import Sample
from skynet.worker.stage.candidates import MAX_VOCAB, Likely, Numbers, Offer, join, log_sum_exp, pack

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]


class Sampled(NamedTuple):
    """The tokens of a step's rows that sample, in order of its parts."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs | None, ...] = ()  # None where none are wanted; empty if nowhere


def sample(
    logits: Tensor, samples: Sequence[Sample], vocab: Span, group: Collective, vocab_size: int = MAX_VOCAB
) -> Sampled | None:
    """logits: [n, v] of this rank's vocabulary rows -> the choice for each row at rank 0, None on the others.

    Raises what the group raises, and BadCandidates of a rank.
    """
    if group.size == 1 and all(_is_argmax(wanted.params) for wanted in samples):
        return Sampled(tuple(logits.argmax(-1).tolist()))
    host = logits.detach().to("cpu", torch.float32).numpy()
    host = np.where(np.isnan(host), np.float32(-np.inf), host)  # a copy, which is changed below
    payload = pack([_offer(row, wanted, vocab) for row, wanted in zip(host, samples, strict=True)])
    received = group.gather(torch.from_numpy(payload), root=0)
    if received is None:
        return None
    wants = [wanted.params.logprobs is not None for wanted in samples]
    offers = join([part.numpy() for part in received], wants, vocab_size)
    chosen = [_choose(offer.candidates, wanted) for offer, wanted in zip(offers, samples, strict=True)]
    token_ids = tuple(int(offer.candidates[1, i]) for offer, i in zip(offers, chosen, strict=True))
    if not any(wants):
        return Sampled(token_ids)
    rows = zip(offers, chosen, samples, strict=True)
    return Sampled(token_ids, tuple(_logprobs(offer.likely, i, wanted.params) for offer, i, wanted in rows))


def gumbel_noise(params: SamplingParams, position: int, span: Span) -> Floats:
    """Noise for the vocabulary ids of `span`; the same for an id whatever span it is asked in."""
    skipped = span.start % 4  # Philox makes four numbers per count
    bits = np.random.Philox(key=np.array([params.seed, params.index << 32 | position], dtype=np.uint64))
    bits.advance(span.start // 4)
    raw = bits.random_raw(len(span) + skipped)[skipped:]
    uniform = ((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # within (0, 1)
    noise: Floats = -np.log(-np.log(uniform))
    return noise


def _is_greedy(params: SamplingParams) -> bool:
    return params.temperature == 0 or params.top_k == 1


def _is_argmax(params: SamplingParams) -> bool:
    """Whether the largest logit is all there is to find."""
    return _is_greedy(params) and params.logprobs is None and not params.changes_logits


def _offer(logits: Numbers, wanted: Sample, vocab: Span) -> Offer:
    """What rank 0 needs of this rank's logits [v], which bias and penalties are applied to in place."""
    count = wanted.params.logprobs
    if count is None:
        _change(logits, wanted, vocab)
        return Offer(_candidates(logits, wanted, vocab))
    plain = logits.copy()
    _change(logits, wanted, vocab)
    candidates = _candidates(logits, wanted, vocab)
    top = _top(plain, count) if count < len(vocab) else np.arange(len(vocab))
    return Offer(
        candidates,
        Likely(
            plain[candidates[1].astype(np.int64) - vocab.start],
            log_sum_exp(plain),
            np.stack([plain[top], (top + vocab.start).astype(np.float32)]),
        ),
    )


def _change(logits: Numbers, wanted: Sample, vocab: Span) -> None:
    """Logit bias, then penalties, in place."""
    params = wanted.params
    if params.logit_bias:
        own = [
            (token_id - vocab.start, bias)
            for token_id, bias in params.logit_bias
            if vocab.start <= token_id < vocab.end
        ]
        if own:
            logits[[i for i, _ in own]] += np.array([bias for _, bias in own], dtype=np.float32)
    if params.penalties is not None and wanted.seen is not None:
        _penalize(logits, params.penalties, wanted.seen, vocab)


def _penalize(logits: Numbers, penalties: Penalties, seen: SeenTokens, vocab: Span) -> None:
    ids = np.frombuffer(seen.ids, "<u4").astype(np.int64)
    own = slice(*np.searchsorted(ids, [vocab.start, vocab.end]))
    ids = ids[own] - vocab.start
    values = logits[ids]
    if penalties.repetition != 1:
        factor = np.float32(penalties.repetition)
        values = np.where(values < 0, values * factor, values / factor)
    if penalties.counts_answer:
        counts = np.frombuffer(seen.counts, "<u4")[own].astype(np.float32)
        values = values - np.float32(penalties.frequency) * counts
        values = values - np.float32(penalties.presence) * (counts > 0).astype(np.float32)
    logits[ids] = values


def _candidates(logits: Numbers, wanted: Sample, vocab: Span) -> Numbers:
    """What rank 0 needs of this rank's changed logits [v]: [2, c] values and ids, ids ascending."""
    params = wanted.params
    if not len(vocab):
        return np.empty((2, 0), dtype=np.float32)
    if _is_greedy(params):
        chosen = np.array([int(logits.argmax())])
    elif params.top_k and params.top_k < len(vocab):
        chosen = _top(logits, params.top_k)
    elif params.top_k or params.top_p < 1:
        chosen = np.arange(len(vocab))
    elif params.min_p > 0:  # what isn't likely enough beside our best isn't beside a better one
        chosen = _likely_enough(logits.astype(np.float64) / params.temperature, params.min_p)
    else:  # plain temperature: the best by value and noise; rank 0 sees that value
        noisy = logits.astype(np.float64) / params.temperature + gumbel_noise(params, wanted.position, vocab)
        best = int(noisy.argmax())
        return np.array([[noisy[best]], [vocab.start + best]], dtype=np.float32)
    return np.stack([logits[chosen], (chosen + vocab.start).astype(np.float32)])


def _top(values: Numbers, count: int) -> Ids:
    """Indices of the `count` largest, ascending; of equal values the lower indices are taken."""
    if not count:
        return np.empty(0, dtype=np.int64)
    threshold = np.partition(values, len(values) - count)[len(values) - count]
    above = np.flatnonzero(values > threshold)
    equal = np.flatnonzero(values == threshold)[: count - len(above)]
    return np.sort(np.concatenate([above, equal]))


def _choose(candidates: Numbers, wanted: Sample) -> int:
    """candidates: [2, c] values and ids of all ranks, ids ascending -> which one. Of equals the lowest id wins."""
    params = wanted.params
    values, ids = candidates[0].astype(np.float64), candidates[1].astype(np.int64)
    is_plain = not params.top_k and params.top_p == 1 and not params.min_p
    if _is_greedy(params) or is_plain or not np.isfinite(values.max()):
        return int(values.argmax())
    kept = np.arange(len(ids))
    if params.top_k and params.top_k < len(ids):
        kept = _top(candidates[0], params.top_k)
    values = values / params.temperature
    if params.top_p < 1:
        kept = kept[_nucleus(values[kept], params.top_p)]
    if params.min_p > 0:
        kept = kept[_likely_enough(values[kept], params.min_p)]
    first, last = int(ids[kept[0]]), int(ids[kept[-1]])
    noise = gumbel_noise(params, wanted.position, Span(first, last + 1))[ids[kept] - first]
    return int(kept[int((values[kept] + noise).argmax())])


def _nucleus(values: Floats, top_p: float) -> Ids:
    """Indices, ascending, of the fewest likeliest candidates whose probabilities reach `top_p`."""
    order = np.argsort(-values, kind="stable")
    weights = np.exp(values[order] - values[order[0]])
    reached = np.cumsum(weights) / weights.sum()
    count = int(np.searchsorted(reached, top_p)) + 1
    return np.sort(order[:count])


def _likely_enough(values: Floats, min_p: float) -> Ids:
    """Indices, ascending, of those at least `min_p` times as likely as the likeliest."""
    largest = values.max()
    if not np.isfinite(largest):
        return np.array([int(values.argmax())])
    return np.flatnonzero(values - largest >= math.log(min_p))


def _logprobs(likely: Likely | None, chosen: int, params: SamplingParams) -> TokenLogprobs | None:
    if likely is None:
        return None
    order = np.argsort(-likely.top[0], kind="stable")[: params.logprobs]
    return TokenLogprobs(
        logprob=_bounded(float(likely.plain[chosen]) - likely.log_sum),
        top_ids=tuple(likely.top[1, order].astype(np.int64).tolist()),
        top_logprobs=tuple(_bounded(float(value) - likely.log_sum) for value in likely.top[0, order]),
    )


def _bounded(logprob: float) -> float:
    """Of infinite logits nothing can be said."""
    return max(LEAST_LOGPROB, min(0.0, logprob)) if not math.isnan(logprob) else LEAST_LOGPROB
