"""Discovery and links between several hosts: network namespaces on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from skynet.testing import hosts
from skynet.testing.hosts import Host, HostError, Network

PORT = 9000


@cache
def reason(*, nat: bool = False) -> str | None:
    return hosts.missing(nat=nat)


class Peer(NamedTuple):
    """A process on a host that does what it is told; the next line of its output is the answer."""

    host: Host
    process: subprocess.Popen[str]

    def tell(self, *command: object) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, self.process.stderr and self.process.stderr.read()
        return json.loads(answer)


def peer_on(host: Host) -> Peer:
    return Peer(host, host.start([sys.executable, str(Path(__file__).with_name("peer.py"))]))


class Hosts(NamedTuple):
    box: Peer
    laptop: Peer
    tower: Peer


@pytest.fixture(scope="module")
def three() -> Iterator[Hosts]:
    """Three hosts on one switch; a test undoes what it does to them."""
    if reason():
        pytest.skip(f"{reason()}")
    with Network() as network:
        yield Hosts(*(peer_on(network.host(name)) for name in Hosts._fields))


def test_a_swarm_is_found_from_another_host_and_from_its_own(three: Hosts) -> None:
    fingerprint = three.box.tell("advertise", "at home")
    there = three.laptop.tell("discover", 5)
    assert [(s["name"], s["fingerprint"], s["port"]) for s in there["found"]] == [("at home", fingerprint, 47100)]
    assert there["found"][0]["hosts"] == [three.box.host.address], "another machine's loopback is no way to reach it"
    assert there["seconds"] < 4.5, "found and settled, not waited out"
    here = three.box.tell("discover", 5)
    assert here["found"][0]["hosts"] == ["127.0.0.1", "::1", three.box.host.address]
    three.box.tell("silence")
    assert three.laptop.tell("discover", 0.8)["found"] == [], "it said goodbye"


def test_two_swarms_on_one_network_are_both_found(three: Hosts) -> None:
    three.box.tell("advertise", "ants")
    three.tower.tell("advertise", "bees")
    found = three.laptop.tell("discover", 5)["found"]
    assert {(s["name"], *s["hosts"]) for s in found} == {
        ("ants", three.box.host.address),
        ("bees", three.tower.host.address),
    }
    assert "bees" in {s["name"] for s in three.laptop.tell("discover", 5, "bees")["found"]}
    three.box.tell("silence")
    three.tower.tell("silence")


def test_nothing_is_found_over_a_cut_link_and_everything_once_it_is_mended(three: Hosts) -> None:
    three.box.tell("advertise", "at home")
    three.laptop.host.cut()
    assert three.laptop.tell("discover", 0.8)["found"] == []
    three.laptop.host.mend()
    assert len(three.laptop.tell("discover", 5)["found"]) == 1
    three.laptop.host.unplug()
    assert three.laptop.tell("discover", 0.8)["found"] == []
    three.laptop.host.plug()
    assert len(three.laptop.tell("discover", 5)["found"]) == 1
    three.box.tell("silence")


def test_links_can_be_cut_and_slowed_down(three: Hosts) -> None:
    box, laptop = three.box.host, three.laptop
    three.box.tell("serve", PORT)
    fast = laptop.tell("fetch", box.address, PORT, 400_000, 5)
    box.limit(500_000)
    slow = laptop.tell("fetch", box.address, PORT, 400_000, 5)
    assert slow > 0.6 > fast
    box.unlimit()
    laptop.host.cut()
    assert laptop.tell("fetch", box.address, PORT, 100, 0.5) == "TimeoutError", "it hangs, nobody refuses"
    laptop.host.mend()
    assert laptop.tell("fetch", box.address, PORT, 100, 5) < 5
    assert {tuple(v) for v in three.box.tell("visited")} == {(laptop.host.address, True)}


def test_a_veth_link_counts_as_real(three: Hosts) -> None:
    """In a container it is the way to the network."""
    assert ["eth0", three.box.host.address, False, []] in three.box.tell("interfaces")


def test_nat_lets_out_and_not_in_and_its_gateway_is_no_neighbour() -> None:
    if reason(nat=True):
        pytest.skip(f"{reason(nat=True)}")
    with Network() as network:
        outside, inside = peer_on(network.host("outside")), peer_on(network.host_behind_nat("inside"))
        outside.tell("serve", PORT)
        inside.tell("serve", PORT)
        assert inside.tell("fetch", outside.host.address, PORT, 100, 5) < 5
        ((source, is_lan),) = outside.tell("visited")
        assert source.rpartition(".")[0] == outside.host.address.rpartition(".")[0], "the router's address is seen"
        assert is_lan
        assert outside.tell("fetch", inside.host.address, PORT, 100, 0.5) in ("TimeoutError", "OSError")
        gateway = inside.host.address.rpartition(".")[0] + ".1"
        assert ["eth0", inside.host.address, False, [gateway]] in inside.tell("interfaces")


def test_leaving_a_network_ends_its_processes_and_removes_its_hosts() -> None:
    if reason():
        pytest.skip(f"{reason()}")
    with Network() as network:
        host = network.host("box")
        process = host.start(["sleep", "1000"])
        with pytest.raises(HostError, match="ended with 1"):
            host.run(["false"])
    assert process.poll() is not None
    names = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert host.namespace not in names
