"""How a process enters a swarm: find the coordinator, be admitted, know whose key to trust from then on."""

from __future__ import annotations

import functools
import getpass
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from skynet.errors import DiscoveryError
from skynet.protocol.addresses import parse_endpoint
from skynet.protocol.admission import request_admission
from skynet.protocol.discovery import choose, discover
from skynet.protocol.hello import Applicant, Welcome
from skynet.protocol.identity import NodeKey, ProcessKey, PublicKey, fingerprint_of, is_fingerprint
from skynet.protocol.ids import PeerId
from skynet.protocol.invites import Invite, decode_invite
from skynet.protocol.pins import Pins
from skynet.protocol.roles import Role

DEFAULT_PORT: Final = 47100
COORDINATOR: Final = PeerId("coordinator")


@dataclass(frozen=True, slots=True, kw_only=True)
class EntranceConfig:
    """Where to look and with what right to enter."""

    coordinator: str | None = None  # HOST or HOST:PORT; None: mDNS, or the invite's addresses
    swarm: str | None = None  # its name or its key's fingerprint
    swarm_key: PublicKey | None = None  # of the swarm that this process was in: it comes back to no other
    invite: str | None = None
    config_dir: Path
    find_s: float = 5.0


class Ticket(NamedTuple):
    """What an admitted process knows of its swarm."""

    welcome: Welcome
    swarm_key: PublicKey
    process_key: ProcessKey
    host: str  # the address at which the coordinator was reached
    is_first_visit: bool

    def endpoint(self, name: str) -> str:
        """ZeroMQ endpoint of one of the coordinator's sockets."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{self.welcome.ports[name]}"

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.swarm_key)


class _Place(NamedTuple):
    host: str
    port: int
    pinned_key: PublicKey | None  # nothing is said to another
    is_given: bool  # the user named this address, or his invite does

    @property
    def address(self) -> str:
        host = self.host.lower()
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"


async def enter(config: EntranceConfig, role: Role, suffix: str, process_key: ProcessKey | None = None) -> Ticket:
    """Be admitted as `role`. Raises DiscoveryError, AdmissionRefused or another ProtocolError; each says what to do."""
    pins = Pins(config.config_dir)
    invite = decode_invite(config.invite) if config.invite else None
    process_key = process_key or ProcessKey.generate()
    applicant = Applicant(
        node_key=NodeKey.load_or_create(config.config_dir),
        process_key=process_key,
        role=role,
        suffix=suffix,
        display_name=_display_name(),
        invite_id=invite.invite_id if invite else "",
        invite_secret=invite.secret if invite else b"",
    )
    places = await _places(config, invite, pins)
    failure: DiscoveryError | None = None
    for place in places:
        try:
            admission = await request_admission(
                place.host,
                place.port,
                pinned_key=place.pinned_key,
                hello=applicant.hello,
                timeout_s=config.find_s,
                check_key=functools.partial(_check_key, config, place, pins),
            )
            _check_name(config, place, admission.welcome.swarm_name)
        except DiscoveryError as exc:
            failure = exc
            continue
        names_key = config.swarm is not None and is_fingerprint(config.swarm)
        is_asked_for = names_key or invite is not None or config.swarm_key is not None
        is_first = pins.pin(
            admission.welcome.swarm_name,
            admission.swarm_key,
            time.time(),
            beside_others=is_asked_for,
            address=place.address if place.is_given else None,
        )
        return Ticket(admission.welcome, admission.swarm_key, process_key, place.host, is_first)
    assert failure is not None
    raise failure


def _check_key(config: EntranceConfig, place: _Place, pins: Pins, key: PublicKey) -> None:
    """Before anything is said to whoever answered with this key. Raises DiscoveryError if another is expected."""
    if place.pinned_key is not None:
        return  # compared already
    where, seen = f"{place.host} port {place.port}", fingerprint_of(key)
    if config.swarm is not None and is_fingerprint(config.swarm):
        if seen != config.swarm:
            raise DiscoveryError(
                f"{where}: another swarm answers there, its key is {seen}, --swarm asks for {config.swarm}; "
                "check the address"
            )
        return
    known = pins.keys_of(config.swarm) if config.swarm is not None else ()
    if known and key not in known:
        raise DiscoveryError(
            f"{where}: not the swarm {config.swarm!r} that you know: the key there is {seen}, pinned is "
            f"{fingerprint_of(known[0])}; {pins.advice(key)}"
        )
    before = pins.at(place.address)
    if not known and before is not None and before != key:
        raise DiscoveryError(
            f"{where}: another swarm answers there than before: its key is {seen}, it was {fingerprint_of(before)}; "
            f"{pins.advice(key)}"
        )


def _check_name(config: EntranceConfig, place: _Place, name: str) -> None:
    """Raises DiscoveryError if the user asked for a swarm by name, and this one has another."""
    if config.swarm_key is not None or config.swarm in (None, name) or is_fingerprint(config.swarm or ""):
        return
    raise DiscoveryError(
        f"{place.host} port {place.port}: the swarm there is called {name!r}, --swarm asks for {config.swarm!r}; "
        "check the address, or leave --swarm away"
    )


async def _places(config: EntranceConfig, invite: Invite | None, pins: Pins) -> list[_Place]:
    """Where to ask, best first: the address given by hand, the invite's, or what mDNS finds."""
    key = config.swarm_key or (invite.swarm_key if invite else None)
    if config.coordinator is not None:
        host, port = parse_endpoint(config.coordinator, DEFAULT_PORT)
        return [_Place(host, port, key, is_given=True)]
    if invite is not None:
        return [_Place(host, port, key, is_given=True) for host, port in invite.addresses]
    swarm = fingerprint_of(key) if key is not None else config.swarm
    adverts = await discover(config.find_s, swarm, pins)
    advert = choose(adverts, swarm, pins)
    return [_Place(host, advert.port, key or advert.swarm_key, is_given=False) for host in advert.hosts]


def _display_name() -> str:
    """Who and where, for people; nobody decides by it."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = "someone"
    return "".join(c for c in f"{user}@{platform.node()}" if c.isprintable())[:64]
