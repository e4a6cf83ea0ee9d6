"""This machine's addresses, and which others count as its local network.

Reading what the machine has (`local_interfaces`) is apart from judging it: everything else here is pure.
"""

from __future__ import annotations

import ipaddress
import logging
import re
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from skynet.errors import ConfigError

logger = logging.getLogger(__name__)

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

PRIVATE_NETWORKS: Final[tuple[IPNetwork, ...]] = tuple(
    ipaddress.ip_network(text)
    for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16", "fc00::/7", "fe80::/10")
)
# Bridges and tunnels that software on this machine made: containers, virtual machines, VPNs. veth isn't among them:
# inside a container it is the way out, and on the host its end is plugged into a bridge and has no address.
_VIRTUAL_NAMES: Final = re.compile(
    r"(docker|br-|virbr|lxcbr|lxdbr|cni|flannel|cali|vnet|vmnet|vboxnet|tun|tap|utun|wg|tailscale|zt|ppp|ipsec|gre|sit|"
    r"ip6tnl|vxlan|dummy|podman|kube|nebula|awdl|llw|bridge)[0-9a-f.-]*"
)
_HOST_NAME: Final = re.compile(
    r"(?=.{1,253}\.?$)([A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?)(\.[A-Za-z0-9_-]{1,63})*\.?"
)
_ROUTE_IS_UP, _ROUTE_HAS_GATEWAY = 0x1, 0x2


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """One address of one network interface of this machine that is up."""

    name: str
    address: str  # without scope
    prefix: int  # length of its subnet's prefix
    is_virtual: bool = False  # made by software on this machine: its neighbours aren't the owner's network
    is_loopback: bool = False
    gateways: tuple[str, ...] = ()  # routers in its subnet: what comes from them may come from anywhere

    def __post_init__(self) -> None:
        ipaddress.ip_interface(f"{self.address}/{self.prefix}")

    @property
    def ip(self) -> IPAddress:
        return ipaddress.ip_address(self.address)

    @property
    def network(self) -> IPNetwork:
        return ipaddress.ip_network(f"{self.address}/{self.prefix}", strict=False)


# -- judging


def plain_ip(text: str) -> IPAddress | None:
    """An address without its scope (`%eth0`) and with IPv4-mapped IPv6 unwrapped; None if it isn't one."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def is_private(address: IPAddress) -> bool:
    """Whether it lies in one of the ranges that the Internet doesn't route."""
    return any(address in network for network in PRIVATE_NETWORKS if network.version == address.version)


def is_lan_source(source: str, interfaces: Sequence[Interface]) -> bool:
    """Whether a connection from `source` comes from this machine or its local network: what mode `lan` admits.

    It is loopback, or private and in a directly connected subnet of a real interface, and not that subnet's gateway
    (behind which is everybody). False for anything that isn't an address.
    """
    address = plain_ip(source)
    if address is None:
        return False
    if address.is_loopback:
        return True
    if not is_private(address):
        return False
    if any(address == plain_ip(gateway) for interface in interfaces for gateway in interface.gateways):
        return False
    return any(
        address in interface.network
        for interface in interfaces
        if not interface.is_virtual and not interface.is_loopback and interface.ip.version == address.version
    )


def listen_addresses(interfaces: Sequence[Interface]) -> tuple[str, ...]:
    """Where a coordinator or worker listens: the local network's addresses, then loopback; never the wildcard.

    IPv6 link-local addresses are left out: they mean nothing without an interface, and peers know theirs, not ours.
    """
    lan = [i for i in interfaces if not i.is_virtual and not i.is_loopback and is_private(i.ip)]
    usable = [i for i in lan if not (i.ip.version == 6 and i.ip.is_link_local)]
    usable.sort(key=lambda i: (i.ip.is_link_local, i.ip.version))
    loopback = [i for i in interfaces if i.is_loopback and i.address in ("127.0.0.1", "::1")]
    return tuple(dict.fromkeys(i.address for i in (*usable, *sorted(loopback, key=lambda i: i.ip.version))))


def expand_wildcards(hosts: Sequence[str], interfaces: Sequence[Interface]) -> tuple[str, ...]:
    """The addresses at which a process is reached that listens on `hosts`: a wildcard is all of this machine's.

    Of those the local network's come first, then public ones, those of tunnels and bridges, and loopback.
    """
    found: list[str] = []
    for host in hosts:
        address = plain_ip(host)
        if address is None or not address.is_unspecified:
            found.append(host)
            continue
        own = [i for i in interfaces if address.version == 6 or i.ip.version == 4]  # the IPv6 wildcard takes in IPv4
        own = [i for i in own if not (i.ip.version == 6 and i.ip.is_link_local)]
        own.sort(key=lambda i: (i.is_loopback, i.is_virtual, not is_private(i.ip), i.ip.is_link_local, i.ip.version))
        found += [i.address for i in own]
    return tuple(dict.fromkeys(found))


# -- addresses given by hand


