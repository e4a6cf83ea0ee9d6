"""Nodes, roles, grants, invites, redemptions, revocations, and the swarm's one row."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    swarm = op.create_table(
        "swarm",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("public_key", sa.LargeBinary(32)),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("mode", sa.String(16), nullable=False),
        sa.Column("start_counter", sa.Integer(), nullable=False),
        sa.CheckConstraint("id = 1", name=op.f("ck_swarm_single")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_swarm")),
    )
    op.bulk_insert(swarm, [{"id": 1, "public_key": None, "name": "", "mode": "lan", "start_counter": 0}])
    op.create_table(
        "nodes",
        sa.Column("node_id", sa.String(26), nullable=False),
        sa.Column("display_name", sa.String(64), nullable=False),
        sa.Column("last_address", sa.String(64), nullable=False),
        sa.Column("first_seen", sa.Float(), nullable=False),
        sa.Column("last_seen", sa.Float(), nullable=False),
        sa.Column("waiting_for", sa.String(16)),
        sa.PrimaryKeyConstraint("node_id", name=op.f("pk_nodes")),
    )
    op.create_index(op.f("ix_nodes_last_seen"), "nodes", ["last_seen"])
    op.create_table(
        "invites",
        sa.Column("invite_id", sa.String(32), nullable=False),
        sa.Column("secret_hash", sa.LargeBinary(32), nullable=False),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("grant_names", sa.String(256), nullable=False),
        sa.Column("uses", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("expires_at", sa.Float(), nullable=False),
        sa.Column("revoked_at", sa.Float()),
        sa.CheckConstraint("uses > 0", name=op.f("ck_invites_positive")),
        sa.PrimaryKeyConstraint("invite_id", name=op.f("pk_invites")),
    )
    op.create_table(
        "revocations",
        sa.Column("node_id", sa.String(26), nullable=False),
        sa.Column("revoked_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("node_id", name=op.f("pk_revocations")),
    )
    op.create_table("roles", *_of_node("roles", "role", 16), sa.Column("via", sa.String(16), nullable=False), _since())
    op.create_table("grants", *_of_node("grants", "grant_name", 32), _since())
    op.create_table(
        "redemptions",
        *_of_node("redemptions", "invite_id", 32),
        sa.Column("redeemed_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(
            ["invite_id"], ["invites.invite_id"], name=op.f("fk_redemptions_invite_id"), ondelete="CASCADE"
        ),
    )


def _since() -> sa.Column[float]:
    return sa.Column("since", sa.Float(), nullable=False)


def _of_node(table: str, other: str, length: int) -> tuple[sa.Column[str] | sa.Constraint, ...]:
    """Columns `node_id` and `other`, together the primary key, with the link to the node."""
    return (
        sa.Column("node_id", sa.String(26), nullable=False),
        sa.Column(other, sa.String(length), nullable=False),
        sa.ForeignKeyConstraint(["node_id"], ["nodes.node_id"], name=op.f(f"fk_{table}_node_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("node_id", other, name=op.f(f"pk_{table}")),
    )
