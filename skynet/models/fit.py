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
    spec, ranks = costs.spec, len(weights)
    parts = _parts(costs, ranks, layers, kv_tokens)
    nothing = RankShare(heads=Span(0, 0), mlp=Span(0, 0), expert_mlp=Span(0, 0), vocab=Span(0, 0))
    fixed = costs.weight_bytes(layers, nothing)
    if ranks > spec.num_kv_heads:  # a rank whose heads straddle two KV groups holds one KV head more than its part
        one = RankShare(heads=Span(0, 1), mlp=Span(0, 0), expert_mlp=Span(0, 0), vocab=Span(0, 0))
        fixed += held_bytes(costs, layers, one, kv_tokens) - fixed
    left = [limit - fixed for limit in limits]
    dealt: list[tuple[Span, ...]] = []
    for index, part in enumerate(parts):
        rest = sum(p.num_units * p.unit_bytes for p in parts[index:])
        fractions = bounded_fractions(weights, [room / rest for room in left]) if rest else list(weights)
        rooms = [room // part.unit_bytes if part.unit_bytes else part.num_units for room in left]
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


def _parts(costs: ModelCosts, ranks: int, layers: LayerSpan, kv_tokens: int) -> tuple[_Part, ...]:
    spec = costs.spec
    dense, moe = costs.count(layers.start, layers.end)
    heads = head_unit(spec, ranks)
    mlp = column_unit(spec.intermediate_size, ranks)
    expert = column_unit(spec.expert_intermediate_size, ranks)
    vocab = column_unit(spec.vocab_size, ranks, 64)
    head_bytes = heads * (dense * costs.dense.heads + moe * costs.moe.heads)
    if ranks <= spec.num_kv_heads:
        one = RankShare(heads=Span(0, 1), mlp=Span(0, 0), expert_mlp=Span(0, 0), vocab=Span(0, 0))
        head_bytes += dense * costs.dense.kv_heads + moe * costs.moe.kv_heads
        head_bytes += kv_tokens * costs.kv_bytes_per_token(len(layers), one)
    else:
        head_bytes += -(-(dense * costs.dense.kv_heads + moe * costs.moe.kv_heads) // spec.group_size)
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
