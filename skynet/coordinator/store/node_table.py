"""Nodes in the store: seen, waiting, with roles and grants, or revoked."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import sqlalchemy as sa

from skynet.coordinator.store.database import Database
from skynet.coordinator.store.schema import grants, nodes, revocations, roles
from skynet.errors import ConfigError
from skynet.protocol.identity import NODE_ID_CHARS
from skynet.protocol.ids import NodeId
from skynet.protocol.roles import Grant, Role

MAX_WAITING: Final = 1000  # nodes without a role; beyond that the one seen longest ago is forgotten
_NODE_ID_LETTERS: Final = frozenset("abcdefghijklmnopqrstuvwxyz234567")


class Via(StrEnum):
    """How a node came by a role."""

    LAN = "lan"  # counts in mode `lan` alone, and only from a local address
    APPROVAL = "approval"
    INVITE = "invite"


@dataclass(frozen=True, slots=True, kw_only=True)
class Visitor:
    """Who knocks: proven to be this node."""

    node_id: NodeId
    role: Role  # wanted
    display_name: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRecord:
    """One node as the coordinator knows it."""

    node_id: NodeId
    display_name: str
    last_address: str
    first_seen: float
    last_seen: float
    waiting_for: Role | None
    roles: tuple[tuple[Role, Via], ...]
    grants: tuple[Grant, ...]
    revoked_at: float | None


class NodeTable:
    """All access to nodes."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def get(self, node_id: NodeId) -> NodeRecord | None:
        """None if it was never seen."""
        with self._database.transaction() as connection:
            found = _records(connection, nodes.c.node_id == node_id)
        return found[0] if found else None

    def all(self) -> tuple[NodeRecord, ...]:
        """Every known node, the latest seen first."""
        with self._database.transaction() as connection:
            return _records(connection, sa.true())

    def is_revoked(self, node_id: NodeId) -> bool:
        with self._database.transaction() as connection:
            return is_revoked(connection, node_id)

    def visit(self, visitor: Visitor, now: float, *, via: Via | None) -> None:
        """Remember a visit; `via` gives the role it wants, None lets it wait for approval."""
        with self._database.transaction() as connection:
            record_visit(connection, visitor, now)
            if via is not None:
                give_role(connection, visitor.node_id, visitor.role, via, now)
            else:
                waiting = sa.update(nodes).where(nodes.c.node_id == visitor.node_id)
                connection.execute(waiting.values(waiting_for=visitor.role.value))
                _forget_stale(connection)

    def seen(self, visitor: Visitor, now: float) -> None:
        """Remember when and where a node that has its role was seen."""
        with self._database.transaction() as connection:
            record_visit(connection, visitor, now)

    def approve(self, node: str, now: float) -> NodeRecord:
        """Give a waiting node the role it asked for; `node` is an id or a unique beginning. Raises ConfigError."""
        with self._database.transaction() as connection:
            record = _find(connection, node)
            if record.revoked_at is not None:
                raise ConfigError(f"node {record.node_id}: was revoked, for good; it must come back with a new key")
            if record.waiting_for is not None:
                give_role(connection, record.node_id, record.waiting_for, Via.APPROVAL, now)
            elif not record.roles:
                raise ConfigError(f"node {record.node_id}: asked for no role that could be approved")
            return _records(connection, nodes.c.node_id == record.node_id)[0]


def resolve(connection: sa.Connection, node: str) -> NodeId:
    """The id of a node that a person named by its id or a unique beginning of it. Raises ConfigError."""
    if len(node) == NODE_ID_CHARS and _NODE_ID_LETTERS.issuperset(node):
        return NodeId(node)  # perhaps never seen: it may still be revoked
    return _find(connection, node).node_id


def _find(connection: sa.Connection, node: str) -> NodeRecord:
    found = _records(connection, nodes.c.node_id.startswith(node, autoescape=True)) if node else ()
    if not found:
        raise ConfigError(f"node {node[:40]!r}: not known here; see `skynet nodes`")
    if len(found) > 1:
        raise ConfigError(f"node {node[:40]!r}: {len(found)} nodes begin like that; give more of the id")
    return found[0]


def is_revoked(connection: sa.Connection, node_id: NodeId) -> bool:
    query = sa.select(revocations.c.node_id).where(revocations.c.node_id == node_id)
    return connection.execute(query).one_or_none() is not None


