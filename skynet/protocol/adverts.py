"""What a swarm announces about itself, as signed bytes, and which of several adverts to follow. Pure.

An advert is a msgpack body signed by the swarm's key; it travels in TXT strings `b0`, `b1`, ... beside `k` (the key)
and `s` (until when it holds, and the signature). It is a hint for finding the coordinator: who is let in, and whether
the coordinator holds the swarm's key, is settled at admission.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Final, Protocol

import msgspec

from skynet.errors import DiscoveryError, MalformedMessage
from skynet.protocol.addresses import Interface, format_endpoint, plain_ip
from skynet.protocol.codec import PROTOCOL_VERSION
from skynet.protocol.hello import PACKAGE_VERSION, checked_display, version_advice
from skynet.protocol.identity import (
    CERTIFICATE_LIFETIME_S,
    CurveCertificate,
    PublicKey,
    Signed,
    SwarmKey,
    checked_public_key,
    fingerprint_of,
    is_fingerprint,
)

SERVICE_TYPE: Final = "_skynet._tcp.local."
PURPOSE: Final = "advert"
MAX_HOSTS: Final = 16
MAX_TXT_BYTES: Final = 2048
_CHUNK: Final = 240  # a TXT string has at most 255 bytes, its name included


class AdvertBody(msgspec.Struct, frozen=True, kw_only=True):
    """What the swarm's key signs."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]  # of the admission listener
    hosts: Annotated[tuple[Annotated[str, msgspec.Meta(max_length=64)], ...], msgspec.Meta(max_length=MAX_HOSTS)]
    protocol: Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
    package: Annotated[str, msgspec.Meta(max_length=32)]
    certificate: CurveCertificate | None = None  # the coordinator's CURVE key


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(AdvertBody)


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmAdvert:
    """A swarm as its coordinator announces it; the signature has been checked."""

    name: str
    swarm_key: PublicKey
    port: int  # of the admission listener
    hosts: tuple[str, ...]  # addresses to try, the most useful for this machine first
    protocol: int = PROTOCOL_VERSION
    package: str = PACKAGE_VERSION
    certificate: CurveCertificate | None = None
    not_after: int = 0  # of the signature: of two adverts of one swarm the later counts

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.swarm_key)

    def __str__(self) -> str:
        where = format_endpoint(self.hosts[0], self.port) if self.hosts else "no address"
        return f"{self.name} (key {self.fingerprint}) at {where}"


class KnownSwarms(Protocol):
    """The keys a user has met before; `Pins` is one."""

    def keys_of(self, name: str) -> tuple[PublicKey, ...]:
        """The keys pinned for a swarm's name; none if it was never seen."""
        ...


# -- the advert's bytes


def pack(body: AdvertBody, key: SwarmKey, now: float) -> dict[str, bytes]:
    """TXT strings of an advert, signed."""
    data = _encoder.encode(body)
    signed = key.sign(PURPOSE, key.public_key, int(now) + CERTIFICATE_LIFETIME_S, data)
    chunks = {f"b{i}": data[at : at + _CHUNK] for i, at in enumerate(range(0, len(data), _CHUNK))}
    return {"v": b"1", "k": key.public_key, "s": struct.pack(">Q", signed.not_after) + signed.signature, **chunks}


def unpack(strings: Mapping[bytes, bytes | None], now: float) -> SwarmAdvert:
    """The advert in TXT strings that anybody may have sent. Raises ProtocolError."""
    if sum(len(key) + len(value or b"") for key, value in strings.items()) > MAX_TXT_BYTES:
        raise MalformedMessage(f"advert: more than {MAX_TXT_BYTES} bytes")
    if strings.get(b"v") != b"1":
        raise MalformedMessage(f"advert: of unknown form {strings.get(b'v')!r}")
    key = checked_public_key(strings.get(b"k") or b"", "advert")
    seal = strings.get(b"s") or b""
    if len(seal) != 72:
        raise MalformedMessage(f"advert: a seal has 72 bytes, got {len(seal)}")
    data = b"".join(strings.get(b"b%d" % i) or b"" for i in range(len(strings)))
    signed = Signed(struct.unpack(">Q", seal[:8])[0], seal[8:])
    signed.verify(PURPOSE, key, key, data, now, CERTIFICATE_LIFETIME_S)
    try:
        body = _decoder.decode(data)
        checked_display(body.name)
        checked_display(body.package)
    except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
        raise MalformedMessage(f"advert: {exc}") from exc
    if any(plain_ip(host) is None or "%" in host for host in body.hosts):
        raise MalformedMessage(f"advert: hosts {body.hosts} aren't all addresses")
    return SwarmAdvert(
        name=body.name,
        swarm_key=key,
        port=body.port,
        hosts=body.hosts,
        protocol=body.protocol,
        package=body.package,
        certificate=body.certificate,
        not_after=signed.not_after,
    )


