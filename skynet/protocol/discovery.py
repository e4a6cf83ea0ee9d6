"""mDNS (service `_skynet._tcp.local.`): finding swarms on this machine and its network, and announcing ours.

The SRV and address records are there for other tools; ours read the signed TXT strings alone (`adverts.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import re
import secrets
import socket
import time
from collections.abc import Awaitable, Sequence
from dataclasses import replace
from typing import Final

from zeroconf import DNSQuestionType, ServiceStateChange, Zeroconf
from zeroconf import Error as ZeroconfError
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from skynet.errors import DiscoveryError, MalformedMessage, ProtocolError
from skynet.protocol.addresses import Interface, is_private, local_interfaces, plain_ip
from skynet.protocol.adverts import (
    MAX_HOSTS,
    SERVICE_TYPE,
    AdvertBody,
    KnownSwarms,
    SwarmAdvert,
    choose,
    pack,
    unpack,
    useful_hosts,
)
from skynet.protocol.codec import PROTOCOL_VERSION
from skynet.protocol.hello import PACKAGE_VERSION, checked_display
from skynet.protocol.identity import CurveCertificate, SwarmKey

logger = logging.getLogger(__name__)

MAX_ADVERTS: Final = 64  # looked at in one search: more is noise
SETTLE_S: Final = 0.4  # after the first answer, for those of other swarms
REFRESH_S: Final = 86400.0  # how often a coordinator signs its advert anew

__all__ = ["Advertiser", "SwarmAdvert", "choose", "discover"]


# -- searching


async def discover(
    timeout_s: float,
    swarm: str | None,
    pins: KnownSwarms,
    *,
    interfaces: Sequence[Interface] | None = None,
    settle_s: float = SETTLE_S,
) -> list[SwarmAdvert]:
    """Ask who is there. Returns `settle_s` after the first answer that `choose` could take, else at the timeout.

    Never raises for what others send, nor where mDNS isn't possible: then nothing is found.
    """
    interfaces = local_interfaces() if interfaces is None else interfaces
    zeroconf = _open(interfaces)
    if zeroconf is None:
        return []
    search = _Search(swarm, pins, interfaces)
    try:
        # Asked to answer us alone (QU, the default), hosts answer port 5353, which our machine's processes share.
        browser = AsyncServiceBrowser(
            zeroconf.zeroconf, SERVICE_TYPE, handlers=[search.on_change], question_type=DNSQuestionType.QM
        )
        try:
            async with asyncio.timeout(timeout_s):
                await search.has_candidate.wait()
                await asyncio.sleep(settle_s)
        except TimeoutError:
            logger.debug("search timed out timeout_s=%s found=%d", timeout_s, len(search.found))
        finally:
            await browser.async_cancel()
            await search.stop()
    finally:
        await zeroconf.async_close()
    return list(search.found.values())


class _Search:
    """Collects adverts while a browser runs. Bounded: a flood of names costs MAX_ADVERTS look-ups."""

    def __init__(self, swarm: str | None, pins: KnownSwarms, interfaces: Sequence[Interface]) -> None:
        self.found: dict[str, SwarmAdvert] = {}  # by instance name
        self.has_candidate = asyncio.Event()
        self._swarm = swarm
        self._pins = pins
        self._interfaces = interfaces
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def on_change(self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        """A name appeared, or has news."""
        running = self._tasks.get(name)
        is_new = running is None and len(self._tasks) < MAX_ADVERTS
        if state_change is ServiceStateChange.Removed:
            self.found.pop(name, None)
        elif is_new or (running is not None and running.done()):
            self._tasks[name] = asyncio.get_running_loop().create_task(
                self._look_up(zeroconf, service_type, name), name=f"look-up-{name}"
            )

    async def stop(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _look_up(self, zeroconf: Zeroconf, service_type: str, name: str) -> None:
        try:
            info = AsyncServiceInfo(service_type, name)
            if not info.load_from_cache(zeroconf) and not await info.async_request(zeroconf, 3000, DNSQuestionType.QM):
                return
            advert = unpack(info.properties, time.time())
        except (MalformedMessage, ZeroconfError, ValueError, OSError) as exc:
            logger.debug("advert ignored name=%r reason=%s", name, exc)
            return
        except ProtocolError as exc:
            logger.info("advert refused name=%r reason=%s", name, exc)
            return
        advert = replace(advert, hosts=useful_hosts(advert.hosts, self._interfaces))
        self.found[name] = advert
        with contextlib.suppress(DiscoveryError):
            choose([advert], self._swarm, self._pins)
            self.has_candidate.set()


# -- announcing


class Advertiser:
    """Announces a swarm while it runs. Where mDNS isn't possible it says so in the log and does nothing else."""

    def __init__(
        self,
        name: str,
        swarm_key: SwarmKey,
        port: int,
        hosts: Sequence[str],
        *,
        certificate: CurveCertificate | None = None,
        interfaces: Sequence[Interface] | None = None,
    ) -> None:
        self._key = swarm_key
        self._body = AdvertBody(
            name=checked_display(name),
            port=port,
            hosts=tuple(hosts)[:MAX_HOSTS],
            protocol=PROTOCOL_VERSION,
            package=PACKAGE_VERSION,
            certificate=certificate,
        )
        self._interfaces = interfaces
        self._instance = instance_label(name, swarm_key.fingerprint, secrets.token_hex(3))
        self._zeroconf: AsyncZeroconf | None = None
        self._refresh: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Announce on every interface that leads to one of our hosts."""
        interfaces = local_interfaces() if self._interfaces is None else self._interfaces
        hosts = {plain_ip(host) for host in self._body.hosts}
        self._zeroconf = _open([interface for interface in interfaces if interface.ip in hosts])
        if self._zeroconf is None:
            logger.warning("swarm not announced name=%s reason=no interface for mDNS", self._body.name)
            return
        try:
            # Our label is random in part, so there is nobody to ask whether it is taken.
            announced = await self._zeroconf.async_register_service(self._info(), cooperating_responders=True)
        except (ZeroconfError, OSError) as exc:
            logger.warning("swarm not announced name=%s reason=%s", self._body.name, exc)
            await self.stop()
            return
        self._refresh = asyncio.create_task(self._announce_anew(announced), name="announce")
        logger.info("swarm announced name=%s instance=%s port=%d", self._body.name, self._instance, self._body.port)

    async def stop(self) -> None:
        """Say goodbye. Twice in a row is harmless."""
        task, self._refresh = self._refresh, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        zeroconf, self._zeroconf = self._zeroconf, None
        if zeroconf is not None:
            try:
                async with asyncio.timeout(3):
                    await zeroconf.async_unregister_all_services()
            except (TimeoutError, OSError) as exc:
                logger.debug("no goodbye name=%s reason=%s", self._body.name, exc)
            finally:
                await zeroconf.async_close()

    async def _announce_anew(self, announced: Awaitable[object]) -> None:
        assert self._zeroconf is not None
        while True:
            try:
                await announced
                await asyncio.sleep(REFRESH_S)
                announced = await self._zeroconf.async_update_service(self._info())
            except OSError as exc:
                logger.warning("announcement failed name=%s reason=%s", self._body.name, exc)
                await asyncio.sleep(60)

    def _info(self) -> AsyncServiceInfo:
        addresses = [ip.packed for host in self._body.hosts if (ip := plain_ip(host)) is not None]
        return AsyncServiceInfo(
            SERVICE_TYPE,
            f"{self._instance}.{SERVICE_TYPE}",
            addresses=addresses,
            port=self._body.port,
            properties=pack(self._body, self._key, time.time()),
            server=f"{self._instance}.local.",
        )


def instance_label(name: str, fingerprint: str, unique: str) -> str:
    """An instance's DNS label, at most 63 bytes: for people with an mDNS browser; the swarm's name is in the advert."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", name)[:40].strip("-") or "swarm"
    return f"{plain}-{fingerprint[:9]}-{unique}"


def _open(interfaces: Sequence[Interface]) -> AsyncZeroconf | None:
    """mDNS on these interfaces: by IPv4, and by IPv6 where an interface has nothing else; None if it can't be."""
    usable = [i for i in interfaces if not i.is_virtual and (i.is_loopback or is_private(i.ip) or i.ip.version == 4)]
    with_ipv4 = {i.name for i in usable if i.ip.version == 4}
    chosen = [i.address for i in usable if i.ip.version == 4 or (i.name not in with_ipv4 and not i.is_loopback)]
    chosen = [address for address in dict.fromkeys(chosen) if _is_ours(address)]
    if not chosen:
        return None
    try:
        return AsyncZeroconf(interfaces=chosen)
    except (OSError, RuntimeError, ipaddress.AddressValueError) as exc:
        logger.warning("mDNS isn't possible addresses=%s reason=%s", ",".join(chosen), exc)
        return None


def _is_ours(address: str) -> bool:
    """Interfaces come and go; the library leaves sockets open when one has gone."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True
