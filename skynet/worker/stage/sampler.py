"""Choosing the next token from logits that are split by vocabulary over the ranks of a group.

Random numbers come from Philox keyed by (seed, index, position), one per vocabulary id, and choose by the Gumbel-max
rule: the token is the largest of logit / temperature + noise. So a choice depends on nothing but the logits and the
key: not on batch, rank or layout, and a small change of one logit changes the choice only if two candidates lie close.

Each rank sends rank 0 what a row needs and no more: its best (value, id) for greedy and plain temperature, its k best
for top-k, its logits for top-p alone. All as float32: logits have no more digits, and ids stay below 2^24.
"""

# n rows that sample, v vocabulary rows of this rank

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from skynet.protocol.plan import Span
from skynet.protocol.steps import SamplingParams
from skynet.worker.collectives import Collective
from skynet.worker.stage.batch import Sample

MAX_VOCAB = 1 << 24

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]


class BadCandidates(ValueError):
    """What this rank sent as candidates are none."""

    def __init__(self, message: str, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


def sample(
    logits: Tensor, samples: Sequence[Sample], vocab: Span, group: Collective, vocab_size: int = MAX_VOCAB
) -> tuple[int, ...] | None:
    """logits: [n, v] of this rank's vocabulary rows -> token ids in order at rank 0, None on the others.

    Raises what the group raises, and BadCandidates of a rank.
    """
    if group.size == 1 and all(_is_greedy(wanted.params) for wanted in samples):
        return tuple(logits.argmax(-1).tolist())
    host = logits.detach().to("cpu", torch.float32).numpy()
    host = np.where(np.isnan(host), np.float32(-np.inf), host)
    sent = [_candidates(row, wanted, vocab) for row, wanted in zip(host, samples, strict=True)]
    header = np.array([part.shape[1] for part in sent], dtype=np.float32)
    payload = np.concatenate([header, *(part.ravel() for part in sent)])
    received = group.gather(torch.from_numpy(payload), root=0)
    if received is None:
        return None
    ranks = []
    next_ids = np.zeros(len(samples))  # ids ascend over the ranks
    for rank, part in enumerate(received):
        try:
            ranks.append(_unpack(part.numpy(), len(samples), next_ids, vocab_size))
        except ValueError as exc:
            raise BadCandidates(f"rank {rank}: {exc}", rank) from exc
    return tuple(
        _choose(np.concatenate([rank[i] for rank in ranks], axis=1), wanted) for i, wanted in enumerate(samples)
    )


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


def _candidates(logits: npt.NDArray[np.float32], wanted: Sample, vocab: Span) -> npt.NDArray[np.float32]:
    """What rank 0 needs of this rank's logits [v]: [2, c] values and ids, ids ascending."""
    params = wanted.params
    if not len(vocab):
        return np.empty((2, 0), dtype=np.float32)
    if _is_greedy(params):
        chosen = np.array([int(logits.argmax())])
    elif params.top_k and params.top_k < len(vocab):
        chosen = _top(logits, params.top_k)
    elif params.top_k or params.top_p < 1:
        chosen = np.arange(len(vocab))
    else:  # plain temperature: the best by value and noise; rank 0 sees that value
        noisy = logits.astype(np.float64) / params.temperature + gumbel_noise(params, wanted.position, vocab)
        best = int(noisy.argmax())
        return np.array([[noisy[best]], [vocab.start + best]], dtype=np.float32)
    return np.stack([logits[chosen], (chosen + vocab.start).astype(np.float32)])


def _top(values: npt.NDArray[np.float32], count: int) -> Ids:
    """Indices of the `count` largest, ascending; of equal values the lower indices are taken."""
    threshold = np.partition(values, len(values) - count)[len(values) - count]
    above = np.flatnonzero(values > threshold)
    equal = np.flatnonzero(values == threshold)[: count - len(above)]
    return np.sort(np.concatenate([above, equal]))


def _unpack(
    payload: npt.NDArray[np.float32], count: int, next_ids: Floats, vocab_size: int
) -> list[npt.NDArray[np.float32]]:
    """`count` times [2, c] values and ids; `next_ids` are the least there may be, and are moved on. Or ValueError."""
    sent = payload[:count] if payload.ndim == 1 else np.empty(0)
    if len(sent) < count or not ((sent >= 0) & (sent <= vocab_size) & (sent == sent.round())).all():
        raise ValueError(f"sent no number of candidates for each of {count} rows")
    sizes = sent.astype(np.int64)
    edges = count + np.concatenate([[0], np.cumsum(2 * sizes)])
    if len(payload) != edges[-1]:
        raise ValueError(f"sent {len(payload)} numbers, announced {edges[-1]}")
    rows = [payload[edges[i] : edges[i + 1]].reshape(2, sizes[i]) for i in range(count)]
    for i, (values, ids) in enumerate(rows):
        if not len(ids):
            continue
        is_ascending = ids[0] >= next_ids[i] and ids[-1] < vocab_size and (ids[1:] > ids[:-1]).all()
        if not is_ascending or not (ids == ids.round()).all() or np.isnan(values).any():
            raise ValueError(f"sent candidates that aren't: ids must ascend from {next_ids[i]:.0f} below {vocab_size}")
        next_ids[i] = ids[-1] + 1
    return rows


def _choose(candidates: npt.NDArray[np.float32], wanted: Sample) -> int:
    """candidates: [2, c] values and ids of all ranks, ids ascending. Of equals the lowest id wins."""
    params = wanted.params
    values, ids = candidates[0].astype(np.float64), candidates[1].astype(np.int64)
    is_plain = not params.top_k and params.top_p == 1
    if _is_greedy(params) or is_plain or not np.isfinite(values.max()):
        return int(ids[int(values.argmax())])
    if params.top_k and params.top_k < len(ids):
        kept = _top(candidates[0], params.top_k)
        values, ids = values[kept], ids[kept]
    values = values / params.temperature
    if params.top_p < 1:
        kept = _nucleus(values, params.top_p)
        values, ids = values[kept], ids[kept]
    noise = gumbel_noise(params, wanted.position, Span(int(ids[0]), int(ids[-1]) + 1))[ids - ids[0]]
    return int(ids[int((values + noise).argmax())])


def _nucleus(values: Floats, top_p: float) -> Ids:
    """Indices, ascending, of the fewest likeliest candidates whose probabilities reach `top_p`."""
    order = np.argsort(-values, kind="stable")
    weights = np.exp(values[order] - values[order[0]])
    reached = np.cumsum(weights) / weights.sum()
    count = int(np.searchsorted(reached, top_p)) + 1
    return np.sort(order[:count])
