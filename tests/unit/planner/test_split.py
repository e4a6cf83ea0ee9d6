"""Shares: every unit held once, in proportion, within memory."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skynet.models.costs import model_costs
from skynet.models.fit import held_bytes, split_group_within
from skynet.models.spec import ModelSpec
from skynet.models.split import apportion, bounded_fractions, split_group
from skynet.protocol.plan import LayerSpan, RankShare, Span

from .swarms import small_spec


def assert_held_once(spec: ModelSpec, shares: tuple[RankShare, ...]) -> None:
    """Spans follow each other without gap or overlap and cover each part."""
    for part, total in (
        ("heads", spec.num_heads),
        ("mlp", spec.intermediate_size),
        ("expert_mlp", spec.expert_intermediate_size),
        ("vocab", spec.vocab_size),
    ):
        spans: list[Span] = [getattr(share, part) for share in shares]
        assert spans[0].start == 0
        assert spans[-1].end == total, part
        assert all(a.end == b.start for a, b in itertools.pairwise(spans)), part


@given(
    total=st.integers(0, 5000),
    weights=st.lists(st.floats(0, 1e12, allow_subnormal=False), min_size=1, max_size=9),
)
def test_apportioned_units_sum_to_the_total_and_stay_within_one_of_proportion(total: int, weights: list[float]) -> None:
    shares = apportion(total, weights)
    assert sum(shares) == total
    if (scale := sum(weights)) > 0:
        ideal = [total * (weight / scale) for weight in weights]
        assert all(abs(share - want) < 1.0001 for share, want in zip(shares, ideal, strict=True))


@given(
    weights=st.lists(st.floats(0, 10), min_size=1, max_size=6),
    limits=st.lists(st.integers(0, 50), min_size=6, max_size=6),
    fill=st.floats(0, 1),
)
def test_apportioned_units_keep_every_limit(weights: list[float], limits: list[int], fill: float) -> None:
    limits = limits[: len(weights)]
    total = int(sum(limits) * fill)
    shares = apportion(total, weights, limits)
    assert sum(shares) == total
    assert all(0 <= share <= limit for share, limit in zip(shares, limits, strict=True))


def test_units_beyond_all_limits_are_refused() -> None:
    with pytest.raises(ValueError, match="don't fit"):
        apportion(10, [1, 1], [4, 5])


def test_bounded_fractions_keep_proportion_where_no_limit_binds() -> None:
    assert bounded_fractions([1, 1, 2], [0.1, 1, 1]) == pytest.approx([0.1, 0.3, 0.6])
    assert bounded_fractions([1, 1], [0.4, 0.5]) is None


@given(seed=st.integers(0, 10**6), weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=8))
def test_every_head_column_and_row_is_held_once(seed: int, weights: list[float]) -> None:
    spec = small_spec(random.Random(seed))
    shares = split_group(spec, weights)
    assert_held_once(spec, shares)
    if len(weights) <= spec.num_kv_heads:  # KV groups stay whole
        assert all(share.heads.start % spec.group_size == 0 for share in shares)


def test_more_ranks_than_kv_heads_split_query_heads_and_share_kv_heads() -> None:
    spec = ModelSpec(
        model_type="llama",
        num_layers=1,
        hidden_size=64,
        num_heads=8,
        num_kv_heads=2,
        head_size=8,
        intermediate_size=96,
        vocab_size=512,
        max_positions=64,
    )
    three, four = split_group(spec, [1, 1, 1]), split_group(spec, [1, 1, 1, 1])
    assert [len(share.heads) for share in three] == [3, 3, 2]
    assert [share.kv_heads(spec.group_size) for share in three] == [Span(0, 1), Span(0, 2), Span(1, 2)]
    assert [len(share.kv_heads(spec.group_size)) for share in four] == [1, 1, 1, 1]


def test_a_slow_rank_may_hold_no_heads() -> None:
    spec = small_spec(random.Random(0))
    shares = split_group(spec, [1000.0, 1.0])
    assert not len(shares[1].heads)
    assert_held_once(spec, shares)


def test_large_parts_are_cut_at_whole_tiles() -> None:
    spec = ModelSpec(
        model_type="qwen3",
        num_layers=1,
        hidden_size=1024,
        num_heads=16,
        num_kv_heads=8,
        head_size=128,
        intermediate_size=3072,
        vocab_size=151936,
        max_positions=64,
    )
    shares = split_group(spec, [3.0, 2.0, 1.0])
    assert all(share.mlp.end % 32 == 0 and share.vocab.end % 64 == 0 for share in shares)


@settings(max_examples=200)
@given(seed=st.integers(0, 10**6))
def test_a_split_within_memory_keeps_every_limit_and_finds_one_where_there_is_ample_room(seed: int) -> None:
    rng = random.Random(seed)
    spec = small_spec(rng)
    costs = model_costs(spec)
    start = rng.randrange(spec.num_layers)
    layers = LayerSpan(start, rng.randint(start + 1, spec.num_layers))
    weights = [rng.uniform(0.1, 10) for _ in range(rng.randint(1, 4))]
    kv_tokens = rng.choice([0, 128, 2048])
    whole = held_bytes(costs, layers, split_group(spec, [1.0])[0], kv_tokens)
    room = rng.choice([1.0, 1.1, 1.5, 3.0, 10.0])
    limits = [int(whole * room * rng.uniform(0.1, 1)) for _ in weights]
    shares = split_group_within(costs, weights, limits, layers, kv_tokens)
    if shares is None:
        assert max(limits) < 1.5 * whole, "one rank alone could hold everything"
        return
    assert_held_once(spec, shares)
    for share, limit in zip(shares, limits, strict=True):
        assert held_bytes(costs, layers, share, kv_tokens) <= limit
