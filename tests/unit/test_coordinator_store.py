"""The store: private, migrated, atomic, and clear about what is wrong with it."""

from __future__ import annotations

import sqlite3
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from skynet.coordinator.store import Mode, NotRedeemed, Store, Via, Visitor
from skynet.coordinator.store import node_table as node_table_module
from skynet.coordinator.store.schema import metadata
from skynet.errors import ConfigError
from skynet.protocol.identity import SwarmKey
from skynet.protocol.ids import NodeId
from skynet.protocol.roles import Grant, Role


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "coordinator" / "store.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with Store.open(path) as opened:
        yield opened


def visitor(letter: str = "a", role: Role = Role.WORKER) -> Visitor:
    return Visitor(node_id=NodeId(letter * 26), role=role, display_name="ada@lab", source="192.168.1.9")


def test_store_is_private(store: Store, path: Path) -> None:
    store.next_start()
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()} == {0o600}


def test_store_that_others_may_use_is_refused(path: Path) -> None:
    Store.open(path).close()
    path.chmod(0o660)
    with pytest.raises(ConfigError, match="chmod 600"):
        Store.open(path)


def test_migrations_lead_to_the_schema(store: Store, path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{path}")
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


def test_start_counter_grows_over_restarts(path: Path) -> None:
    seen = []
    for _ in range(3):
        with Store.open(path) as store:
            seen.append(store.next_start())
    assert seen == [1, 2, 3]


def test_starts_at_once_get_different_numbers(path: Path) -> None:
    Store.open(path).close()
    barrier = threading.Barrier(4)
    numbers: list[int] = []

    def start() -> None:
        barrier.wait(30)
        with Store.open(path) as store:
            numbers.extend(store.next_start() for _ in range(5))

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(numbers) == list(range(1, 21))


def test_store_belongs_to_one_swarm(path: Path) -> None:
    key = SwarmKey.generate().public_key
    with Store.open(path) as store:
        assert store.claim(key, "home").name == "home"
        assert store.claim(key, "renamed").name == "renamed"
        with pytest.raises(ConfigError, match=r"swarm\.key"):
            store.claim(SwarmKey.generate().public_key, "home")


@pytest.mark.parametrize("content", [b"not a database at all" * 100, b"SQLite format 3\0" + b"\xff" * 5000])
def test_corrupt_store_is_named_with_the_fix(path: Path, content: bytes) -> None:
    path.parent.mkdir(mode=0o700)
    path.touch(0o600)
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"store\.db: .*move it away"):
        Store.open(path)
    assert path.read_bytes() == content


def test_store_with_a_damaged_page_is_named_with_the_fix(path: Path) -> None:
    with Store.open(path) as store:
        for i in range(200):
            store.nodes.visit(visitor("abcdefghij"[i % 10]), 1.0, via=None)
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    data = bytearray(path.read_bytes())
    data[4096 * 2 : 4096 * 6] = b"\x5a" * (4096 * 4)
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"store\.db: damaged.*restore a copy"):
        Store.open(path)


