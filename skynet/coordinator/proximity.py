"""Links between workers: what a plan may take for known, and which pairs are worth measuring. Pure.

Measurements of one link scatter by half, and differences between like links are scatter alone: a plan must not follow
them. So pairs of the same two machines count as one link, and links that are nearly alike count as equal.
"""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from skynet.coordinator.planner.links import COORDINATOR
from skynet.protocol.ids import WorkerId
from skynet.protocol.profile import LinkProfile

Pair = tuple[WorkerId, WorkerId]  # in the order of their ids
MAX_NEAR: Final = 8  # machines that each one is measured with, unless a plan needs more
MAX_SPREAD: Final = 64  # workers; in larger swarms a measurement stands for its own pair alone, else it's too many
OWN_WORTH: Final = 4.0  # a pair this many times slower than others of the same machines keeps what it measured
ALIKE: Final = 1.5  # links count as equal if none of them is slower than another by more than this
RETRY_S: Final = (2.0, 15.0, 60.0, 600.0)  # after the first, second... lost probe; then always the last
LOOPS_S: Final = 0.0005  # what the two event loops take of a round trip to the coordinator
NEAREST_S: Final = 0.0001  # round trips to the coordinator below this aren't told apart
COORDINATOR_BYTES_PER_S: Final = 100e6  # nobody measures that


class Place(NamedTuple):
    """Where a worker is."""

    machine: str  # the same for workers that share one
    addresses: tuple[str, ...]
    round_trip_s: float | None  # to the coordinator and back, the shortest seen; None: not known yet


def pair_of(a: WorkerId, b: WorkerId) -> Pair:
    return (a, b) if a < b else (b, a)


def known_links(places: Mapping[WorkerId, Place], measured: Mapping[Pair, LinkProfile]) -> tuple[LinkProfile, ...]:
    """What a plan may take for known: measured links without their scatter, and the ways to the coordinator."""
    by_machines: defaultdict[tuple[str, str], list[LinkProfile]] = defaultdict(list)
    odd = []  # through the relay, only guessed, or cut: they stand for nobody else
    for pair, link in measured.items():
        if not places.keys() >= set(pair):
            continue
        if link.is_relayed or link.is_estimated or link.is_cut:
            odd.append(link)
        else:
            by_machines[_machines(places, *pair)].append(link)
    workers: defaultdict[str, list[WorkerId]] = defaultdict(list)
    for worker_id, place in sorted(places.items()):
        workers[place.machine].append(worker_id)
    found: dict[Pair, LinkProfile] = {}
    for machines, links in sorted(by_machines.items()):
        found |= _of_machines(machines, links, workers if len(places) <= MAX_SPREAD else {})
    found |= {(link.a, link.b): link for link in odd}
    return (*_levelled(found.values()), *_to_coordinator(places, workers))


def _machines(places: Mapping[WorkerId, Place], a: WorkerId, b: WorkerId) -> tuple[str, str]:
    one, other = places[a].machine, places[b].machine
    return (one, other) if one <= other else (other, one)


def _of_machines(
    machines: tuple[str, str], links: Sequence[LinkProfile], workers: Mapping[str, Sequence[WorkerId]]
) -> dict[Pair, LinkProfile]:
    """Pairs of these two machines with the median of what was measured between them."""
    round_trip_s = statistics.median(link.round_trip_s for link in links)
    width = statistics.median(link.bandwidth_bytes_per_s for link in links)
    here, there = workers.get(machines[0], ()), workers.get(machines[1], ())
    pairs = {(link.a, link.b) for link in links} | {pair_of(a, b) for a in here for b in there if a != b}
    found = {
        (a, b): LinkProfile(a=a, b=b, round_trip_s=round_trip_s, bandwidth_bytes_per_s=width) for a, b in sorted(pairs)
    }
    for link in links:
        is_slow = link.round_trip_s > OWN_WORTH * round_trip_s or link.bandwidth_bytes_per_s * OWN_WORTH < width
        if is_slow:
            found[link.a, link.b] = link
    return found


def _levelled(links: Iterable[LinkProfile]) -> list[LinkProfile]:
    """Links with the values of their like."""
    links = list(links)
    trips = _levels(link.round_trip_s for link in links)
    widths = _levels(link.bandwidth_bytes_per_s for link in links)
    return [
        replace(
            link,
            round_trip_s=trips[link.round_trip_s],
            bandwidth_bytes_per_s=widths[link.bandwidth_bytes_per_s],
        )
        for link in links
    ]


