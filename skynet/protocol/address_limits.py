"""How often, and how many at once, one address may knock. Pure: the time is an argument."""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RateLimit:
    """A token bucket: `burst` at once, then `per_s`."""

    burst: float
    per_s: float


@dataclass(slots=True)
class _Bucket:
    tokens: float
    updated: float


class AddressLimiter:
    """One bucket per address and one for all together. Remembers at most `max_addresses`, the stalest go first."""

    def __init__(self, each: RateLimit, total: RateLimit, max_addresses: int = 4096) -> None:
        self._each, self._total, self._max_addresses = each, total, max_addresses
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()
        self._all = _Bucket(total.burst, 0.0)

    def __len__(self) -> int:
        return len(self._buckets)

    def allow(self, address: str, now: float) -> bool:
        """Whether one more connection from `address` may be served at `now` (seconds, any steady clock)."""
        bucket = self._buckets.pop(address, None) or _Bucket(self._each.burst, now)
        self._buckets[address] = bucket
        if len(self._buckets) > self._max_addresses:
            self._buckets.popitem(last=False)
        # Both are asked in this order, so that an address beyond its own share takes nothing from the others'.
        return _take(bucket, self._each, now) and _take(self._all, self._total, now)


def _take(bucket: _Bucket, limit: RateLimit, now: float) -> bool:
    elapsed = max(0.0, now - bucket.updated)
    bucket.tokens = min(limit.burst, bucket.tokens + elapsed * limit.per_s)
    bucket.updated = now
    if bucket.tokens < 1:
        return False
    bucket.tokens -= 1
    return True


def plain_address(host: str) -> str:
    """An address as text, with IPv4-mapped IPv6 unwrapped; a scope (`%eth0`) stays."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)
