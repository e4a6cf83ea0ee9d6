"""Shares bounded by memory: by speed as far as each rank's bytes allow, the rest to those with room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from skynet.models.costs import ModelCosts
from skynet.models.split import apportion, bounded_fractions, column_unit, head_unit, spans
from skynet.protocol.plan import LayerSpan, RankShare, Span


@dataclass(frozen=True, slots=True)
class _Part:
    """A splittable part of a stage."""

    total: int  # elements: heads, columns, rows
    unit: int  # elements that move together
    unit_bytes: int  # over all layers of the stage

    @property
    def num_units(self) -> int:
        return -(-self.total // self.unit)


def held_bytes(costs: ModelCosts, layers: LayerSpan, share: RankShare, kv_tokens: int) -> int:
    """Weights of this share of a stage and its KV cache for `kv_tokens` positions."""
    return costs.weight_bytes(layers, share) + kv_tokens * costs.kv_bytes_per_token(len(layers), share)


def split_group_within(
    costs: ModelCosts, weights: Sequence[float], limits: Sequence[int], layers: LayerSpan, kv_tokens: int
) -> tuple[RankShare, ...] | None:
    """Like `split_group`, but no rank holds more than `limits` bytes of this stage, KV for `kv_tokens` included.

    Parts are dealt from the coarsest (heads) to the finest, each by speed within what is left of the limits. None if
    that finds no split.
    """
    ranks, kv_heads = len(weights), costs.spec.num_kv_heads
    by_room = sorted(range(ranks), key=lambda r: (-limits[r], r))
    # With more ranks than KV heads each rank may need one KV head more than its part: where that is too much, only
    # the roomiest hold heads, whole KV groups.
    for num_holders in (ranks,) if ranks <= kv_heads else (ranks, kv_heads):
        shares = _deal(costs, weights, limits, layers, kv_tokens, frozenset(by_room[:num_holders]))
        if shares is not None:
            return shares
    return None


def _deal(
    costs: ModelCosts,
    weights: Sequence[float],
    limits: Sequence[int],
    layers: LayerSpan,
    kv_tokens: int,
    holders: frozenset[int],
) -> tuple[RankShare, ...] | None:
    """Deal all parts; heads only to `holders`."""
    parts = _parts(costs, len(weights), len(holders), layers, kv_tokens)
    nothing = RankShare(heads=Span(0, 0), mlp=Span(0, 0), expert_mlp=Span(0, 0), vocab=Span(0, 0))
    fixed = costs.weight_bytes(layers, nothing)
    left = [limit - fixed for limit in limits]
    if len(holders) > costs.spec.num_kv_heads:
        one_kv_head = _kv_head_bytes(costs, layers, kv_tokens)
        left = [room - one_kv_head for room in left]
    dealt: list[tuple[Span, ...]] = []
    for index, part in enumerate(parts):
        rest = sum(p.num_units * p.unit_bytes for p in parts[index:])
        fractions = bounded_fractions(weights, [room / rest for room in left]) if rest else list(weights)
        rooms = [room // part.unit_bytes if part.unit_bytes else part.num_units for room in left]
        if index == 0:
            rooms = [room if r in holders else 0 for r, room in enumerate(rooms)]
        if fractions is None or sum(min(max(room, 0), part.num_units) for room in rooms) < part.num_units:
            return None
        counts = apportion(part.num_units, fractions, rooms)
        left = [room - count * part.unit_bytes for room, count in zip(left, counts, strict=True)]
        dealt.append(spans(counts, part.unit, part.total))
    shares = tuple(
        RankShare(heads=heads, expert_mlp=expert, mlp=mlp, vocab=vocab)
        for heads, expert, mlp, vocab in zip(*dealt, strict=True)
    )
    fits = all(held_bytes(costs, layers, s, kv_tokens) <= limit for s, limit in zip(shares, limits, strict=True))
    return shares if fits else None


def _kv_head_bytes(costs: ModelCosts, layers: LayerSpan, kv_tokens: int) -> int:
    """Weights and cache of one KV head in all layers of a stage."""
    dense, moe = costs.count(layers.start, layers.end)
    one = RankShare(heads=Span(0, 1), mlp=Span(0, 0), expert_mlp=Span(0, 0), vocab=Span(0, 0))
    weights = dense * costs.dense.kv_heads + moe * costs.moe.kv_heads
    return weights + kv_tokens * costs.kv_bytes_per_token(len(layers), one)


def _parts(costs: ModelCosts, ranks: int, num_holders: int, layers: LayerSpan, kv_tokens: int) -> tuple[_Part, ...]:
    spec = costs.spec
    dense, moe = costs.count(layers.start, layers.end)
    heads = head_unit(spec, num_holders)
    mlp = column_unit(spec.intermediate_size, ranks)
    expert = column_unit(spec.expert_intermediate_size, ranks)
    vocab = column_unit(spec.vocab_size, ranks, 64)
    head_bytes = heads * (dense * costs.dense.heads + moe * costs.moe.heads)
    if num_holders <= spec.num_kv_heads:
        head_bytes += _kv_head_bytes(costs, layers, kv_tokens)
    else:  # shared by the heads of a KV group; what straddling costs is set aside by the caller
        head_bytes += -(-_kv_head_bytes(costs, layers, kv_tokens) // spec.group_size)
    is_first, is_last = layers.start == 0, layers.end == spec.num_layers
    row = is_first * costs.embedding.vocab + is_last * costs.head.vocab - (is_first and is_last) * costs.tied.vocab
    return (
        _Part(spec.num_heads, heads, head_bytes),
        _Part(
            spec.expert_intermediate_size,
            expert,
            expert * (dense * costs.dense.expert_mlp + moe * costs.moe.expert_mlp),
        ),
        _Part(spec.intermediate_size, mlp, mlp * (dense * costs.dense.mlp + moe * costs.moe.mlp)),
        _Part(spec.vocab_size, vocab, vocab * row),
    )
