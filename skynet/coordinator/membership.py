"""Who is in the swarm right now: pure bookkeeping of workers, their leases and what they said of themselves."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import Enum, auto

from skynet.protocol.ids import WorkerId
from skynet.protocol.messages import Join, LoadProgress, PeerInfo
from skynet.protocol.profile import LinkProfile, WorkerProfile

MAX_LINKS = 8192  # measured links we remember
MAX_MACHINES = 4096  # of which we remember how much memory they have
MAX_BLAMERS = 1024  # nodes of which we remember whom they blamed
CUT_S = 15.0  # two workers that couldn't reach each other are kept apart for this long
_HOST = re.compile(r"[0-9A-Za-z][0-9A-Za-z.-]*|[0-9A-Fa-f:]*:[0-9A-Fa-f:.]*(%[0-9A-Za-z._-]+)?")  # names, IPv4, IPv6


class WorkerState(Enum):
    """What a member may be given."""

    READY = auto()  # may hold shards
    DRAINING = auto()  # finishes what it holds, takes nothing new


@dataclass(slots=True)
class Member:
    """One worker of the swarm. Changed by Membership alone."""

    worker_id: WorkerId
    join: Join
    curve_key: bytes
    seen_host: str  # the address its connection came from
    last_heard: float
    state: WorkerState = WorkerState.READY
    has_work_link: bool = False  # its compute thread has connected too
    memory_used_bytes: int = 0
    steps_done: int = 0
    weight_bytes: int = 0  # of the shard it holds, as it reported
    kv_bytes: int = 0
    loading: LoadProgress | None = None
    unfit_reason: str | None = None  # why it couldn't hold its shard; taken back when it rejoins, or by `forgive`
    unfit_until: float = 0.0
    num_unfit: int = 0  # how often it couldn't
    round_trip_s: float | None = None  # of its control link, the shortest of our pings
    num_pings: int = 0
    ping_nonce: int = 0  # of the last one
    pinged_at: float = 0.0
    bad_chunks: int = 0  # how often a peer caught it sending bytes that don't match their hash

    @property
    def machine(self) -> str:
        """Whose memory it shares with others that say the same; "" if that isn't known."""
        profile = self.join.profile
        return profile.host_id if profile.machine_bytes else ""

    @property
    def peer_info(self) -> PeerInfo:
        """How its peers reach it: its own addresses first, then the one we saw."""
        hosts = tuple(host for host in dict.fromkeys((*self.join.hosts, self.seen_host)) if _HOST.fullmatch(host))
        return PeerInfo(
            peer_id=self.worker_id,  # type: ignore[arg-type]  # a worker id is the peer id of a worker
            curve_key=self.curve_key,
            hosts=hosts,
            data_port=self.join.data_port,
            bulk_port=self.join.bulk_port,
        )


