"""What steps really took: corrects predictions, and the rates that workers claimed. Pure.

A worker's claim is what it measured of itself at start, or a lie. Until steps on it were timed it counts for no more
than a few times what others have; then for what the steps say. Corrections come in few, large portions: a plan must
not follow the scatter of a busy machine.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from skynet.protocol.ids import WorkerId
from skynet.protocol.profile import WorkerProfile

WARM_UP_STEPS: Final = 3  # of a replica, which take longer and say nothing
MIN_STEPS: Final = 16  # before anything is concluded
SURE_STEPS: Final = 64  # after so many more that were as predicted, workers are known better
MOST_SURE: Final = 8  # times that a worker was found to be as predicted, or corrected; more count no more
MEMORY: Final = 1 / 16  # weight of the newest step
OFF: Final = 1.5  # predictions that are wrong by less than this are right
PAUSE_S: Final = 10.0  # between two corrections by one replica
UNTIMED: Final = 8.0  # a claim counts for at most this many times what workers have in the middle
COMMON: Final = 2.0  # what timed workers are off holds for untimed ones that say something else up to this
MAX_FOUND: Final = 4096  # workers, also gone ones, of which something is remembered
_MOST: Final = math.log(1e6)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How a replica's steps compare with what its plan predicted: sums that forget."""

    num_steps: int = 0
    predicted_s: float = 0.0
    measured_s: float = 0.0
    since: float = -math.inf  # when its workers were corrected by it

    def after(self, predicted_s: float, measured_s: float) -> Pace:
        """With one more step."""
        if self.num_steps < WARM_UP_STEPS:
            return replace(self, num_steps=self.num_steps + 1)
        kept = 0.0 if self.num_steps == WARM_UP_STEPS else 1 - MEMORY
        return replace(
            self,
            num_steps=self.num_steps + 1,
            predicted_s=kept * self.predicted_s + predicted_s,
            measured_s=kept * self.measured_s + measured_s,
        )

    @property
    def ratio(self) -> float:
        """Measured by predicted time; 1 while too little is known."""
        if self.num_steps < MIN_STEPS or not self.predicted_s or not self.measured_s:
            return 1.0
        return self.measured_s / self.predicted_s

    def is_off(self, now: float) -> bool:
        """Whether the claims of its workers want correcting."""
        return now - self.since >= PAUSE_S and not 1 / OFF <= self.ratio <= OFF

    @property
    def is_proven(self) -> bool:
        """Whether it is time to say that the claims are right, if they aren't off."""
        return self.num_steps % SURE_STEPS == 0 and self.num_steps > 0

    def corrected(self, now: float) -> Pace:
        """From here on steps are compared with a new prediction."""
        return Pace(num_steps=WARM_UP_STEPS, since=now)

    def left_alone(self, now: float) -> Pace:
        """There was nothing to correct."""
        return replace(self, since=now)


class Found(NamedTuple):
    """What is known of a worker's speed."""

    log_factor: float  # how much slower than `profile` it is
    num_timed: int  # corrections that it was part of: how sure this is
    profile: WorkerProfile  # what it counted for when its steps were first timed
    claim: WorkerProfile  # what it said then

    @property
    def least(self) -> float:
        """The log factor with which it is as fast as it says: nobody is taken to be faster."""
        pairs = [*_common(self.profile, self.claim, 0), *_common(self.profile, self.claim, 1)]
        said = [*self.claim.weight_bytes_per_s.values(), *self.claim.matmul_flops_per_s.values()]
        return min(math.log(counted / claimed) for (_, counted), claimed in zip(pairs, said, strict=True))


