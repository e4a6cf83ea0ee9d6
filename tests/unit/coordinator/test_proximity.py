"""Measurements scatter; plans must not. What counts as known, and which pairs are measured next."""

from __future__ import annotations

import itertools
import random

import pytest

from skynet.coordinator.membership import CUT_S, Membership
from skynet.coordinator.planner import PlannerConfig, plan
from skynet.coordinator.planner.links import COORDINATOR
from skynet.coordinator.proximity import MAX_NEAR, RETRY_S, Pair, Place, Probes, known_links
from skynet.models.spec import ModelSpec
from skynet.protocol.ids import WorkerId
from skynet.protocol.messages import Join
from skynet.protocol.profile import LinkProfile, WorkerProfile

SPEC = ModelSpec(
    model_type="llama", num_layers=6, hidden_size=256, num_heads=8, num_kv_heads=4, head_size=32,
    intermediate_size=768, vocab_size=1000, max_positions=2048, dtype="float32",
)  # fmt: skip


def worker_ids(count: int) -> list[WorkerId]:
    return [WorkerId(f"w{i:03}") for i in range(count)]


def place(machine: str, address: str = "10.0.0.1", round_trip_s: float | None = None) -> Place:
    return Place(machine, ("127.0.0.1", address), round_trip_s)


def link(pair: Pair, round_trip_s: float = 2e-4, bandwidth: float = 1e9, **flags: bool) -> LinkProfile:
    return LinkProfile(a=pair[0], b=pair[1], round_trip_s=round_trip_s, bandwidth_bytes_per_s=bandwidth, **flags)


def links_of(*links: LinkProfile) -> dict[Pair, LinkProfile]:
    return {(one.a, one.b): one for one in links}


def between_workers(known: tuple[LinkProfile, ...]) -> dict[Pair, LinkProfile]:
    return {(one.a, one.b): one for one in known if COORDINATOR not in (one.a, one.b)}


def test_workers_of_one_machine_are_equally_near_whatever_was_measured() -> None:
    rng = random.Random(1)
    workers = worker_ids(6)
    places = {w: place("box") for w in workers}
    pairs = list(itertools.combinations(workers, 2))
    measured = links_of(*(link(p, rng.uniform(8e-5, 3e-4), rng.uniform(4e8, 9e8)) for p in pairs[:4]))
    known = between_workers(known_links(places, measured))
    assert known.keys() == set(pairs)
    assert len({(one.round_trip_s, one.bandwidth_bytes_per_s) for one in known.values()}) == 1


def test_scatter_of_measurements_moves_nothing() -> None:
    """A plan that was made with some measurements is still the best with others of the same links."""
    rng = random.Random(2)
    workers = worker_ids(5)
    rates = {"float32": 1e9}
    profile = WorkerProfile(
        device="cpu", device_name="test", threads=1, memory_bytes=6 << 20, weight_bytes_per_s=rates,
        matmul_flops_per_s=rates, layer_overhead_s=1e-5,
    )  # fmt: skip
    profiles = dict.fromkeys(workers, profile)
    config = PlannerConfig(min_context_tokens=64)
    places = {w: place(w) for w in workers}
    pairs = list(itertools.combinations(workers, 2))
    measured = links_of(*(link(p, rng.uniform(2.1e-4, 3.0e-4), rng.uniform(0.9e8, 1.3e8)) for p in pairs))
    current = plan(SPEC, profiles, known_links(places, measured), config)
    assert len(current.worker_ids) > 1
    for _ in range(20):
        pair = rng.choice(sorted(measured))
        measured |= links_of(link(pair, rng.uniform(2.1e-4, 3.0e-4), rng.uniform(0.9e8, 1.3e8)))
        again = plan(SPEC, profiles, known_links(places, measured), config, current)
        assert again.assignments() == current.assignments()


def test_a_pair_that_is_much_slower_than_its_like_keeps_what_it_measured() -> None:
    a, b, c = worker_ids(3)
    places = {w: place("box") for w in (a, b, c)}
    known = between_workers(known_links(places, links_of(link((a, b)), link((a, c)), link((b, c), 5e-3))))
    assert known[a, b].round_trip_s == known[a, c].round_trip_s == 2e-4
    assert known[b, c].round_trip_s == 5e-3


@pytest.mark.parametrize("flag", ["is_relayed", "is_cut", "is_estimated"])
def test_a_link_of_another_way_stands_for_nobody_else(flag: str) -> None:
    a, b, c = worker_ids(3)
    places = {a: place("box"), b: place("tower"), c: place("tower")}
    known = between_workers(known_links(places, links_of(link((a, b), 0.5, 1e3, **{flag: True}))))
    assert known.keys() == {(a, b)}
    assert getattr(known[a, b], flag)


def test_way_to_the_coordinator_is_known_by_machine_without_what_the_event_loops_take() -> None:
    a, b, c = worker_ids(3)
    places = {a: place("box", round_trip_s=0.004), b: place("box", round_trip_s=0.0012), c: place("far")}
    known = known_links(places, {})
    assert {one.b if one.a == COORDINATOR else one.a for one in known} == {a, b}
    assert all(one.round_trip_s == pytest.approx(0.0007) for one in known)


