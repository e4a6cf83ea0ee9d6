"""How a process enters a swarm: find the coordinator, be admitted, know whose key to trust from then on."""

from __future__ import annotations

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
from skynet.protocol.identity import NodeKey, ProcessKey, PublicKey, fingerprint_of
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
    swarm: str | None = None
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
    pinned_key: PublicKey | None


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
                place.host, place.port, pinned_key=place.pinned_key, hello=applicant.hello, timeout_s=config.find_s
            )
        except DiscoveryError as exc:
            failure = exc
            continue
        is_asked_for = invite is not None or config.swarm is not None
        is_first = pins.pin(admission.welcome.swarm_name, admission.swarm_key, time.time(), beside_others=is_asked_for)
        return Ticket(admission.welcome, admission.swarm_key, process_key, place.host, is_first)
    assert failure is not None
    raise failure


async def _places(config: EntranceConfig, invite: Invite | None, pins: Pins) -> list[_Place]:
    """Where to ask, best first: the address given by hand, the invite's, or what mDNS finds."""
    if config.coordinator is not None:
        host, port = parse_endpoint(config.coordinator, DEFAULT_PORT)
        return [_Place(host, port, invite.swarm_key if invite else None)]
    if invite is not None:
        return [_Place(host, port, invite.swarm_key) for host, port in invite.addresses]
    adverts = await discover(config.find_s, config.swarm, pins)
    advert = choose(adverts, config.swarm, pins)
    return [_Place(host, advert.port, advert.swarm_key) for host in advert.hosts]


def _display_name() -> str:
    """Who and where, for people; nobody decides by it."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = "someone"
    return "".join(c for c in f"{user}@{platform.node()}" if c.isprintable())[:64]