@dataclass(slots=True)
class Observations:
    """What was found of each worker; those without an entry are untimed."""

    found: dict[WorkerId, Found] = field(default_factory=dict)

    def joined(self, worker_id: WorkerId, claim: WorkerProfile) -> None:
        """What was found is forgotten if it says something else now; coming back alone doesn't help a liar."""
        former = self.found.get(worker_id)
        if former is not None and not _are_alike(former.claim, claim):
            del self.found[worker_id]
        while len(self.found) > MAX_FOUND:
            del self.found[next(iter(self.found))]

    def fold(self, workers: Iterable[WorkerId], ratio: float, claims: Mapping[WorkerId, WorkerProfile]) -> bool:
        """Steps of these workers together took `ratio` times what was predicted: those least known have erred most.

        False: there is nothing to correct; they are faster than they said, perhaps.
        """
        counted = self.corrected(claims)
        members = [w for w in workers if w in counted]
        before = {w: self.found.get(w) or Found(0.0, 0, counted[w], claims[w]) for w in members}
        least = min((found.num_timed for found in before.values()), default=0)
        is_new = False
        for worker_id, found in before.items():
            share = (1 + least) / (1 + found.num_timed)
            log_factor = max(found.least, min(_MOST, found.log_factor + share * math.log(ratio)))
            is_new = is_new or abs(log_factor - found.log_factor) > 0.01
            self.found[worker_id] = found._replace(log_factor=log_factor, num_timed=min(found.num_timed + 1, MOST_SURE))
        return is_new

    def confirm(self, workers: Iterable[WorkerId], claims: Mapping[WorkerId, WorkerProfile]) -> None:
        """Steps of these workers took what was predicted: next time, others are to blame first."""
        self.fold(workers, 1.0, claims)

    def corrected(self, claims: Mapping[WorkerId, WorkerProfile]) -> dict[WorkerId, WorkerProfile]:
        """Profiles to plan with."""
        timed = {w: self.found[w] for w in claims if w in self.found}
        middle = _Middle.of(claims)
        return {
            w: _slowed(timed[w].profile, math.exp(timed[w].log_factor), claim)
            if w in timed
            else _slowed(_capped(claim, middle), _untimed_factor(claim, timed.values()), claim)
            for w, claim in claims.items()
        }


def _untimed_factor(claim: WorkerProfile, timed: Collection[Found]) -> float:
    """How much slower than it says a worker is: as much as its like on the same machine, else as all within reason."""
    here = [found for found in timed if claim.host_id and found.claim.host_id == claim.host_id]
    alike = [found.log_factor for found in here if _are_alike(found.claim, claim)]
    if alike:
        return math.exp(max(0.0, statistics.median(alike)))
    common = statistics.median(found.log_factor for found in timed) if timed else 0.0
    return max(1.0, min(COMMON, math.exp(common)))


def _are_alike(one: WorkerProfile, other: WorkerProfile) -> bool:
    rates = [(*p.weight_bytes_per_s.items(), *p.matmul_flops_per_s.items()) for p in (one, other)]
    return len(rates[0]) == len(rates[1]) and all(
        a[0] == b[0] and 1 / OFF <= a[1] / b[1] <= OFF for a, b in zip(*rates, strict=True)
    )


def _slowed(profile: WorkerProfile, factor: float, claim: WorkerProfile) -> WorkerProfile:
    """So many times slower, but never faster than it says itself."""
    return replace(
        profile,
        memory_bytes=claim.memory_bytes,
        weight_bytes_per_s={d: min(r / factor, claim.weight_bytes_per_s[d]) for d, r in _common(profile, claim, 0)},
        matmul_flops_per_s={d: min(r / factor, claim.matmul_flops_per_s[d]) for d, r in _common(profile, claim, 1)},
        layer_overhead_s=min(59.0, max(profile.layer_overhead_s * factor, claim.layer_overhead_s)),
    )


def _common(profile: WorkerProfile, claim: WorkerProfile, which: int) -> list[tuple[str, float]]:
    rates, claimed = (
        (profile.weight_bytes_per_s, claim.weight_bytes_per_s)
        if which == 0
        else (profile.matmul_flops_per_s, claim.matmul_flops_per_s)
    )
    return [(dtype, rate) for dtype, rate in rates.items() if dtype in claimed]


class _Middle(NamedTuple):
    """What workers have in the middle, by dtype; of two, the lower."""

    weight_bytes_per_s: dict[str, float]
    matmul_flops_per_s: dict[str, float]

    @classmethod
    def of(cls, claims: Mapping[WorkerId, WorkerProfile]) -> _Middle:
        return cls(
            _middle(claim.weight_bytes_per_s for claim in claims.values()),
            _middle(claim.matmul_flops_per_s for claim in claims.values()),
        )


def _middle(rates: Iterable[Mapping[str, float]]) -> dict[str, float]:
    by_dtype: defaultdict[str, list[float]] = defaultdict(list)
    for one in rates:
        for dtype, rate in one.items():
            by_dtype[dtype].append(rate)
    return {dtype: statistics.median_low(found) for dtype, found in by_dtype.items()}


def _capped(claim: WorkerProfile, middle: _Middle) -> WorkerProfile:
    """What nobody has timed yet is believed within reason."""
    weights, flops = claim.weight_bytes_per_s, claim.matmul_flops_per_s
    return replace(
        claim,
        weight_bytes_per_s={d: min(rate, UNTIMED * middle.weight_bytes_per_s[d]) for d, rate in weights.items()},
        matmul_flops_per_s={d: min(rate, UNTIMED * middle.matmul_flops_per_s[d]) for d, rate in flops.items()},
    )
