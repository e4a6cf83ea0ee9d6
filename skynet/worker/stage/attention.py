"""Attention over the paged cache: one query per sequence (decode) or a chunk of a prompt (prefill).

On the CPU, torch's own attention is slow in two cases that matter here (docs/decisions/0021): with one query row in
bf16, so decode presents the query heads that share a KV head as rows of one query; and for long bf16 prompts, so
prefill multiplies tile by tile, which also skips what lies above the diagonal.

While gradients are recorded (training), a chunk is a whole sequence that attends to itself; no cache is read or
written.
"""

# T tokens of the step, H query heads and h KV heads of this rank, G query heads per KV head, K head size, S positions

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from skynet.errors import StepRejected
from skynet.protocol.plan import Span
from skynet.worker.stage.batch import PartView, StepBatch

_TILE_ROWS = 128
_TILE_SCORES = 1 << 23  # bounds a tile's scores: heads * rows * positions


class HeadRun(NamedTuple):
    """Neighbouring query heads of this rank that use its KV heads evenly."""

    query: Span
    kv: Span


def head_runs(heads: Span, group_size: int) -> tuple[HeadRun, ...]:
    """The explicit map from query to KV heads, both numbered from this rank's first: one run where shares are even."""
    if not len(heads):
        return ()
    first_kv, last_kv = heads.start // group_size, (heads.end - 1) // group_size
    if first_kv == last_kv or (heads.start % group_size == 0 and heads.end % group_size == 0):
        return (HeadRun(Span(0, len(heads)), Span(0, last_kv + 1 - first_kv)),)
    runs = []
    for kv in range(first_kv, last_kv + 1):
        start, end = max(heads.start, kv * group_size), min(heads.end, (kv + 1) * group_size)
        local = Span(start - heads.start, end - heads.start)
        runs.append(HeadRun(local, Span(kv - first_kv, kv - first_kv + 1)))
    return tuple(runs)