def test_near_machines_are_measured_first_and_nobody_twice_at_a_time() -> None:
    workers = worker_ids(6)
    places = {w: place(w, f"10.0.{i // 3}.{i}") for i, w in enumerate(workers)}
    probes = Probes()
    due = probes.due(places, {}, 0.0)
    assert len({w for pair in due for w in pair}) == 2 * len(due)
    assert due[0] == (workers[0], workers[1])
    seen: dict[Pair, LinkProfile] = {}
    for _ in range(20):
        for pair in probes.due(places, seen, 0.0):
            assert pair not in seen
            seen |= links_of(link(pair))
    assert seen.keys() == set(itertools.combinations(workers, 2))


def test_each_machine_of_a_large_swarm_is_measured_with_eight_at_most() -> None:
    workers = worker_ids(100)
    places = {w: place(w, f"10.0.{i // 50}.{i}") for i, w in enumerate(workers)}
    probes, seen = Probes(), dict[Pair, LinkProfile]()
    while due := probes.due(places, seen, 0.0):
        seen |= links_of(*map(link, due))
    assert all(sum(w in pair for pair in seen) <= MAX_NEAR for w in workers)
    assert sum(places[a].addresses[1][:7] == places[b].addresses[1][:7] for a, b in seen) > 0.9 * len(seen)


def test_one_pair_stands_for_two_machines_and_none_is_measured_within_one() -> None:
    workers = worker_ids(6)
    places = {w: place("box" if i < 3 else "tower") for i, w in enumerate(workers)}
    probes = Probes()
    (pair,) = probes.due(places, {}, 0.0)
    assert {places[w].machine for w in pair} == {"box", "tower"}
    assert probes.due(places, links_of(link(pair)), 0.0) == ()


def test_a_lost_probe_is_asked_again_later_and_later() -> None:
    a, b = worker_ids(2)
    places = {a: place("box"), b: place("tower")}
    probes, now = Probes(), 0.0
    for pause_s in (*RETRY_S, RETRY_S[-1]):
        assert probes.due(places, {}, now) == ((a, b),)
        probes.ask((a, b), now)
        assert probes.due(places, {}, now + pause_s - 0.01) == ()
        now += pause_s
    probes.forget(a)
    assert probes.may_ask((a, b), now)


def membership(*workers: WorkerId) -> Membership:
    table = Membership()
    rates = {"float32": 1e9}
    profile = WorkerProfile(
        device="cpu", device_name="test", threads=1, memory_bytes=1, weight_bytes_per_s=rates, matmul_flops_per_s=rates
    )
    for worker_id in workers:
        join = Join(profile=profile, hosts=("127.0.0.1",), data_port=1, bulk_port=2, pid=1)
        table.join(worker_id, join, b"k" * 40, "127.0.0.1", 0.0)
    return table


def test_repeated_measurements_are_smoothed_and_a_change_that_stays_is_believed() -> None:
    a, b = worker_ids(2)
    table = membership(a, b)
    table.measured([link((a, b), 1e-3)], 0.0)
    table.measured([link((a, b), 2e-3)], 1.0)
    assert 1.3e-3 < table.links[a, b].round_trip_s < 1.5e-3
    for _ in range(6):
        table.measured([link((a, b), 1e-1)], 2.0)
    assert table.links[a, b].round_trip_s > 0.09
    table.measured([link((a, b), 5e-1, is_relayed=True)], 3.0)
    assert table.links[a, b].round_trip_s == 5e-1


def test_two_who_cannot_reach_each_other_are_kept_apart_for_a_while() -> None:
    a, b = worker_ids(2)
    table = membership(a, b)
    table.mark_cut(a, b, 0.0)
    assert table.known_links(CUT_S - 0.1)[a, b].is_cut
    assert not table.known_links(CUT_S + 0.1)
    table.mark_cut(a, b, 0.0)
    table.measured([link((a, b))], 1.0)
    assert not table.known_links(1.0)[a, b].is_cut
    table.remove(a)
    assert not table.known_links(1.0)


def test_a_link_found_to_be_relayed_is_measured_anew() -> None:
    a, b = worker_ids(2)
    table = membership(a, b)
    table.measured([link((a, b))], 0.0)
    table.mark_relayed(a, b)
    assert table.links[a, b].is_relayed
    assert table.links[a, b].is_estimated
    table.measured([link((a, b), 3e-3, is_relayed=True)], 1.0)
    assert not table.links[a, b].is_estimated


def test_only_the_answer_to_the_last_ping_counts() -> None:
    (a,) = worker_ids(1)
    table = membership(a)
    member = table.members[a]
    member.ping_nonce, member.pinged_at = 7, 10.0
    for nonce in (0, 6):
        table.answered_ping(a, nonce, 11.0)
        assert member.round_trip_s is None
    table.answered_ping(a, 7, 10.5)
    table.answered_ping(a, 7, 10.001)
    assert member.round_trip_s == 0.5
