"""How fast workers are, without the scatter of their measurements.

Like machines never measure quite the same. Taken at its word, a difference of a few percent would give one of two equal
machines nearly all layers and send every plan after the noise of the last start (docs/decisions/0015).
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Final

from skynet.protocol.profile import WorkerProfile

SCATTER: Final = 1.15  # workers whose rates differ by less count as equally fast
SCATTER_OF_ONE_HOST: Final = 2.0  # the same for CPU workers of one machine, which disturb each other's measurement


def known_rate(rates: Mapping[str, float], dtype: str) -> float:
    """The rate for a dtype; a worker that didn't measure it is taken to be as slow as in its slowest one."""
    return rates.get(dtype) or min(rates.values())


def levelled_rates(rates: Sequence[float], profiles: Sequence[WorkerProfile]) -> list[float]:
    """The rates (of anything) with those that can't be told apart made equal, whichever order they come in."""
    found = list(rates)
    by_host: defaultdict[tuple[str, str, int], list[int]] = defaultdict(list)
    for i, profile in enumerate(profiles):
        if profile.host_id and profile.device == "cpu":
            by_host[profile.host_id, profile.device_name, profile.threads].append(i)
    for members in by_host.values():
        _level(found, members, SCATTER_OF_ONE_HOST)
    _level(found, range(len(found)), SCATTER)
    return found


def _level(rates: list[float], members: Sequence[int], scatter: float) -> None:
    """Give each cluster its middle rate. A cluster reaches from its fastest down to `scatter` times slower."""
    cluster: list[int] = []
    for i in [*sorted(members, key=lambda i: -rates[i]), None]:
        if cluster and (i is None or rates[cluster[0]] > rates[i] * scatter):
            if rates[cluster[0]] > rates[cluster[-1]]:
                middle = math.exp(statistics.median(math.log(rates[j]) for j in cluster))
                for j in cluster:
                    rates[j] = middle
            cluster = []
        if i is not None:
            cluster.append(i)