def useful_hosts(hosts: Sequence[str], interfaces: Sequence[Interface]) -> tuple[str, ...]:
    """An advert's addresses, best first, without loopback ones of other machines."""
    own = {interface.ip for interface in interfaces if not interface.is_loopback}
    networks = [interface.network for interface in interfaces if not interface.is_loopback]
    addresses = [address for host in hosts if (address := plain_ip(host)) is not None]
    is_here = all(a.is_loopback for a in addresses) or any(a in own for a in addresses)
    kept = [a for a in addresses if is_here or not a.is_loopback]
    near = {a for a in kept if any(a.version == n.version and a in n for n in networks)}
    kept.sort(key=lambda a: (not a.is_loopback, a not in near, a.version))
    return tuple(dict.fromkeys(map(str, kept)))


# -- choosing


def choose(adverts: Sequence[SwarmAdvert], swarm: str | None, pins: KnownSwarms) -> SwarmAdvert:
    """The swarm to enter: the only one there is, or the one called `swarm` (a name or a fingerprint).

    A swarm that uses a pinned swarm's name with another key counts only when its fingerprint is asked for.
    Raises DiscoveryError that says what was found and which option decides.
    """
    if swarm is not None:
        wanted = [advert for advert in adverts if swarm == advert.fingerprint]
        if wanted:
            return max(wanted, key=lambda advert: advert.not_after)
        if is_fingerprint(swarm):  # a swarm may call itself so
            raise DiscoveryError(_nothing_found(adverts, (), swarm))
    named = [advert for advert in adverts if swarm in (None, advert.name)]
    strangers = [a for a in named if pins.keys_of(a.name) and a.swarm_key not in pins.keys_of(a.name)]
    latest = {a.swarm_key: a for a in sorted(named, key=lambda a: a.not_after) if a not in strangers}
    if len(latest) == 1:
        return _speaking_our_protocol(next(iter(latest.values())))
    if latest:
        raise DiscoveryError(
            f"{len(latest)} swarms answer: {_listed(latest.values())}; choose one by --swarm NAME"
            f"{' (or its key, where names are equal)' if len({a.name for a in latest.values()}) < len(latest) else ''}"
        )
    raise DiscoveryError(_nothing_found(adverts, strangers, swarm))


def _speaking_our_protocol(advert: SwarmAdvert) -> SwarmAdvert:
    if advert.protocol != PROTOCOL_VERSION:
        raise DiscoveryError(f"swarm {advert}: {version_advice(advert.protocol, advert.package)}")
    return advert


def _listed(adverts: Iterable[SwarmAdvert]) -> str:
    return "; ".join(sorted(map(str, adverts)))


def _nothing_found(adverts: Sequence[SwarmAdvert], strangers: Sequence[SwarmAdvert], swarm: str | None) -> str:
    sought = "no swarm" if swarm is None else f"no swarm called {swarm!r}"
    text = f"{sought} answered: asked by mDNS ({SERVICE_TYPE}) on this machine and its local network"
    others = [advert for advert in adverts if advert not in strangers]
    if strangers:
        text += (
            f"; ignored, since another key is pinned for that name: {_listed(strangers)} (if you trust its key, "
            f"pass it by --swarm {strangers[0].fingerprint})"
        )
    if others:
        text += f"; others that answered: {_listed(others)}"
    return f"{text}; start one with `skynet coordinator`, or pass its address by --coordinator HOST:PORT"