def test_store_of_a_newer_version_is_left_alone(path: Path) -> None:
    Store.open(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    with pytest.raises(ConfigError, match=r"newer SkyNet \(schema 9999.*upgrade SkyNet"):
        Store.open(path)


def test_database_of_somebody_else_is_left_alone(path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    path.touch(0o600)
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE recipes (name TEXT)")
    connection.close()
    with pytest.raises(ConfigError, match="not SkyNet's"):
        Store.open(path)


@pytest.mark.parametrize("location", ["sqlite://", "no url", "nosuch://host/db", "sqlite:////proc/none/store.db"])
def test_impossible_location_is_a_config_error(location: str) -> None:
    with pytest.raises(ConfigError):
        Store.open(location)


def test_url_works_like_a_path(path: Path) -> None:
    with Store.open(f"sqlite:///{path}") as store:
        assert store.next_start() == 1


def test_busy_store_says_so(store: Store, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.close()
    monkeypatch.setattr("skynet.coordinator.store.database.BUSY_TIMEOUT_S", 0.05)
    blocker = sqlite3.connect(path)
    blocker.execute("BEGIN IMMEDIATE")
    with pytest.raises(ConfigError, match="another process keeps it busy"):
        Store.open(path)
    blocker.close()


def test_invite_admits_one_node_once(store: Store) -> None:
    made = store.invites.create(Role.WORKER, (Grant.RUN_CODE,), uses=1, now=0.0)
    invite_id = made.record.invite_id
    assert store.invites.redeem(invite_id, made.secret, visitor("a"), 1.0) is None
    assert store.invites.redeem(invite_id, made.secret, visitor("a"), 1e9) is None, "again, and after its end"
    refused = store.invites.redeem(invite_id, made.secret, visitor("b"), 2.0)
    assert isinstance(refused, NotRedeemed)
    assert "used up" in refused.reason
    assert store.nodes.get(visitor("b").node_id) is None
    node = store.nodes.get(visitor("a").node_id)
    assert node is not None
    assert (node.roles, node.grants) == (((Role.WORKER, Via.INVITE),), (Grant.RUN_CODE,))
    assert store.invites.all()[0].used == 1


def test_secret_of_an_invite_is_stored_nowhere(store: Store, path: Path) -> None:
    made = store.invites.create(Role.WORKER, (), uses=1, now=0.0)
    store.invites.redeem(made.record.invite_id, made.secret, visitor(), 1.0)
    assert not [file for file in path.parent.iterdir() if made.secret in file.read_bytes()]


def test_uses_of_an_invite_redeemed_at_once_are_not_exceeded(store: Store) -> None:
    made = store.invites.create(Role.WORKER, (), uses=3, now=0.0)
    letters = "abcdefgh"
    barrier, admitted = threading.Barrier(len(letters)), []

    def redeem(letter: str) -> None:
        barrier.wait(30)
        if store.invites.redeem(made.record.invite_id, made.secret, visitor(letter), 1.0) is None:
            admitted.append(letter)

    threads = [threading.Thread(target=redeem, args=(letter,)) for letter in letters]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(admitted) == 3
    assert {node.node_id[0] for node in store.nodes.all()} == set(admitted)


@pytest.mark.parametrize(("uses", "lifetime_s"), [(0, 60.0), (1, 0.0), (1, -1.0)])
def test_invite_that_could_admit_nobody_is_refused(store: Store, uses: int, lifetime_s: float) -> None:
    with pytest.raises(ConfigError):
        store.invites.create(Role.WORKER, (), uses, 0.0, lifetime_s)


def test_unknown_invite_can_not_be_revoked(store: Store) -> None:
    with pytest.raises(ConfigError, match="skynet invite list"):
        store.invites.revoke("nosuch", 0.0)


def test_approval_gives_the_role_that_was_asked_for(store: Store) -> None:
    store.nodes.visit(visitor("a", Role.CLIENT), 1.0, via=None)
    store.nodes.visit(visitor("b"), 2.0, via=None)
    assert [node.waiting_for for node in store.nodes.all()] == [Role.WORKER, Role.CLIENT]
    approved = store.nodes.approve("aaa", 3.0)
    assert (approved.roles, approved.waiting_for) == (((Role.CLIENT, Via.APPROVAL),), None)
    assert store.nodes.approve("a" * 26, 4.0) == approved, "twice is the same as once"


def test_node_is_named_by_a_unique_beginning(store: Store) -> None:
    for letter in "ab":
        node = Visitor(node_id=NodeId("x" + letter * 25), role=Role.WORKER, display_name="", source="::1")
        store.nodes.visit(node, 1.0, via=None)
    with pytest.raises(ConfigError, match="2 nodes begin like that"):
        store.nodes.approve("x", 2.0)
    for name in ("", "y", "%", "_"):
        with pytest.raises(ConfigError, match="not known"):
            store.nodes.approve(name, 2.0)
    assert store.nodes.approve("xb", 2.0).node_id.startswith("xb")


def test_revoking_takes_everything_and_closes_the_node_s_invites(store: Store) -> None:
    store.set_mode(Mode.INVITE)
    made = store.invites.create(Role.WORKER, (Grant.RUN_CODE,), uses=5, now=0.0)
    store.invites.redeem(made.record.invite_id, made.secret, visitor(), 1.0)
    revoked = store.revoke("aaaa", 2.0)
    assert revoked.closed_invites == (made.record.invite_id,)
    assert not revoked.has_left_lan
    node = store.nodes.get(revoked.node_id)
    assert node is not None
    assert (node.roles, node.grants, node.revoked_at) == ((), (), 2.0)
    assert isinstance(store.invites.redeem(made.record.invite_id, made.secret, visitor("b"), 3.0), NotRedeemed)
    assert store.revoke("aaaa", 4.0).closed_invites == ()
    with pytest.raises(ConfigError, match="for good"):
        store.nodes.approve("aaaa", 5.0)


def test_revoking_in_lan_mode_leaves_it_and_keeps_the_others(store: Store) -> None:
    for letter in "abc":
        store.nodes.visit(visitor(letter), 1.0, via=Via.LAN)
    revoked = store.revoke("aaa", 2.0)
    assert (revoked.mode, revoked.has_left_lan, revoked.kept_nodes) == (Mode.APPROVE, True, 2)
    assert store.swarm().mode is Mode.APPROVE
    kept = {node.node_id[0]: node.roles for node in store.nodes.all()}
    assert kept == {"a": (), "b": ((Role.WORKER, Via.APPROVAL),), "c": ((Role.WORKER, Via.APPROVAL),)}


def test_node_may_be_revoked_before_it_was_ever_seen(store: Store) -> None:
    store.revoke("q" * 26, 1.0)
    assert store.nodes.is_revoked(NodeId("q" * 26))


def test_strangers_can_not_fill_the_store(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_table_module, "MAX_WAITING", 3)
    store.nodes.visit(visitor("z"), 0.0, via=Via.LAN)
    for i, letter in enumerate("abcdef"):
        store.nodes.visit(visitor(letter), float(i), via=None)
    assert [node.node_id[0] for node in store.nodes.all()] == ["f", "e", "d", "z"]
