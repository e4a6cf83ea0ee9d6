"""Decisions of admission by address and mode, without a network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from skynet.coordinator.admission import Admitted, Gatekeeper, must_invite
from skynet.coordinator.store import Mode, Store
from skynet.protocol.addresses import Interface
from skynet.protocol.hello import Hello, Refused
from skynet.protocol.identity import NodeKey, ProcessKey, SwarmKey
from skynet.protocol.roles import Role

SWARM = SwarmKey.generate().public_key
NODE = NodeKey.generate()
INTERFACES = (
    Interface(name="lo", address="127.0.0.1", prefix=8, is_loopback=True),
    Interface(name="eth0", address="192.168.1.4", prefix=24, gateways=("192.168.1.1",)),
    Interface(name="eth0", address="fe80::4", prefix=64),
    Interface(name="docker0", address="172.17.0.1", prefix=16, is_virtual=True),
    Interface(name="eth1", address="203.0.113.9", prefix=24),
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store.db") as opened:
        opened.claim(SWARM, "home")
        yield opened


def hello(role: Role = Role.WORKER, node: NodeKey = NODE) -> Hello:
    certificate = ProcessKey.generate().certify(node, SWARM, 0.0)
    return Hello(
        node_key=node.public_key, certificate=certificate, possession=bytes(32), role=role, suffix="cpu", not_after=60
    )


def code(store: Store, source: str, role: Role = Role.WORKER, *, forces_invite: bool = False) -> str:
    """The refusal's code, or "" for an admission."""
    decision = Gatekeeper(store, forces_invite=forces_invite).decide(hello(role), source, INTERFACES, 1.0)
    return decision.code if isinstance(decision, Refused) else ""


@pytest.mark.parametrize("source", ["127.0.0.1", "::1", "192.168.1.77", "::ffff:192.168.1.77", "fe80::99%eth0"])
def test_neighbour_is_admitted_in_lan_mode(store: Store, source: str) -> None:
    assert code(store, source) == code(store, source, Role.CLIENT) == ""
    assert code(store, source, Role.ADMIN) == "role"


@pytest.mark.parametrize(
    "source", ["192.168.1.1", "192.168.2.5", "172.17.0.3", "203.0.113.10", "8.8.8.8", "2001:db8::1", "", "nonsense"]
)
def test_others_are_refused_in_lan_mode(store: Store, source: str) -> None:
    assert code(store, source) == "address"
    assert store.nodes.all() == ()


def test_role_held_by_address_ends_where_the_address_does(store: Store) -> None:
    assert code(store, "192.168.1.77") == ""
    assert code(store, "8.8.8.8") == "address"
    assert code(store, "192.168.1.77", forces_invite=True) == "invite_required"


def test_approved_node_comes_from_anywhere(store: Store) -> None:
    store.set_mode(Mode.APPROVE)
    assert code(store, "8.8.8.8") == "awaiting_approval"
    store.nodes.approve(NODE.node_id, 2.0)
    assert code(store, "8.8.8.8") == code(store, "8.8.8.8", forces_invite=True) == ""


def test_admission_names_the_peer_and_what_it_is(store: Store) -> None:
    decision = Gatekeeper(store).decide(hello(), "192.168.1.77", INTERFACES, 1.0)
    assert isinstance(decision, Admitted)
    assert (decision.node_id, decision.peer_id) == (NODE.node_id, f"{NODE.node_id}.cpu")
    assert (decision.role, decision.grants, decision.swarm_name) == (Role.WORKER, (), "home")


@pytest.mark.parametrize(
    ("bind", "forced"),
    [
        ((), False),
        (("127.0.0.1", "::1"), False),
        (("192.168.1.4", "127.0.0.1"), False),
        (("0.0.0.0",), True),
        (("::",), True),
        (("192.168.1.4", "203.0.113.9"), True),
        (("172.17.0.1",), True),
        (("a.name",), True),
    ],
)
def test_bind_beyond_the_local_network_forces_invites(bind: tuple[str, ...], forced: bool) -> None:
    assert must_invite(bind, INTERFACES) is forced