def parse_endpoint(text: str, default_port: int) -> tuple[str, int]:
    """`HOST`, `HOST:PORT`, `V6` or `[V6]:PORT` as given by hand: host and port. Raises ConfigError."""
    text = text.strip()
    if "://" in text:
        raise _wrong_endpoint(text, "nothing comes before its name")
    bracketed = re.fullmatch(r"\[([^\[\]]*)\](?::(.*))?", text)
    if bracketed:
        host, port = bracketed[1], bracketed[2]
        if plain_ip(host) is None:
            raise _wrong_endpoint(text, "what is in brackets isn't an IPv6 address")
    elif plain_ip(text) is not None:
        host, port = text, None
    else:
        host, colon, rest = text.partition(":")
        port = rest if colon else None
        if not _HOST_NAME.fullmatch(host) or (plain_ip(host) is None and re.fullmatch(r"[0-9.]+", host)):
            raise _wrong_endpoint(text, f"{host[:64]!r} is neither a name nor an address")
    if port is None:
        return host, default_port
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise _wrong_endpoint(text, f"port {port[:16]!r} isn't a number from 1 to 65535")
    return host, int(port)


def check_host(text: str, option: str) -> None:
    """Raises ConfigError, naming the option, for what isn't a name or an address, without a port."""
    try:
        host, port = parse_endpoint(text, 0)
    except ConfigError as exc:
        raise ConfigError(f"{option}: {exc}") from exc
    if port or host != text.strip():
        raise ConfigError(f"{option} {text}: give a name or an address, without a port")


def format_endpoint(host: str, port: int) -> str:
    """Host and port as people write them, with brackets around IPv6."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _wrong_endpoint(text: str, reason: str) -> ConfigError:
    return ConfigError(f"address {text[:80]!r}: {reason}; write HOST, HOST:PORT or [IPV6]:PORT")


# -- what this machine has


def local_interfaces() -> tuple[Interface, ...]:
    """The addresses of this machine's interfaces that are up, in the system's order."""
    states = psutil.net_if_stats()
    gateways = _gateways()
    found = []
    for name, addresses in psutil.net_if_addrs().items():
        if name not in states or not states[name].isup:
            continue
        for entry in addresses:
            if entry.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            ip = ipaddress.ip_address(entry.address.partition("%")[0])
            prefix = _prefix(ip, entry.netmask)
            network = ipaddress.ip_network(f"{ip}/{prefix}", strict=False)
            found.append(
                Interface(
                    name=name,
                    address=str(ip),
                    prefix=prefix,
                    is_virtual=is_virtual_name(name) or _is_bridge_of_software(Path("/sys/class/net") / name),
                    is_loopback=ip.is_loopback,
                    gateways=tuple(str(gateway) for gateway in gateways if gateway in network),
                )
            )
    return tuple(found)


def is_virtual_name(name: str) -> bool:
    """Whether an interface of this name is a bridge or tunnel that software made."""
    return _VIRTUAL_NAMES.fullmatch(name) is not None


def _is_bridge_of_software(interface: Path) -> bool:
    """A bridge without a real network card in it; one with a card is the machine's way to its network."""
    ports = interface / "brif"
    return ports.is_dir() and not any((port / "device").exists() for port in _listed(ports))


def _listed(directory: Path) -> list[Path]:
    try:
        return [directory.parent.parent / path.name for path in directory.iterdir()]
    except OSError:
        return []  # the bridge is just being removed


def _prefix(ip: IPAddress, netmask: str | None) -> int:
    if netmask is None:
        return ip.max_prefixlen  # point to point: nobody else is in its subnet
    return bin(int(ipaddress.ip_address(netmask))).count("1")


def _gateways() -> list[IPAddress]:
    """Every router in this machine's routing tables."""
    found: list[IPAddress] = []
    for path, parse in (("/proc/net/route", _ipv4_gateway), ("/proc/net/ipv6_route", _ipv6_gateway)):
        try:
            lines = Path(path).read_text(encoding="ascii").splitlines()
        except OSError:
            continue  # not Linux, or no IPv6
        found += [gateway for gateway in map(parse, _fields(lines)) if gateway is not None]
    return found


def _fields(lines: Sequence[str]) -> Iterator[list[str]]:
    return (line.split() for line in lines)


def _ipv4_gateway(fields: list[str]) -> IPAddress | None:
    """Columns: interface, destination, gateway, flags, ...; addresses as the kernel's 32-bit words."""
    if len(fields) < 4 or fields[0] == "Iface":
        return None
    if int(fields[3], 16) & (_ROUTE_IS_UP | _ROUTE_HAS_GATEWAY) != _ROUTE_IS_UP | _ROUTE_HAS_GATEWAY:
        return None
    return ipaddress.IPv4Address(struct.pack("=I", int(fields[2], 16)))


def _ipv6_gateway(fields: list[str]) -> IPAddress | None:
    """Columns: destination, its prefix, source, its prefix, next hop, metric, references, use, flags, interface."""
    if len(fields) < 10 or int(fields[8], 16) & (_ROUTE_IS_UP | _ROUTE_HAS_GATEWAY) != 3:
        return None
    return ipaddress.IPv6Address(int(fields[4], 16))
