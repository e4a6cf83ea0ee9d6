"""What each rank of a group tells rank 0 about its part of the vocabulary: one row of float32 numbers per step.

Logits have no more digits than float32, and ids stay below 2^24. The numbers: how many candidates each row has; how
many likeliest tokens each row that wants logprobs has; of each row the candidates' values, then their ids; of each row
that wants logprobs the candidates' logits, the logarithm of the summed exponentials of all of the rank's logits, the
likeliest tokens' logits, then their ids. Ids ascend within a rank and over the ranks.
"""

# n rows that sample, c candidates of a row, t likeliest tokens of a row

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

MAX_VOCAB = 1 << 24

Numbers = npt.NDArray[np.float32]


class BadCandidates(ValueError):
    """What this rank sent as candidates are none."""

    def __init__(self, message: str, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


class Likely(NamedTuple):
    """How likely tokens are, before anything changes that."""

    plain: Numbers  # [c] the candidates' logits
    log_sum: float  # of the exponentials of all logits
    top: Numbers  # [2, t] logits and ids of the likeliest


class Offer(NamedTuple):
    """One row as one rank sees it, or, once they are joined, as all do."""

    candidates: Numbers  # [2, c] values and ids
    likely: Likely | None = None  # where logprobs are wanted


def pack(offers: Sequence[Offer]) -> Numbers:
    """A rank's rows as numbers."""
    likely = [offer.likely for offer in offers if offer.likely is not None]
    sizes = [offer.candidates.shape[1] for offer in offers] + [one.top.shape[1] for one in likely]
    parts = [np.array(sizes, dtype=np.float32), *(offer.candidates.ravel() for offer in offers)]
    for one in likely:
        parts += [one.plain, np.array([one.log_sum], dtype=np.float32), one.top.ravel()]
    return np.concatenate(parts)


def join(received: Sequence[Numbers], wants: Sequence[bool], vocab_size: int) -> list[Offer]:
    """The rows of all ranks, in order of rank. wants: [n], which rows want logprobs. Raises BadCandidates."""
    next_ids, next_top_ids = np.zeros(len(wants)), np.zeros(len(wants))  # the least there may be
    ranks = []
    for rank, payload in enumerate(received):
        try:
            offers = _unpack(payload, wants, vocab_size)
            for i, offer in enumerate(offers):
                next_ids[i] = _checked_ids(offer.candidates, next_ids[i], vocab_size)
                if offer.likely is not None:
                    next_top_ids[i] = _checked_ids(offer.likely.top, next_top_ids[i], vocab_size)
                    _check_sum(offer.likely)
        except ValueError as exc:
            raise BadCandidates(f"rank {rank}: {exc}", rank) from exc
        ranks.append(offers)
    return ranks[0] if len(ranks) == 1 else [_joined(row) for row in zip(*ranks, strict=True)]


def log_sum_exp(values: npt.NDArray[np.floating]) -> float:
    """The logarithm of the summed exponentials; minus infinity of none."""
    largest = float(values.max(initial=-np.inf))
    if not np.isfinite(largest):
        return largest
    return largest + float(np.log(np.exp(values.astype(np.float64) - largest).sum()))


def _joined(row: Sequence[Offer]) -> Offer:
    candidates = np.concatenate([offer.candidates for offer in row], axis=1)
    likely = [offer.likely for offer in row if offer.likely is not None]
    if not likely:
        return Offer(candidates)
    log_sum = log_sum_exp(np.array([one.log_sum for one in likely]))
    plain = np.concatenate([one.plain for one in likely])
    return Offer(candidates, Likely(plain, log_sum, np.concatenate([one.top for one in likely], axis=1)))


def _unpack(payload: Numbers, wants: Sequence[bool], vocab_size: int) -> list[Offer]:
    """A rank's rows; ValueError if the numbers aren't as many as they say."""
    num_sizes = len(wants) + sum(wants)
    sent = payload[:num_sizes] if payload.ndim == 1 else np.empty(0)
    if len(sent) < num_sizes or not ((sent >= 0) & (sent <= vocab_size) & (sent == sent.round())).all():
        raise ValueError(f"sent no number of candidates for each of {len(wants)} rows")
    sizes = [int(size) for size in sent]
    counts, tops = sizes[: len(wants)], iter(sizes[len(wants) :])
    lengths = [2 * count for count in counts]
    for count, is_wanted in zip(counts, wants, strict=True):
        if is_wanted:
            lengths += [count, 1, 2 * next(tops)]
    edges = np.cumsum([num_sizes, *lengths])
    if len(payload) != edges[-1]:
        raise ValueError(f"sent {len(payload)} numbers, announced {edges[-1]}")
    pieces = iter(np.split(payload, edges[:-1])[1:])
    candidates = [next(pieces).reshape(2, count) for count in counts]
    return [
        Offer(row, Likely(next(pieces), float(next(pieces)[0]), next(pieces).reshape(2, -1)) if is_wanted else None)
        for row, is_wanted in zip(candidates, wants, strict=True)
    ]


def _checked_ids(sent: Numbers, least: float, vocab_size: int) -> float:
    """sent: [2, c] values and ids -> the least id that the next rank may send. Or ValueError."""
    values, ids = sent
    if not len(ids):
        return least
    is_ascending = ids[0] >= least and ids[-1] < vocab_size and (ids[1:] > ids[:-1]).all()
    if not is_ascending or not (ids == ids.round()).all() or np.isnan(values).any():
        raise ValueError(f"sent candidates that aren't: ids must ascend from {least:.0f} below {vocab_size}")
    return float(ids[-1]) + 1


def _check_sum(likely: Likely) -> None:
    values = np.concatenate([likely.plain, likely.top[0]])
    if not (values <= likely.log_sum).all():  # nor is any of them NaN
        raise ValueError(f"sent logits above {likely.log_sum}, the logarithm of their summed exponentials")