class PagedAttention:
    """Writes a step's keys and values into one layer's cache and attends to them."""

    def __init__(self, runs: tuple[HeadRun, ...], scale: float, window: int | None = None) -> None:
        self._runs = runs
        self._scale = scale
        self._window = window

    def __call__(self, query: Tensor, key_value: Tensor, cache: Tensor, batch: StepBatch) -> Tensor:
        """query: [T, H, K]; key_value: [T, 2, h, K]; cache: [2, h, slots, K], changed -> [T, H * K]."""
        if torch.is_grad_enabled():
            return self._without_cache(query, key_value, batch)
        write(cache, key_value, batch)
        if batch.num_tokens == 1:
            return self._decode(query[0], cache, batch.parts[0], batch.block_size).reshape(1, -1)
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        for part in batch.parts:
            if part.num_rows == 1:
                out[part.row] = self._decode(query[part.row], cache, part, batch.block_size)
            else:
                self._prefill(query, cache, part, batch, out)
        return out.flatten(1)

    def _without_cache(self, query: Tensor, key_value: Tensor, batch: StepBatch) -> Tensor:
        """Differentiable in both -> [T, H * K]. Raises StepRejected for a part that doesn't begin its sequence."""
        contexts = []
        for part in batch.parts:
            if part.start:
                raise StepRejected(f"a part begins at position {part.start}; with gradients, sequences are given whole")
            rows = slice(part.row, part.row + part.num_rows)
            mask = tile_mask(batch, 0, part.num_rows, self._window, query)
            heads = query[rows].transpose(0, 1)  # [H, t, K]
            keys, values = key_value[rows].permute(1, 2, 0, 3)  # each [h, t, K]
            pieces = [
                F.scaled_dot_product_attention(
                    heads[q.start : q.end].reshape(len(kv), -1, *heads.shape[1:]),  # [h, G, t, K]
                    keys[kv.start : kv.end, None],
                    values[kv.start : kv.end, None],
                    attn_mask=mask,
                    scale=self._scale,
                ).flatten(0, 1)
                for q, kv in self._runs
            ]
            contexts.append(torch.cat(pieces).transpose(0, 1).flatten(1))
        return torch.cat(contexts)

    def _decode(self, query: Tensor, cache: Tensor, part: PartView, block_size: int) -> Tensor:
        """query: [H, K] -> [H, K]."""
        start = max(0, part.end - self._window) if self._window else 0
        keys, values = read(cache, part, start, part.end, block_size)  # each [h, S, K]
        if len(self._runs) == 1:
            return _one_query(query, keys, values, self._scale)
        pieces = [
            _one_query(query[q.start : q.end], keys[kv.start : kv.end], values[kv.start : kv.end], self._scale)
            for q, kv in self._runs
        ]
        return torch.cat(pieces)

    def _prefill(self, query: Tensor, cache: Tensor, part: PartView, batch: StepBatch, out: Tensor) -> None:
        tile = max(16, min(_TILE_ROWS, _TILE_SCORES // (query.shape[1] * part.end)))
        for row in range(0, part.num_rows, tile):
            rows = min(tile, part.num_rows - row)
            first = part.start + row
            start = max(0, first + 1 - self._window) if self._window else 0
            keys, values = read(cache, part, start, first + rows, batch.block_size)
            mask = tile_mask(batch, first - start, rows, self._window, query)
            at = slice(part.row + row, part.row + row + rows)
            for q, kv in self._runs:
                heads = slice(q.start, q.end)
                out[at, heads] = _many_queries(
                    query[at, heads], keys[kv.start : kv.end], values[kv.start : kv.end], mask, self._scale
                )


def write(cache: Tensor, key_value: Tensor, batch: StepBatch) -> None:
    """key_value: [T, 2, h, K] to the step's slots."""
    content = key_value.permute(1, 2, 0, 3)  # [2, h, T, K]
    if (slot := batch.write_slot) is not None:
        cache.narrow(2, slot, batch.num_tokens).copy_(content)
    else:
        cache.index_copy_(2, batch.slots, content)


def read(cache: Tensor, part: PartView, start: int, end: int, block_size: int) -> Tensor:
    """A sequence's keys and values of positions [start, end): [2, h, end - start, K]; a view where blocks follow."""
    if part.first_slot is not None:
        return cache.narrow(2, part.first_slot + start, end - start)
    assert part.blocks is not None
    first = start // block_size
    blocks = part.blocks[first : -(-end // block_size)]
    paged = cache.view(2, cache.shape[1], -1, block_size, cache.shape[3]).index_select(2, blocks).flatten(2, 3)
    return paged.narrow(2, start - first * block_size, end - start)


def tile_mask(batch: StepBatch, before: int, rows: int, window: int | None, like: Tensor) -> Tensor:
    """What is added to the scores of a tile's last columns: 0 where a row sees a position, -inf elsewhere.

    A row sees all `before` positions unless there is a window: then they have columns, else the mask is [rows, rows].
    """
    key = (before if window else 0, rows, window)
    mask = batch.masks.get(key)
    if mask is None:
        columns = torch.arange(key[0] + rows, device=like.device)
        row = torch.arange(key[0], key[0] + rows, device=like.device)[:, None]
        hidden = columns > row
        if window:
            hidden |= columns <= row - window
        mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, float("-inf"))
        batch.masks[key] = mask
    return mask


def _one_query(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """query: [H, K]; keys, values: [h, S, K] -> [H, K]. All positions are visible."""
    heads, size = query.shape
    grouped = query.view(1, keys.shape[0], -1, size)  # [1, h, G, K]
    if grouped.shape[2] == 1 and query.device.type == "cpu":
        grouped = grouped.expand(-1, -1, 2, -1)  # two equal rows cost less than the path for one
        return F.scaled_dot_product_attention(grouped, keys[None], values[None], scale=scale)[0, :, 0]
    return F.scaled_dot_product_attention(grouped, keys[None], values[None], scale=scale).view(heads, size)


def _many_queries(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """query: [t, H, K]; keys, values: [h, S, K]; mask: added to the last columns -> [t, H, K]."""
    rows, heads, size = query.shape
    kv_heads, length, _ = keys.shape
    grouped = query.view(rows, kv_heads, -1, size).permute(1, 2, 0, 3).reshape(kv_heads, -1, size)  # [h, G * t, K]
    scores = torch.bmm(grouped, keys.transpose(1, 2)).view(heads, rows, length).mul_(scale)
    scores[:, :, length - mask.shape[1] :] += mask
    weights = torch.softmax(scores, -1).view(kv_heads, -1, length)
    return torch.bmm(weights, values).view(heads, rows, size).transpose(0, 1)
