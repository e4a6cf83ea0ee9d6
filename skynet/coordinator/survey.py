"""Has workers measure their links: those that a plan relies on at once, those between near machines when idle."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterable, Sequence

from skynet.coordinator.engine_config import EngineConfig
from skynet.coordinator.membership import Membership
from skynet.coordinator.planner import Plan
from skynet.coordinator.proximity import Pair, Place, Probes, known_links, pair_of
from skynet.coordinator.replica import Transport
from skynet.protocol.ids import WorkerId
from skynet.protocol.messages import Ping, Probe
from skynet.protocol.profile import LinkProfile

logger = logging.getLogger(__name__)
NUM_PINGS = 8  # of each worker after it joined; the quickest answer counts


class Survey:
    """See the module. Everything that is measured ends up in the membership."""

    def __init__(
        self, config: EngineConfig, membership: Membership, transport: Transport, clock: Callable[[], float]
    ) -> None:
        self._config = config
        self._membership = membership
        self._transport = transport
        self._clock = clock
        self._probes = Probes()
        self._reported = asyncio.Event()
        self._num_lost = 0
        self._nonces = itertools.count(1)  # 0 is asked of workers whose step is late

    def links(self) -> tuple[LinkProfile, ...]:
        """What a plan may take for known."""
        return known_links(self._places(), self._membership.known_links(self._clock()))

    def _places(self) -> dict[WorkerId, Place]:
        return {
            worker_id: Place(m.join.profile.host_id or worker_id, m.join.hosts, m.round_trip_s)
            for worker_id, m in self._membership.members.items()
        }

    # -- what workers tell

    def measured(self, worker_id: WorkerId, links: Iterable[LinkProfile]) -> None:
        """A worker measured its links; only what it can know counts."""
        own = [link for link in links if worker_id in (link.a, link.b)]
        self._membership.measured(own, self._clock())
        for link in own:
            self._probes.answered((link.a, link.b))
        self._reported.set()

    def linked(self, worker_id: WorkerId, relayed: Iterable[str], unreachable: Iterable[str]) -> None:
        """A worker opened the links of its epoch, some only through us, some not at all."""
        for peer in relayed:
            self._membership.mark_relayed(*pair_of(worker_id, WorkerId(peer)))
        for peer in unreachable:
            self._membership.mark_cut(*pair_of(worker_id, WorkerId(peer)), self._clock())

    def forget(self, worker_id: WorkerId) -> None:
        """It is lost: whoever waits for measurements has a new plan to make."""
        self._probes.forget(worker_id)
        self._num_lost += 1
        self._reported.set()

    def on_pong(self, worker_id: WorkerId, nonce: int) -> None:
        """The answer to a `ping`."""
        self._membership.answered_ping(worker_id, nonce, self._clock())

    # -- what we ask

    def ping(self) -> None:
        """Measure the way to workers that joined not long ago."""
        for member in self._membership.members.values():
            if member.num_pings < NUM_PINGS:
                member.num_pings += 1
                member.ping_nonce, member.pinged_at = next(self._nonces), self._clock()
                self._transport.send_control(member.worker_id, Ping(nonce=member.ping_nonce))

    async def verify(self, target: Plan) -> bool:
        """Have links measured that a plan would use and that are only guessed; whether something new is known."""
        now = self._clock()
        members = self._membership.members
        pairs = [p for p in target.estimated_links if members.keys() >= set(p) and self._probes.may_ask(p, now)]
        return await self._probe(pairs[: self._config.max_probes])

    async def explore(self) -> bool:
        """Have near machines measured of which nothing is known; whether something new is."""
        measured = self._membership.known_links(self._clock())
        due = self._probes.due(self._places(), measured, self._clock())
        return await self._probe([pair for pair in due if all(self._membership.members[w].has_work_link for w in pair)])

    async def _probe(self, pairs: Sequence[Pair]) -> bool:
        members = self._membership.members
        for a, b in pairs:
            self._probes.ask((a, b), self._clock())
            self._transport.send_control(b, Probe(peers=(members[a].peer_info,), measures=False))
            self._transport.send_control(a, Probe(peers=(members[b].peer_info,), measures=True))
        since, num_lost = self._clock(), self._num_lost

        def is_missing(pair: Pair) -> bool:
            return members.keys() >= set(pair) and self._membership.measured_at.get(pair, since - 1) < since

        try:
            async with asyncio.timeout(self._config.probe_s):
                while self._num_lost == num_lost and any(map(is_missing, pairs)):
                    self._reported.clear()
                    await self._reported.wait()
        except TimeoutError:
            logger.info("links not all measured missing=%d", sum(map(is_missing, pairs)))
        return not all(map(is_missing, pairs))
