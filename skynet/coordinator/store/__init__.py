"""What must survive a restart. SQLite by default, another database by URL."""

from skynet.coordinator.store.invite_table import InviteRecord, InviteTable, NewInvite, NotRedeemed
from skynet.coordinator.store.node_table import NodeRecord, NodeTable, Via, Visitor
from skynet.coordinator.store.store import Mode, Revoked, Store, SwarmRecord

__all__ = [
    "InviteRecord",
    "InviteTable",
    "Mode",
    "NewInvite",
    "NodeRecord",
    "NodeTable",
    "NotRedeemed",
    "Revoked",
    "Store",
    "SwarmRecord",
    "Via",
    "Visitor",
]
