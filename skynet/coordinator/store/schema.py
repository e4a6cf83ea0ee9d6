"""The tables of section "State": who is known, and what they may do. Times are seconds since 1970.

Changes go through a new file in `migrations/versions/`; a test compares the result of all migrations with this module.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import CheckConstraint, Column, Float, ForeignKey, Integer, LargeBinary, MetaData, String, Table

metadata: Final = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
    }
)

swarm: Final = Table(  # one row, made by the first migration
    "swarm",
    metadata,
    Column("id", Integer, CheckConstraint("id = 1", name="single"), primary_key=True, autoincrement=False),
    Column("public_key", LargeBinary(32)),  # null until a coordinator has taken the store
    Column("name", String(64), nullable=False),
    Column("mode", String(16), nullable=False),
    Column("start_counter", Integer, nullable=False),
)

nodes: Final = Table(
    "nodes",
    metadata,
    Column("node_id", String(26), primary_key=True),
    Column("display_name", String(64), nullable=False),
    Column("last_address", String(64), nullable=False),
    Column("first_seen", Float, nullable=False),
    Column("last_seen", Float, nullable=False, index=True),
    Column("waiting_for", String(16)),  # the role it asked for and doesn't have: `skynet approve` gives it
)

roles: Final = Table(
    "roles",
    metadata,
    Column("node_id", ForeignKey("nodes.node_id", ondelete="CASCADE"), primary_key=True),
    Column("role", String(16), primary_key=True),
    Column("via", String(16), nullable=False),  # lan, approval or invite
    Column("since", Float, nullable=False),
)

grants: Final = Table(
    "grants",
    metadata,
    Column("node_id", ForeignKey("nodes.node_id", ondelete="CASCADE"), primary_key=True),
    Column("grant_name", String(32), primary_key=True),
    Column("since", Float, nullable=False),
)

invites: Final = Table(
    "invites",
    metadata,
    Column("invite_id", String(32), primary_key=True),
    Column("secret_hash", LargeBinary(32), nullable=False),
    Column("role", String(16), nullable=False),
    Column("grant_names", String(256), nullable=False),  # separated by blanks
    Column("uses", Integer, CheckConstraint("uses > 0", name="positive"), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
    Column("revoked_at", Float),
)

redemptions: Final = Table(
    "redemptions",
    metadata,
    Column("invite_id", ForeignKey("invites.invite_id", ondelete="CASCADE"), primary_key=True),
    Column("node_id", ForeignKey("nodes.node_id", ondelete="CASCADE"), primary_key=True),
    Column("redeemed_at", Float, nullable=False),
)

revocations: Final = Table(  # no foreign key: a node may be banned before it was ever seen, and is never forgotten
    "revocations",
    metadata,
    Column("node_id", String(26), primary_key=True),
    Column("revoked_at", Float, nullable=False),
)
