"""Who may send what. The table of docs/security.md is tested against this one; a kind missing here is refused."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from skynet.errors import NotPermitted


class Role(StrEnum):
    """What an admitted process is; it asks for one role, its node must hold one that covers it."""

    WORKER = "worker"  # runs shards, sees the tokens that pass through them
    CLIENT = "client"  # asks
    ADMIN = "admin"  # invites, approves, revokes, drains, and asks


class Grant(StrEnum):
    """What a role alone doesn't allow; an invite may grant it, and the worker's owner must allow it too."""

    RUN_CODE = "run_code"  # run functions and tasks of one's own on other people's workers
    LEND_DEVICE = "lend_device"  # use a worker's raw device from a remote program


# A worker sees other people's prompts, so whoever is trusted with that may also ask; the reverse doesn't hold.
COVERS: Final[Mapping[Role, frozenset[Role]]] = {
    Role.CLIENT: frozenset({Role.CLIENT}),
    Role.WORKER: frozenset({Role.WORKER, Role.CLIENT}),
    Role.ADMIN: frozenset(Role),
}

_WORKER: Final = frozenset({Role.WORKER})
_ASKING: Final = frozenset({Role.CLIENT, Role.ADMIN})
_ADMIN: Final = frozenset({Role.ADMIN})
_ANYONE: Final = frozenset(Role)

# To the coordinator. What it sends itself needs no entry: the coordinator is whoever holds the pinned key.
MAY_SEND: Final[Mapping[str, frozenset[Role]]] = {
    "join": _WORKER,
    "heartbeat": _WORKER,
    "load_progress": _WORKER,
    "prepared": _WORKER,
    "prepare_failed": _WORKER,
    "linked": _WORKER,
    "leaving": _WORKER,
    "probe_report": _WORKER,
    "bad_chunk": _WORKER,
    "step_done": _WORKER,
    "step_failed": _WORKER,
    "relay": _WORKER,
    "submit": _ASKING,
    "cancel": _ASKING,
    "get_status": _ASKING,
    "get_profiles": _ASKING,
    "create_invite": _ADMIN,
    "list_invites": _ADMIN,
    "revoke_invite": _ADMIN,
    "list_nodes": _ADMIN,
    "approve": _ADMIN,
    "revoke": _ADMIN,
    "drain": _ADMIN,
    "ping": _ANYONE,
    "pong": _ANYONE,
}


def check_may_send(role: Role, kind: str) -> None:
    """Raises NotPermitted unless a process admitted as `role` may send messages of this kind."""
    allowed = MAY_SEND.get(kind, frozenset())
    if role not in allowed:
        who = " or ".join(sorted(allowed)) or "nobody"
        raise NotPermitted(f"{kind[:64]}: a {role} may not send it, only {who} may")


def covers(held: frozenset[Role], wanted: Role) -> bool:
    """Whether a node that holds these roles may start a process as `wanted`."""
    return any(wanted in COVERS[role] for role in held)