@dataclass(slots=True)
class Membership:
    """The table of members. A worker is in it from its Join until it leaves, is lost, or lets its lease run out."""

    lease_s: float = 4.0
    members: dict[WorkerId, Member] = field(default_factory=dict)
    links: dict[tuple[WorkerId, WorkerId], LinkProfile] = field(default_factory=dict)
    measured_at: dict[tuple[WorkerId, WorkerId], float] = field(default_factory=dict)
    cut_until: dict[tuple[WorkerId, WorkerId], float] = field(default_factory=dict)
    blamed: dict[str, dict[WorkerId, str]] = field(default_factory=dict)  # by each node: whom, and in which words
    machine_bytes: dict[str, int] = field(default_factory=dict)  # the most that a worker saw: others take some of it

    def join(self, worker_id: WorkerId, join: Join, curve_key: bytes, seen_host: str, now: float) -> Member:
        """Add a worker, or replace what an earlier process of the same worker said."""
        member = Member(worker_id=worker_id, join=join, curve_key=curve_key, seen_host=seen_host, last_heard=now)
        self.members[worker_id] = member
        before = self.machine_bytes.pop(member.machine, 0)
        self.machine_bytes[member.machine] = max(before, join.profile.machine_bytes)
        while len(self.machine_bytes) > MAX_MACHINES:
            del self.machine_bytes[next(iter(self.machine_bytes))]
        return member

    def remove(self, worker_id: WorkerId) -> Member | None:
        """Forget a worker and its links; None if it wasn't a member."""
        for pair in [pair for pair in {*self.links, *self.cut_until} if worker_id in pair]:
            self._forget_link(pair)
        return self.members.pop(worker_id, None)

    def heard(self, worker_id: WorkerId, now: float) -> bool:
        """Any message from a member renews its lease. False: it isn't a member and should join again."""
        member = self.members.get(worker_id)
        if member is None:
            return False
        member.last_heard = now
        return True

    def expired(self, now: float) -> list[WorkerId]:
        """Members whose lease has run out."""
        return [worker_id for worker_id, end in self.lease_ends().items() if end <= now]

    def lease_ends(self) -> dict[WorkerId, float]:
        """When each member's lease runs out, unless it is heard before."""
        return {m.worker_id: m.last_heard + self.lease_s for m in self.members.values()}

    def work_linked(self, worker_id: WorkerId) -> bool:
        """Its compute thread can be reached. True if that is news."""
        member = self.members.get(worker_id)
        if member is None or member.has_work_link:
            return False
        member.has_work_link = True
        return True

    def drain(self, worker_id: WorkerId) -> bool:
        """Take nothing new on this worker. False: it isn't a member."""
        member = self.members.get(worker_id)
        if member is not None:
            member.state = WorkerState.DRAINING
        return member is not None

    def mark_unfit(
        self, worker_id: WorkerId, reason: str, now: float, retry_s: float, *, accuser: WorkerId | None = None
    ) -> None:
        """It couldn't hold its shard: not to be planned for, at first for `retry_s`, then for longer each time.

        Or so an accuser says, whose node is believed once. When it blames again, and nobody else blames the same
        worker, then the accuser is the one that isn't fit, and what it said before is taken back.
        """
        if accuser is not None and accuser != worker_id and not self._is_believed(accuser, worker_id, reason):
            if accuser not in self.members:
                return
            worker_id, reason = accuser, f"blames again and again, and is alone with it: {reason}"
        member = self.members[worker_id]
        member.unfit_reason = reason
        member.num_unfit += 1
        member.unfit_until = now + retry_s * 2 ** min(member.num_unfit - 1, 7)

    def _is_believed(self, accuser: WorkerId, accused: WorkerId, reason: str) -> bool:
        node = accuser.partition(".")[0]
        own = self.blamed.setdefault(node, {})
        while len(self.blamed) > MAX_BLAMERS:
            del self.blamed[next(iter(self.blamed))]
        agreed = {w for other, blamed in self.blamed.items() if other != node for w in blamed}
        if not own or accused in agreed:
            own[accused] = reason
            return True
        for victim in own.keys() - agreed & self.members.keys():
            member = self.members[victim]
            if member.unfit_reason == own[victim]:
                member.unfit_reason, member.num_unfit = None, member.num_unfit - 1
        return False

    def forgive(self, now: float) -> bool:
        """Give those another chance whose time has come: disks get emptied, sources come back. True if any."""
        pardoned = [m for m in self.members.values() if m.unfit_reason is not None and now >= m.unfit_until]
        for member in pardoned:
            member.unfit_reason = None
        return bool(pardoned)

    def measured(self, links: Iterable[LinkProfile], now: float) -> None:
        """Remember links that workers measured, the number of them bounded. Of what scatters the mean counts."""
        for link in links:
            pair = (link.a, link.b)
            if link.a < link.b and link.a in self.members and link.b in self.members:
                former = self.links.pop(pair, None)
                self.links[pair] = link if former is None else _mean(former, link)
                self.measured_at[pair] = now
                self.cut_until.pop(pair, None)
        while len(self.links) > MAX_LINKS:
            self._forget_link(next(iter(self.links)))

    def mark_relayed(self, a: WorkerId, b: WorkerId) -> None:
        """These two reach each other through us alone; how fast that is, nobody knows yet."""
        link = self.links.get((a, b))
        if a in self.members and b in self.members and (link is None or not link.is_relayed):
            known = link or LinkProfile(a=a, b=b, round_trip_s=0.002, bandwidth_bytes_per_s=10e6)
            self.links[a, b] = replace(known, is_relayed=True, is_estimated=True)

    def mark_cut(self, a: WorkerId, b: WorkerId, now: float) -> None:
        """These two couldn't reach each other at all: not to be put beside each other for a while."""
        if a in self.members and b in self.members:
            self.cut_until[a, b] = now + CUT_S

    def mend_cuts(self, now: float) -> bool:
        """Those kept apart for long enough may be put beside each other again. True if any."""
        over = [pair for pair, until in self.cut_until.items() if now >= until]
        for pair in over:
            del self.cut_until[pair]
        return bool(over)

    def known_links(self, now: float) -> dict[tuple[WorkerId, WorkerId], LinkProfile]:
        """What was measured, or is cut."""
        cut = {pair for pair, until in self.cut_until.items() if now < until}
        return self.links | {
            (a, b): LinkProfile(a=a, b=b, round_trip_s=1.0, bandwidth_bytes_per_s=1.0, is_cut=True) for a, b in cut
        }

    def _forget_link(self, pair: tuple[WorkerId, WorkerId]) -> None:
        self.links.pop(pair, None)
        self.measured_at.pop(pair, None)
        self.cut_until.pop(pair, None)

    def answered_ping(self, worker_id: WorkerId, nonce: int, now: float) -> None:
        """The answer to our last ping came; others don't count."""
        member = self.members.get(worker_id)
        if member is not None and nonce and nonce == member.ping_nonce:
            member.ping_nonce = 0
            took_s = max(now - member.pinged_at, 1e-6)
            member.round_trip_s = min(took_s, member.round_trip_s or took_s)

    def usable(self) -> dict[WorkerId, WorkerProfile]:
        """Profiles of the workers that a plan may use, in the order of their ids."""
        return {
            worker_id: member.join.profile
            for worker_id, member in sorted(self.members.items())
            if member.state is WorkerState.READY and member.has_work_link and member.unfit_reason is None
        }


def _mean(former: LinkProfile, link: LinkProfile) -> LinkProfile:
    """What two measurements of one link say together; the later one alone where its way is another."""
    if former.is_relayed != link.is_relayed or former.is_estimated:
        return link
    return replace(
        link,
        round_trip_s=math.sqrt(former.round_trip_s * link.round_trip_s),
        bandwidth_bytes_per_s=math.sqrt(former.bandwidth_bytes_per_s * link.bandwidth_bytes_per_s),
    )