def _levels(values: Iterable[float]) -> dict[float, float]:
    """Each value with the middle one of those it is like."""
    found: dict[float, float] = {}
    alike: list[float] = []
    for value in [*sorted(set(values)), float("inf")]:
        if alike and value > ALIKE * alike[0]:
            found |= dict.fromkeys(alike, alike[len(alike) // 2])
            alike = []
        alike.append(value)
    return found


def _to_coordinator(
    places: Mapping[WorkerId, Place], workers: Mapping[str, Sequence[WorkerId]]
) -> Iterable[LinkProfile]:
    """By machine: the shortest round trip that one of its workers saw, without what the event loops took of it."""
    for worker_ids in workers.values():
        seen = [trip for w in worker_ids if (trip := places[w].round_trip_s) is not None]
        if not seen:
            continue
        round_trip_s = max(min(seen) - LOOPS_S, NEAREST_S)
        for worker_id in worker_ids:
            a, b = pair_of(worker_id, COORDINATOR)
            yield LinkProfile(a=a, b=b, round_trip_s=round_trip_s, bandwidth_bytes_per_s=COORDINATOR_BYTES_PER_S)


@dataclass(slots=True)
class Probes:
    """Which links were asked for, and when they may be asked for again."""

    _asked: dict[Pair, tuple[int, float]] = field(default_factory=dict)  # how often; the next time isn't before

    def may_ask(self, pair: Pair, now: float) -> bool:
        return now >= self._asked.get(pair, (0, now))[1]

    def ask(self, pair: Pair, now: float) -> None:
        """This pair is being measured; if nothing comes of it, it waits, longer each time."""
        num_asked = self._asked.get(pair, (0, now))[0]
        self._asked[pair] = (num_asked + 1, now + RETRY_S[min(num_asked, len(RETRY_S) - 1)])

    def answered(self, pair: Pair) -> None:
        self._asked.pop(pair, None)

    def forget(self, worker_id: WorkerId) -> None:
        self._asked = {pair: asked for pair, asked in self._asked.items() if worker_id not in pair}

    def due(
        self, places: Mapping[WorkerId, Place], measured: Mapping[Pair, LinkProfile], now: float
    ) -> tuple[Pair, ...]:
        """Pairs to be measured next, near ones first; no worker is in two, so that they don't disturb each other.

        One pair of each two near machines will do; nobody measures within a machine what no plan asked for.
        """
        known = {_machines(places, *p) for p, link in measured.items() if _is_known(link) and places.keys() >= set(p)}
        workers: defaultdict[str, list[WorkerId]] = defaultdict(list)
        for worker_id, place in sorted(places.items()):
            workers[place.machine].append(worker_id)
        order = sorted(workers, key=lambda m: _whereabouts(places[workers[m][0]]))
        busy: set[WorkerId] = set()
        found = []
        for distance in range(1, MAX_NEAR // 2 + 1 if len(order) > MAX_NEAR + 1 else len(order)):
            for one, other in zip(order, order[distance:], strict=False):
                if ((one, other) if one <= other else (other, one)) in known:
                    continue
                pair = self._free_pair(workers[one], workers[other], busy, measured, now)
                if pair is not None:
                    busy.update(pair)
                    found.append(pair)
        return tuple(found)

    def _free_pair(
        self,
        here: Sequence[WorkerId],
        there: Sequence[WorkerId],
        busy: set[WorkerId],
        measured: Mapping[Pair, LinkProfile],
        now: float,
    ) -> Pair | None:
        """A pair of these machines that may be asked for; none while another of theirs waits for its next turn."""
        pairs = [pair_of(a, b) for a, b in itertools.product(here[:4], there[:4])]
        if any(pair in self._asked and not self.may_ask(pair, now) for pair in pairs):
            return None
        free = [p for p in pairs if not busy.intersection(p) and not (p in measured and measured[p].is_cut)]
        return min(free, key=lambda p: self._asked.get(p, (0, 0.0)), default=None)


def _is_known(link: LinkProfile) -> bool:
    return not link.is_estimated and not link.is_cut


def _whereabouts(place: Place) -> tuple[str, float, str]:
    """Machines that are near each other come near each other in this order: of one network, as far from us."""
    outside = [a for a in place.addresses if not a.startswith(("127.", "::1"))] or ["?"]
    network = outside[0].rpartition(".")[0] or ":".join(outside[0].split(":")[:4])
    return network, place.round_trip_s or 0.0, place.machine