def revoke(connection: sa.Connection, node_id: NodeId, now: float) -> None:
    """Ban a node for good and take what it had. Banning twice is the same as once."""
    if not is_revoked(connection, node_id):
        connection.execute(sa.insert(revocations).values(node_id=node_id, revoked_at=now))
    connection.execute(sa.delete(roles).where(roles.c.node_id == node_id))
    connection.execute(sa.delete(grants).where(grants.c.node_id == node_id))
    connection.execute(sa.update(nodes).where(nodes.c.node_id == node_id).values(waiting_for=None))


def keep_lan_nodes(connection: sa.Connection) -> int:
    """Who came in by its address so far counts as approved from now on; how many roles that are."""
    return connection.execute(sa.update(roles).where(roles.c.via == Via.LAN).values(via=Via.APPROVAL.value)).rowcount


def record_visit(connection: sa.Connection, visitor: Visitor, now: float) -> None:
    facts = {"display_name": visitor.display_name, "last_address": visitor.source[:64], "last_seen": now}
    mine = nodes.c.node_id == visitor.node_id
    if not connection.execute(sa.update(nodes).where(mine).values(facts)).rowcount:
        connection.execute(sa.insert(nodes).values(node_id=visitor.node_id, first_seen=now, **facts))


def give_role(connection: sa.Connection, node_id: NodeId, role: Role, via: Via, now: float) -> None:
    """Add a role, or strengthen how it was come by: a role from an invite or approval is never weakened to `lan`."""
    mine = (roles.c.node_id == node_id) & (roles.c.role == role.value)
    held = connection.execute(sa.select(roles.c.via).where(mine)).scalar_one_or_none()
    if held is None:
        row = {"node_id": node_id, "role": role.value, "via": via.value, "since": now}
        connection.execute(sa.insert(roles).values(row))
    elif held == Via.LAN:
        connection.execute(sa.update(roles).where(mine).values(via=via.value))
    wanted = (nodes.c.node_id == node_id) & (nodes.c.waiting_for == role.value)
    connection.execute(sa.update(nodes).where(wanted).values(waiting_for=None))


def give_grants(connection: sa.Connection, node_id: NodeId, names: tuple[str, ...], now: float) -> None:
    held = set(connection.execute(sa.select(grants.c.grant_name).where(grants.c.node_id == node_id)).scalars())
    for name in set(names) - held:
        connection.execute(sa.insert(grants).values(node_id=node_id, grant_name=name, since=now))


def _forget_stale(connection: sa.Connection) -> None:
    """Strangers can't fill the disk: of the nodes without any role only the latest are kept."""
    without_role = ~sa.exists().where(roles.c.node_id == nodes.c.node_id)
    stale = sa.select(nodes.c.node_id).where(without_role).order_by(nodes.c.last_seen.desc()).offset(MAX_WAITING)
    connection.execute(sa.delete(nodes).where(nodes.c.node_id.in_(stale.limit(100))))


def _records(connection: sa.Connection, condition: sa.ColumnElement[bool]) -> tuple[NodeRecord, ...]:
    query = sa.select(nodes, revocations.c.revoked_at).outerjoin(revocations, revocations.c.node_id == nodes.c.node_id)
    rows = connection.execute(query.where(condition).order_by(nodes.c.last_seen.desc(), nodes.c.node_id)).all()
    chosen = sa.select(nodes.c.node_id).where(condition)
    held: dict[str, list[tuple[Role, Via]]] = {}
    for row in connection.execute(sa.select(roles).where(roles.c.node_id.in_(chosen)).order_by(roles.c.role)):
        held.setdefault(row.node_id, []).append((Role(row.role), Via(row.via)))
    granted: dict[str, list[Grant]] = {}
    for row in connection.execute(sa.select(grants).where(grants.c.node_id.in_(chosen)).order_by(grants.c.grant_name)):
        granted.setdefault(row.node_id, []).append(Grant(row.grant_name))
    return tuple(
        NodeRecord(
            node_id=NodeId(row.node_id),
            display_name=row.display_name,
            last_address=row.last_address,
            first_seen=row.first_seen,
            last_seen=row.last_seen,
            waiting_for=Role(row.waiting_for) if row.waiting_for else None,
            roles=tuple(held.get(row.node_id, ())),
            grants=tuple(granted.get(row.node_id, ())),
            revoked_at=row.revoked_at,
        )
        for row in rows
    )
