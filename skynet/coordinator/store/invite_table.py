"""Invites in the store: made, listed, revoked, and redeemed in one transaction."""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa

from skynet.coordinator.store import node_table
from skynet.coordinator.store.database import Database
from skynet.coordinator.store.node_table import Via, Visitor
from skynet.coordinator.store.schema import invites, redemptions
from skynet.errors import ConfigError
from skynet.protocol.ids import NodeId
from skynet.protocol.invites import hash_secret, new_invite_id, new_secret
from skynet.protocol.roles import Grant, Role, covers

DEFAULT_LIFETIME_S: Final = 86400.0
_NO_HASH: Final = bytes(32)


@dataclass(frozen=True, slots=True, kw_only=True)
class InviteRecord:
    """One invite as the coordinator knows it."""

    invite_id: str
    role: Role
    grants: tuple[Grant, ...]
    uses: int
    used: int
    created_at: float
    expires_at: float
    revoked_at: float | None

    def is_open(self, now: float) -> bool:
        """Whether it still admits somebody new."""
        return self.revoked_at is None and now < self.expires_at and self.used < self.uses


@dataclass(frozen=True, slots=True)
class NewInvite:
    """A fresh invite and its secret, which is nowhere else."""

    record: InviteRecord
    secret: bytes


@dataclass(frozen=True, slots=True)
class NotRedeemed:
    """Why an invite doesn't admit."""

    reason: str


class InviteTable:
    """All access to invites and their redemptions."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(
        self, role: Role, grants: tuple[Grant, ...], uses: int, now: float, lifetime_s: float = DEFAULT_LIFETIME_S
    ) -> NewInvite:
        """A new invite. Raises ConfigError if it could admit nobody."""
        if uses < 1 or not 0 < lifetime_s < 2**40:
            raise ConfigError(f"an invite needs at least one use and a lifetime, got {uses} uses and {lifetime_s} s")
        secret, invite_id = new_secret(), new_invite_id()
        with self._database.transaction() as connection:
            connection.execute(
                sa.insert(invites).values(
                    invite_id=invite_id,
                    secret_hash=hash_secret(secret),
                    role=role.value,
                    grant_names=" ".join(sorted(set(grants))),
                    uses=uses,
                    created_at=now,
                    expires_at=now + lifetime_s,
                )
            )
            return NewInvite(_records(connection, invites.c.invite_id == invite_id)[0], secret)

    def all(self) -> tuple[InviteRecord, ...]:
        """Every invite ever made, oldest first."""
        with self._database.transaction() as connection:
            return _records(connection, sa.true())

    def revoke(self, invite_id: str, now: float) -> InviteRecord:
        """This invite admits nobody any more; whoever used it stays. Raises ConfigError if there is none of that id."""
        with self._database.transaction() as connection:
            found = _records(connection, invites.c.invite_id == invite_id)
            if not found:
                raise ConfigError(f"invite {invite_id[:40]!r}: not known here; see `skynet invite list`")
            _close(connection, invite_id, now)
            return _records(connection, invites.c.invite_id == invite_id)[0]

    def redeem(self, invite_id: str, secret: bytes, visitor: Visitor, now: float) -> NotRedeemed | None:
        """Give the visitor what the invite grants; None if it now has it. Redeeming twice is the same as once."""
        with self._database.transaction() as connection:
            row = connection.execute(
                sa.select(invites).where(invites.c.invite_id == invite_id).with_for_update()
            ).one_or_none()
            # The same work for an unknown id as for a wrong secret, in constant time.
            if not hmac.compare_digest(hash_secret(secret), row.secret_hash if row else _NO_HASH) or row is None:
                return NotRedeemed("this swarm never gave out that invite; copy it whole, or ask for a new one")
            if node_table.is_revoked(connection, visitor.node_id):
                return NotRedeemed("this node was revoked by the swarm's owner")
            role, mine = Role(row.role), redemptions.c.invite_id == invite_id
            if not covers(frozenset({role}), visitor.role):
                return NotRedeemed(f"the invite admits a {role}, not a {visitor.role}; ask for one with that role")
            holders = connection.execute(sa.select(redemptions.c.node_id).where(mine)).scalars().all()
            if visitor.node_id in holders:
                return None
            if (reason := _why_closed(row, len(holders), now)) is not None:
                return NotRedeemed(reason)
            node_table.record_visit(connection, visitor, now)
            connection.execute(
                sa.insert(redemptions).values(invite_id=invite_id, node_id=visitor.node_id, redeemed_at=now)
            )
            node_table.give_role(connection, visitor.node_id, role, Via.INVITE, now)
            node_table.give_grants(connection, visitor.node_id, tuple(row.grant_names.split()), now)
            return None


def close_invites_of(connection: sa.Connection, node_id: NodeId, now: float) -> tuple[str, ...]:
    """Revoke what is left of the invites that a node has used, and return their ids: it knows their secrets."""
    used = sa.select(redemptions.c.invite_id).where(redemptions.c.node_id == node_id)
    still_open = [r.invite_id for r in _records(connection, invites.c.invite_id.in_(used)) if r.is_open(now)]
    for invite_id in still_open:
        _close(connection, invite_id, now)
    return tuple(still_open)


def _close(connection: sa.Connection, invite_id: str, now: float) -> None:
    is_open = (invites.c.invite_id == invite_id) & invites.c.revoked_at.is_(None)
    connection.execute(sa.update(invites).where(is_open).values(revoked_at=now))


def _why_closed(row: sa.Row[tuple[object, ...]], used: int, now: float) -> str | None:
    if row.revoked_at is not None:
        return "the invite was revoked by the swarm's owner; ask for a new one"
    if now >= row.expires_at:
        return f"the invite expired {now - row.expires_at:.0f} s ago; ask for a new one"
    if used >= row.uses:
        return f"the invite was for {row.uses} node{'s' if row.uses > 1 else ''} and is used up; ask for a new one"
    return None


def _records(connection: sa.Connection, condition: sa.ColumnElement[bool]) -> tuple[InviteRecord, ...]:
    used = sa.func.count(redemptions.c.node_id).label("used")
    query = (
        sa.select(invites, used)
        .outerjoin(redemptions)
        .where(condition)
        .group_by(invites.c.invite_id)
        .order_by(invites.c.created_at, invites.c.invite_id)
    )
    return tuple(
        InviteRecord(
            invite_id=row.invite_id,
            role=Role(row.role),
            grants=tuple(Grant(name) for name in row.grant_names.split()),
            uses=row.uses,
            used=row.used,
            created_at=row.created_at,
            expires_at=row.expires_at,
            revoked_at=row.revoked_at,
        )
        for row in connection.execute(query)
    )
