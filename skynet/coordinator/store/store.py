"""The coordinator's memory between starts: the swarm itself, its nodes and its invites."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import sqlalchemy as sa

from skynet.coordinator.store import invite_table, node_table
from skynet.coordinator.store.database import Database
from skynet.coordinator.store.invite_table import InviteTable
from skynet.coordinator.store.node_table import NodeTable
from skynet.coordinator.store.schema import swarm
from skynet.errors import ConfigError
from skynet.protocol.identity import PublicKey, fingerprint_of
from skynet.protocol.ids import NodeId


class Mode(StrEnum):
    """Who gets in without an invite."""

    LAN = "lan"  # whoever comes from the local network
    APPROVE = "approve"  # new nodes wait for `skynet approve`
    INVITE = "invite"  # nobody


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmRecord:
    """The swarm as its store knows it."""

    public_key: PublicKey | None  # None until a coordinator has taken the store
    name: str
    mode: Mode
    start_counter: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Revoked:
    """What revoking a node has changed."""

    node_id: NodeId
    mode: Mode
    has_left_lan: bool  # the mode was `lan`, where the node could have come back with a new key
    kept_nodes: int  # roles of nodes that came by their address and now count as approved
    closed_invites: tuple[str, ...]  # it knew their secrets


class Store:
    """Blocking, thread-safe; each method is one short transaction. Raises ConfigError naming the store and the fix."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.nodes = NodeTable(database)
        self.invites = InviteTable(database)

    @classmethod
    def open(cls, location: str | Path) -> Store:
        """Open a SQLite file (a Path), or a database by URL, and bring it to this version's schema."""
        return cls(Database(location))

    def close(self) -> None:
        """May be called twice."""
        self._database.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def name(self) -> str:
        """Where it is, for people."""
        return self._database.name

    def swarm(self) -> SwarmRecord:
        with self._database.transaction() as connection:
            return _swarm(connection)

    def claim(self, public_key: PublicKey, name: str) -> SwarmRecord:
        """This store is this swarm's. Raises ConfigError if it is another's."""
        with self._database.transaction() as connection:
            known = _swarm(connection).public_key
            if known is not None and known != public_key:
                raise ConfigError(
                    f"{self.name}: belongs to the swarm {fingerprint_of(known)}, but the key file beside it is "
                    f"{fingerprint_of(public_key)}; restore the swarm.key that belongs to it, or choose another store"
                )
            connection.execute(sa.update(swarm).values(public_key=public_key, name=name))
            return _swarm(connection)

    def next_start(self) -> int:
        """Raise the start counter and return it: the first half of every epoch until the next start."""
        with self._database.transaction() as connection:
            raised = sa.update(swarm).values(start_counter=swarm.c.start_counter + 1)
            return int(connection.execute(raised.returning(swarm.c.start_counter)).scalar_one())

    def set_mode(self, mode: Mode) -> None:
        """Choose who gets in from now on. Leaving `lan` keeps the nodes that came in by it."""
        with self._database.transaction() as connection:
            if _swarm(connection).mode is Mode.LAN and mode is not Mode.LAN:
                node_table.keep_lan_nodes(connection)
            connection.execute(sa.update(swarm).values(mode=mode.value))

    def revoke(self, node: str, now: float) -> Revoked:
        """Ban a node (its id or a unique beginning); in mode `lan` the mode becomes `approve`. Raises ConfigError."""
        with self._database.transaction() as connection:
            node_id = node_table.resolve(connection, node)
            mode = _swarm(connection).mode
            node_table.revoke(connection, node_id, now)
            closed = invite_table.close_invites_of(connection, node_id, now)
            kept = 0
            if mode is Mode.LAN:
                kept = node_table.keep_lan_nodes(connection)
                connection.execute(sa.update(swarm).values(mode=Mode.APPROVE.value))
        return Revoked(
            node_id=node_id,
            mode=Mode.APPROVE if mode is Mode.LAN else mode,
            has_left_lan=mode is Mode.LAN,
            kept_nodes=kept,
            closed_invites=closed,
        )


def _swarm(connection: sa.Connection) -> SwarmRecord:
    row = connection.execute(sa.select(swarm)).one()
    return SwarmRecord(
        public_key=PublicKey(row.public_key) if row.public_key else None,
        name=row.name,
        mode=Mode(row.mode),
        start_counter=row.start_counter,
    )
