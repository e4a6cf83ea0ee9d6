"""Which addresses are the local network, where we listen, and what people may write."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skynet.errors import ConfigError
from skynet.protocol.addresses import (
    Interface,
    expand_wildcards,
    format_endpoint,
    is_lan_source,
    is_virtual_name,
    listen_addresses,
    local_interfaces,
    parse_endpoint,
)

INTERFACES = (
    Interface(name="lo", address="127.0.0.1", prefix=8, is_loopback=True),
    Interface(name="lo", address="::1", prefix=128, is_loopback=True),
    Interface(name="eth0", address="192.168.7.20", prefix=24, gateways=("192.168.7.1",)),
    Interface(name="eth0", address="fd12:3456::20", prefix=64),
    Interface(name="eth0", address="fe80::20", prefix=64, gateways=("fe80::1",)),
    Interface(name="eth1", address="203.0.113.9", prefix=24),
    Interface(name="eth2", address="10.1.2.3", prefix=16),
    Interface(name="docker0", address="172.17.0.1", prefix=16, is_virtual=True),
    Interface(name="wlan0", address="169.254.9.9", prefix=16),
)


@pytest.mark.parametrize(
    "source",
    [
        "127.0.0.1",
        "127.8.8.8",
        "::1",
        "::ffff:127.0.0.1",
        "192.168.7.99",
        "::ffff:192.168.7.99",
        "10.1.255.1",
        "fd12:3456::99",
        "fe80::99",
        "fe80::99%eth0",
        "169.254.1.1",
        "192.168.7.20",
    ],
)
def test_neighbours_are_admitted(source: str) -> None:
    assert is_lan_source(source, INTERFACES)


@pytest.mark.parametrize(
    ("source", "because"),
    [
        ("192.168.7.1", "it is the gateway, behind which is everybody"),
        ("::ffff:192.168.7.1", "it is the gateway in another dress"),
        ("fe80::1%eth0", "it is the IPv6 gateway"),
        ("192.168.8.1", "its subnet isn't connected directly"),
        ("10.2.0.1", "its subnet isn't connected directly"),
        ("203.0.113.10", "it is a public address, though in our subnet"),
        ("8.8.8.8", "it is far away"),
        ("2001:db8::1", "it is far away"),
        ("::ffff:8.8.8.8", "it is far away"),
        ("172.17.0.2", "it is a container on this machine, which may forward for anybody"),
        ("fd99::1", "its subnet isn't connected directly"),
        ("0.0.0.0", "it is no address of anybody"),
        ("", "it is no address"),
        ("localhost", "names aren't looked up"),
        ("192.168.7.99.1", "it is no address"),
        ("/run/skynet.sock", "it is no address"),
    ],
)
def test_others_are_not(source: str, because: str) -> None:
    assert not is_lan_source(source, INTERFACES), because


@given(st.one_of(st.ip_addresses().map(str), st.text(max_size=40)))
def test_whoever_is_admitted_is_loopback_or_private_and_connected(source: str) -> None:
    if is_lan_source(source, INTERFACES):
        address = ipaddress.ip_address(source.partition("%")[0])
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
            address = address.ipv4_mapped
        assert address.is_loopback or any(
            address in i.network for i in INTERFACES if i.name in ("eth0", "eth2", "wlan0")
        )
        assert address.is_private


@given(st.ip_addresses().map(str))
def test_without_interfaces_only_loopback_is_local(source: str) -> None:
    assert is_lan_source(source, ()) == (
        ipaddress.ip_address(source).is_loopback or source.lower().startswith("::ffff:7f")
    )


def test_we_listen_on_the_local_network_and_loopback_and_nowhere_else() -> None:
    assert listen_addresses(INTERFACES) == (
        "192.168.7.20",
        "10.1.2.3",
        "fd12:3456::20",
        "169.254.9.9",
        "127.0.0.1",
        "::1",
    )
    assert listen_addresses(()) == ()


def test_everywhere_we_listen_admits_this_machine_itself() -> None:
    assert all(is_lan_source(address, INTERFACES) for address in listen_addresses(INTERFACES))


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        (["0.0.0.0"], ["192.168.7.20", "10.1.2.3", "169.254.9.9", "203.0.113.9", "172.17.0.1", "127.0.0.1"]),
        (["203.0.113.9", "127.0.0.1"], ["203.0.113.9", "127.0.0.1"]),
        (
            ["10.1.2.3", "0.0.0.0"],
            ["10.1.2.3", "192.168.7.20", "169.254.9.9", "203.0.113.9", "172.17.0.1", "127.0.0.1"],
        ),
    ],
)
def test_a_wildcard_stands_for_every_address_best_first(hosts: list[str], expected: list[str]) -> None:
    assert list(expand_wildcards(hosts, INTERFACES)) == expected


def test_the_wildcard_of_ipv6_takes_in_ipv4_and_leaves_out_what_needs_an_interface() -> None:
    found = expand_wildcards(["::"], INTERFACES)
    assert {"192.168.7.20", "fd12:3456::20", "::1"} < set(found)
    assert "fe80::20" not in found


def test_interfaces_of_this_machine_include_loopback() -> None:
    interfaces = local_interfaces()
    assert any(i.is_loopback and i.address == "127.0.0.1" and i.prefix == 8 for i in interfaces)
    assert "127.0.0.1" in listen_addresses(interfaces)


@pytest.mark.parametrize("name", ["docker0", "br-0a1b2c", "virbr0", "tun0", "tap3", "wg0", "tailscale0", "utun4"])
def test_bridges_and_tunnels_of_software_are_virtual(name: str) -> None:
    assert is_virtual_name(name)


@pytest.mark.parametrize("name", ["eth0", "veth1", "wlan0", "enp3s0", "wlp2s0", "en0", "bond0", "br0", "eth0.12"])
def test_links_to_a_network_are_real(name: str) -> None:
    assert not is_virtual_name(name)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("box", ("box", 47100)),
        (" box.local:9 ", ("box.local", 9)),
        ("192.168.1.7", ("192.168.1.7", 47100)),
        ("192.168.1.7:65535", ("192.168.1.7", 65535)),
        ("::1", ("::1", 47100)),
        ("[::1]:9", ("::1", 9)),
        ("[fd00::2]", ("fd00::2", 47100)),
        ("fe80::1%eth0", ("fe80::1%eth0", 47100)),
        ("[fe80::1%eth0]:9", ("fe80::1%eth0", 9)),
    ],
)
def test_addresses_given_by_hand_are_understood(text: str, expected: tuple[str, int]) -> None:
    assert parse_endpoint(text, 47100) == expected
    assert parse_endpoint(format_endpoint(*expected), 1) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "neither a name nor an address"),
        ("box:0", "number from 1 to 65535"),
        ("box:65536", "number from 1 to 65535"),
        ("box:x", "number from 1 to 65535"),
        ("box:", "number from 1 to 65535"),
        ("box:٣", "number from 1 to 65535"),
        (":9", "neither a name nor an address"),
        ("tcp://box:9", "nothing comes before its name"),
        ("[box]:9", "isn't an IPv6 address"),
        ("300.1.1.1", "neither a name nor an address"),
        ("a b", "neither a name nor an address"),
        ("-box", "neither a name nor an address"),
        ("x" * 300, "neither a name nor an address"),
    ],
)
def test_what_is_no_address_is_refused_in_words(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"{reason}.*write HOST, HOST:PORT or \[IPV6\]:PORT"):
        parse_endpoint(text, 47100)


@given(st.text(max_size=60))
def test_whatever_is_written_is_understood_or_refused(text: str) -> None:
    try:
        host, port = parse_endpoint(text, 47100)
    except ConfigError:
        return
    assert host
    assert 0 < port < 65536
