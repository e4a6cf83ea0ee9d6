"""Every pair's link: measured where it was, else bounded from the measured ones by paths through landmarks."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Final, NamedTuple

from skynet.coordinator.planner.config import PlannerConfig
from skynet.protocol.ids import WorkerId
from skynet.protocol.profile import LinkProfile, WorkerProfile

COORDINATOR: Final = WorkerId("coordinator")  # its name in links; every relayed byte passes it
_NUM_LANDMARKS = 8


class Link(NamedTuple):
    round_trip_s: float  # infinite: no way at all
    bandwidth_bytes_per_s: float  # through the relay: of one transfer alone; transfers at the same time divide it
    is_estimated: bool
    is_relayed: bool = False


_CUT: Final = Link(float("inf"), 1.0, False)


class LinkTable:
    """Links by position of the two workers in `ids`, which is sorted. Links that name others (the coordinator) help to
    bound what nobody measured: a path's round trips add up, its narrowest link bounds its bandwidth."""

    def __init__(
        self,
        ids: Sequence[WorkerId],
        profiles: Mapping[WorkerId, WorkerProfile],
        links: Sequence[LinkProfile],
        config: PlannerConfig,
    ) -> None:
        self._config = config
        self._hosts = [profiles[worker_id].host_id for worker_id in ids]
        others = sorted({end for link in links for end in (link.a, link.b)} - set(ids))
        index = {worker_id: i for i, worker_id in enumerate([*ids, *others])}
        self._coordinator = index.get(COORDINATOR)
        self._known: dict[tuple[int, int], Link] = {}
        cut: set[tuple[int, int]] = set()
        guessed: list[tuple[int, int]] = []  # relayed, and nobody measured how fast
        for profile in sorted(links, key=lambda x: (x.is_estimated, -x.round_trip_s, x.bandwidth_bytes_per_s)):
            a, b = sorted((index[profile.a], index[profile.b]))
            link = Link(profile.round_trip_s, profile.bandwidth_bytes_per_s, profile.is_estimated, profile.is_relayed)
            if profile.is_cut:
                cut.add((a, b))
            elif a != b and self._known.setdefault((a, b), link) is link and link[2:] == (True, True):
                guessed.append((a, b))
        for pair in cut:
            self._known.pop(pair, None)
        for a, b in guessed:
            both = self._through_coordinator(a, b)
            if both is not None and (a, b) in self._known:
                self._known[a, b] = both
        self.near: list[list[int]] = [[] for _ in index]  # measured neighbours of each
        self._measured: list[dict[int, Link]] = [{} for _ in index]
        for (a, b), link in sorted(self._known.items()):
            self.near[a].append(b)
            self.near[b].append(a)
            self._measured[a][b] = self._measured[b][a] = link
        self._landmarks = self._choose_landmarks(range(len(ids), len(index)))
        slowest = max((link.round_trip_s for link in self._known.values()), default=0.0)
        narrowest = min((link.bandwidth_bytes_per_s for link in self._known.values()), default=float("inf"))
        self._fallback = Link(
            max(2 * slowest, config.default_round_trip_s),
            min(narrowest, config.default_bandwidth_bytes_per_s),
            True,
        )
        self.has_cuts = bool(cut)
        self._cache: dict[tuple[int, int], Link] = self._known | dict.fromkeys(cut, _CUT)

    def between(self, a: int, b: int) -> Link:
        """The link of two workers, by index."""
        key = (a, b) if a < b else (b, a)
        link = self._cache.get(key)
        if link is None:
            link = self._cache[key] = self._estimate(*key)
        return link

    def are_joined(self, a: int, b: int) -> bool:
        """Whether two workers can talk to each other at all, the relay included."""
        return not self.has_cuts or self.between(a, b).round_trip_s < _CUT.round_trip_s

    def to_coordinator_s(self, worker: int) -> float | None:
        """One way between a worker and the coordinator, as far as anybody measured it."""
        link = None if self._coordinator is None else self._known.get(_pair(worker, self._coordinator))
        return None if link is None else link.round_trip_s / 2

    def _through_coordinator(self, a: int, b: int) -> Link | None:
        """Both legs of a relayed link."""
        if self._coordinator is None:
            return None
        legs = [self._known.get(_pair(worker, self._coordinator)) for worker in (a, b)]
        trips = [leg.round_trip_s for leg in legs if leg is not None]
        widths = [leg.bandwidth_bytes_per_s for leg in legs if leg is not None]
        return Link(sum(trips), min(widths), True, True) if len(trips) == 2 else None

    @cached_property
    def near_sets(self) -> list[list[int]]:
        """Sets of workers each two of which are near, as far as landmarks, hosts or defaults tell."""
        limit_s = self._config.near_round_trip_s
        buckets = [[i for i, (rtt, _) in sorted(reached.items()) if rtt <= limit_s / 2] for reached in self._landmarks]
        by_host: dict[str, list[int]] = {}
        for i, host in enumerate(self._hosts):
            if host:
                by_host.setdefault(host, []).append(i)
        if not self._known and self._fallback.round_trip_s <= limit_s:
            buckets.append(list(range(len(self._hosts))))
        return [*buckets, *by_host.values()]

    def _estimate(self, a: int, b: int) -> Link:
        if self._hosts[a] and self._hosts[a] == self._hosts[b]:
            return Link(self._config.local_round_trip_s, self._config.local_bandwidth_bytes_per_s, True)
        found: list[tuple[float, float]] = []  # (round trip, -bandwidth) of each way
        for reached in self._landmarks:
            if a in reached and b in reached:
                (rtt_a, width_a), (rtt_b, width_b) = reached[a], reached[b]
                found.append((rtt_a + rtt_b, -min(width_a, width_b)))
        of_a, of_b = self._measured[a], self._measured[b]
        for middle in of_a.keys() & of_b.keys():
            first, second = of_a[middle], of_b[middle]
            width = min(first.bandwidth_bytes_per_s, second.bandwidth_bytes_per_s)
            found.append((first.round_trip_s + second.round_trip_s, -width))
        if not found:
            return self._fallback
        round_trip_s, negative_width = min(found)
        return Link(round_trip_s, -negative_width, True)

    def _choose_landmarks(self, others: range) -> list[dict[int, tuple[float, float]]]:
        """Those who aren't workers first, then always the one furthest from all landmarks so far."""
        found: list[dict[int, tuple[float, float]]] = []
        linked = [i for i in range(len(self.near)) if self.near[i]]
        distance = dict.fromkeys(linked, float("inf"))
        while distance and len(found) < _NUM_LANDMARKS:
            outside = [i for i in others if distance.get(i, 0) > 0]
            chosen = outside[0] if outside else max(distance, key=lambda i: (distance[i], len(self.near[i]), -i))
            if distance[chosen] == 0:
                break
            reached = self._shortest_paths(chosen)
            found.append(reached)
            for i, (rtt, _) in reached.items():
                distance[i] = min(distance[i], rtt)
        return found

    def _shortest_paths(self, source: int) -> dict[int, tuple[float, float]]:
        """Round trip and narrowest link of the shortest path to everyone within reach."""
        done: dict[int, tuple[float, float]] = {}
        best: dict[int, tuple[float, float]] = {}  # of the ways in the queue
        queue = [(0.0, source, float("inf"))]
        while queue:
            rtt, node, width = heapq.heappop(queue)
            if node in done:
                continue
            done[node] = (rtt, width)
            for other, link in self._measured[node].items():
                way = rtt + link.round_trip_s, min(width, link.bandwidth_bytes_per_s)
                if other not in done and (other not in best or way < best[other]):
                    best[other] = way
                    heapq.heappush(queue, (way[0], other, way[1]))
        return done


def _pair(a: int, b: int) -> tuple[int, int]:
    return (a, b) if a < b else (b, a)
