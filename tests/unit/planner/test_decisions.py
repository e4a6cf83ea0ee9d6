"""What the planner decides in situations with an obvious answer."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from skynet.coordinator.planner import Layout, Objective, Plan, PlannerConfig, plan, plan_as_dict, render_plan
from skynet.errors import CapacityError, ConfigError
from skynet.models.costs import model_costs
from skynet.models.fit import held_bytes
from skynet.models.spec import ModelSpec
from skynet.models.split import whole_share
from skynet.protocol.ids import WorkerId
from skynet.protocol.plan import LayerSpan
from skynet.protocol.profile import LinkProfile

from .swarms import Workers, worker

MIB = 1 << 20
SPEC = ModelSpec(
    model_type="qwen3",
    num_layers=12,
    hidden_size=1024,
    num_heads=16,
    num_kv_heads=8,
    head_size=128,
    intermediate_size=3072,
    vocab_size=16384,
    max_positions=4096,
)
CONFIG = PlannerConfig()
NEED = held_bytes(model_costs(SPEC), LayerSpan(0, 12), whole_share(SPEC), 2048)


def swarm(memories: dict[str, float], bandwidth: float = 1e10) -> Workers:
    """Workers by name with memory as a multiple of what one replica needs."""
    return {WorkerId(name): worker(int(NEED * part), bandwidth) for name, part in memories.items()}


def links(names: str, round_trip_s: float, bandwidth: float = 1e9) -> list[LinkProfile]:
    pairs = [(a, b) for i, a in enumerate(sorted(names)) for b in sorted(names)[i + 1 :]]
    return [
        LinkProfile(a=WorkerId(a), b=WorkerId(b), round_trip_s=round_trip_s, bandwidth_bytes_per_s=bandwidth)
        for a, b in pairs
    ]


def layouts(found: Plan) -> list[str]:
    return [replica.layout for replica in found.replicas]


def test_one_worker_that_holds_the_model_is_enough_when_others_are_far() -> None:
    found = plan(SPEC, swarm({"a": 2, "b": 2}), links("ab", 0.005), CONFIG)
    assert layouts(found) == ["1x1"]
    assert len(found.spares) == 1


def test_near_machines_share_layers() -> None:
    found = plan(SPEC, swarm({"a": 2, "b": 2}), links("ab", 0.0001), CONFIG)
    assert layouts(found) == ["2x1"]


def test_far_machines_that_must_work_together_form_a_pipeline() -> None:
    found = plan(SPEC, swarm({"a": 0.7, "b": 0.7}), links("ab", 0.005), CONFIG)
    assert layouts(found) == ["1x2"]


def test_near_pairs_far_apart_become_groups_in_a_pipeline() -> None:
    near = links("ab", 0.0001) + links("cd", 0.0001)
    far = [link for link in links("abcd", 0.02) if (link.a, link.b) not in {(x.a, x.b) for x in near}]
    found = plan(SPEC, swarm(dict.fromkeys("abcd", 0.35)), near + far, CONFIG)
    assert layouts(found) == ["2x2"]
    assert {frozenset(stage.worker_ids) for stage in found.replicas[0].stages} == {frozenset("ab"), frozenset("cd")}


def test_shares_follow_speed() -> None:
    workers = swarm({"a": 2, "b": 2})
    workers[WorkerId("b")] = worker(2 * NEED, 3e10)
    found = plan(SPEC, workers, links("ab", 0.00005), CONFIG)
    heads = {rank.worker_id: len(rank.share.heads) for rank in found.replicas[0].stages[0].ranks}
    assert heads == {"a": 4, "b": 12}


def test_a_gain_below_the_threshold_isnt_worth_another_worker() -> None:
    workers = swarm({"a": 3}) | {WorkerId("b"): worker(3 * NEED, 2e8)}  # at best 2% faster together
    found = plan(SPEC, workers, links("ab", 0.00001), CONFIG)
    assert found.worker_ids == ("a",)


def test_surplus_workers_become_replicas_for_throughput() -> None:
    config = replace(CONFIG, objective=Objective.THROUGHPUT)
    found = plan(SPEC, swarm(dict.fromkeys("abc", 2)), links("abc", 0.01), config)
    assert layouts(found) == ["1x1"] * 3
    assert not found.spares
    assert found.batch_tokens_per_s > 2.9 * found.replicas[0].prediction.batch_tokens_per_s


def test_the_memory_objective_takes_least() -> None:
    config = replace(CONFIG, objective=Objective.MEMORY)
    found = plan(SPEC, swarm(dict.fromkeys("abcd", 1.5)), links("abcd", 0.0001), config)
    assert layouts(found) == ["1x1"]
    assert found.replicas[0].num_blocks == 128


def test_missing_memory_is_stated_in_words_and_bytes() -> None:
    with pytest.raises(CapacityError, match=r"needs .* MiB .*, the 2 workers lend .* MiB: .* MiB missing") as caught:
        plan(SPEC, swarm({"a": 0.4, "b": 0.4}), [], CONFIG)
    assert caught.value.missing_bytes == NEED - 2 * int(NEED * 0.4)


def test_no_workers_is_a_lack_of_the_whole_model() -> None:
    with pytest.raises(CapacityError, match="no worker lends any memory") as caught:
        plan(SPEC, {}, [], CONFIG)
    assert caught.value.missing_bytes == NEED


def test_a_model_of_short_positions_asks_for_no_longer_context() -> None:
    short = replace(SPEC, max_positions=256)
    assert plan(short, swarm({"a": 2}), [], replace(CONFIG, objective=Objective.MEMORY)).replicas[0].num_blocks == 16


def test_a_pinned_layout_is_kept_to_and_its_surplus_spared() -> None:
    config = replace(CONFIG, layout=Layout.parse("2x3"))
    found = plan(SPEC, swarm(dict.fromkeys("abcdefg", 0.5)), [], config)
    assert layouts(found) == ["2x3"]
    assert found.layout_is_met
    assert len(found.spares) == 1


@pytest.mark.parametrize(("count", "sizes"), [(5, [1, 2, 2]), (3, [1, 1, 1]), (2, [1, 1])])
def test_a_pinned_layout_with_too_few_workers_is_kept_as_far_as_they_go(count: int, sizes: list[int]) -> None:
    config = replace(CONFIG, layout=Layout.parse("2x3"))
    found = plan(SPEC, swarm(dict.fromkeys("abcdefg"[:count], 0.9)), [], config)
    assert not found.layout_is_met
    assert sorted(len(stage.ranks) for stage in found.replicas[0].stages) == sizes
    assert any("2x3 needs 6 workers" in reason for reason in found.reasons)


def test_a_layout_of_more_stages_than_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="13 stages asked for, the model has 12 layers"):
        plan(SPEC, swarm({"a": 2}), [], replace(CONFIG, layout=Layout(1, 13)))


@pytest.mark.parametrize("text", ["", "2", "2x", "0x3", "-1x2", "2x3x4", "65x1", "axb"])
def test_a_layout_that_isnt_two_numbers_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="layout"):
        Layout.parse(text)


def test_a_spare_takes_the_place_of_a_lost_worker_and_nobody_else_moves() -> None:
    workers = swarm(dict.fromkeys("abcd", 0.45))
    near = links("abcd", 0.005)
    first = plan(SPEC, workers, near, CONFIG)
    assert len(first.worker_ids) == 3
    lost = first.worker_ids[1]
    left = {w: p for w, p in workers.items() if w != lost}
    second = plan(SPEC, left, near, CONFIG, first)
    fetching = [w.worker_id for w in second.transition.workers if w.fetched_bytes]
    assert fetching == list(first.spares)
    assert second.moved_bytes == next(
        rank.weight_bytes for stage in first.replicas[0].stages for rank in stage.ranks if rank.worker_id == lost
    )


def test_a_join_that_gains_little_changes_nothing() -> None:
    workers = swarm({"a": 0.7, "b": 0.7})
    near = links("abc", 0.005)
    first = plan(SPEC, workers, near, CONFIG)
    joined = workers | {WorkerId("c"): worker(int(NEED * 0.7), 1.02e10)}
    second = plan(SPEC, joined, near, CONFIG, first)
    assert second.assignments() == first.assignments()
    assert second.spares == ("c",)
    assert "Every worker keeps what it holds." in second.reasons


def test_a_join_that_gains_much_is_taken_up() -> None:
    first = plan(SPEC, swarm({"a": 2}), [], CONFIG)
    joined = swarm({"a": 2}) | {WorkerId("b"): worker(2 * NEED, 1e11)}
    second = plan(SPEC, joined, links("ab", 0.005), CONFIG, first)
    assert second.worker_ids == ("b",)
    assert second.moved_bytes > 0


def test_a_change_that_takes_too_long_to_pay_back_isnt_made() -> None:
    first = plan(SPEC, swarm({"a": 2}), [], CONFIG)
    joined = swarm({"a": 2}) | {WorkerId("b"): worker(2 * NEED, 1.2e10)}
    slow = replace(CONFIG, fetch_bytes_per_s=1e5)
    assert plan(SPEC, joined, links("ab", 0.005), CONFIG, first).worker_ids == ("b",)
    assert plan(SPEC, joined, links("ab", 0.005), slow, first).worker_ids == ("a",)


def test_a_worker_without_room_for_both_shards_announces_a_pause() -> None:
    workers = swarm({"a": 0.6, "b": 0.6})
    first = plan(SPEC, workers, links("ab", 0.0001), replace(CONFIG, layout=Layout(1, 2)))
    second = plan(SPEC, workers, links("ab", 0.0001), replace(CONFIG, layout=Layout(2, 1)), first)
    assert second.transition.must_drop_first
    assert second.transition.pause_s > 0
    assert any("a pause of about" in reason for reason in second.reasons)


def test_a_worker_with_room_for_both_shards_overlaps_them() -> None:
    workers = swarm({"a": 5, "b": 5})
    first = plan(SPEC, workers, links("ab", 0.0001), replace(CONFIG, layout=Layout(1, 2)))
    second = plan(SPEC, workers, links("ab", 0.0001), replace(CONFIG, layout=Layout(2, 1)), first)
    assert not second.transition.must_drop_first
    assert second.transition.pause_s == 0
    for change in second.transition.workers:
        assert 0 < change.kept_bytes < change.kept_bytes + change.fetched_bytes <= change.peak_bytes


def test_another_model_keeps_nothing_but_its_memory_counts_during_the_change() -> None:
    first = plan(SPEC, swarm({"a": 2}), [], CONFIG)
    other = replace(SPEC, num_layers=10)
    second = plan(other, swarm({"a": 2}), [], CONFIG, first)
    (change,) = second.transition.workers
    old = first.replicas[0].stages[0].ranks[0]
    new = second.replicas[0].stages[0].ranks[0]
    assert change.kept_bytes == 0
    assert change.peak_bytes == old.weight_bytes + old.kv_bytes + new.weight_bytes + new.kv_bytes


def test_unknown_links_are_bounded_by_paths_and_reported() -> None:
    hub = [
        LinkProfile(a=WorkerId("coordinator"), b=WorkerId(w), round_trip_s=t, bandwidth_bytes_per_s=1e8)
        for w, t in (("a", 0.001), ("b", 0.002))
    ]
    found = plan(SPEC, swarm({"a": 0.7, "b": 0.7}), hub, replace(CONFIG, layout=Layout(1, 2)))
    assert found.estimated_links == (("a", "b"),)
    direct = [*hub, *links("ab", 0.003)]
    measured = plan(SPEC, swarm({"a": 0.7, "b": 0.7}), direct, replace(CONFIG, layout=Layout(1, 2)))
    assert measured.estimated_links == ()
    assert found.replicas[0].prediction.decode_tokens_per_s == pytest.approx(
        measured.replicas[0].prediction.decode_tokens_per_s, rel=0.01
    )


def test_a_dtype_that_wasnt_measured_counts_at_the_slowest_known_rate() -> None:
    half = replace(SPEC, dtype="float16")
    workers = swarm({"a": 2})
    p = plan(half, workers, [], CONFIG).replicas[0].prediction
    assert p.decode_tokens_per_s == pytest.approx(
        plan(SPEC, workers, [], CONFIG).replicas[0].prediction.decode_tokens_per_s
    )


def test_workers_of_one_host_share_its_bandwidth_if_told_so() -> None:
    workers = {WorkerId(w): replace(worker(2 * NEED), host_id="box") for w in "ab"}
    alone = replace(CONFIG, hosts_share_bandwidth=True)
    assert layouts(plan(SPEC, workers, [], CONFIG)) == ["2x1"]
    assert layouts(plan(SPEC, workers, [], alone)) == ["1x1"]


def test_the_table_and_the_dictionary_show_every_worker() -> None:
    found = plan(SPEC, swarm(dict.fromkeys("abcd", 0.6)), links("abcd", 0.005), CONFIG)
    table = render_plan(found)
    shown = plan_as_dict(found)
    assert all(reason in table for reason in found.reasons)
    ranks = [rank for replica in shown["replicas"] for stage in replica["stages"] for rank in stage["ranks"]]
    assert {rank["worker"] for rank in ranks} | set(shown["spares"]) == set("abcd")
    assert sum(rank["weight_bytes"] for rank in ranks) == sum(
        rank.weight_bytes for stage in found.replicas[0].stages for rank in stage.ranks
    )


def test_a_thousand_workers_are_planned_for_with_bounded_effort() -> None:
    """Time is measured by scripts/bench_planner; here the number of layouts tried stands for it."""
    from skynet.coordinator.planner.search import Search
    from skynet.coordinator.planner.swarm import Swarm

    from .swarms import large_spec, large_swarm

    workers, near = large_swarm(1000)
    search = Search(Swarm(large_spec(), workers, near, CONFIG))
    best = search.best(range(1000))
    assert best is not None
    assert len(search.tried) < 300


def test_every_order_of_repairs_is_deterministic() -> None:
    workers = swarm(dict.fromkeys("abcdef", 0.3))
    near = links("abcdef", 0.002)
    first = plan(SPEC, workers, near, CONFIG)
    left = [(w, p) for w, p in workers.items() if w != first.worker_ids[0]]
    plans = set()
    for seed in range(5):
        random.Random(seed).shuffle(left)
        plans.add(render_plan(plan(SPEC, dict(left), near, CONFIG, first)))
    assert len(plans) == 1
