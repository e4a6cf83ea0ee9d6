"""Who gets in, and as what. Decisions only: sockets are in `protocol/admission.py`, memory is in the store."""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from skynet.coordinator.store import Mode, NodeRecord, NotRedeemed, Revoked, Store, Via, Visitor
from skynet.protocol.addresses import Interface, is_lan_source
from skynet.protocol.hello import Hello, RefusalCode, Refused, Welcome
from skynet.protocol.identity import CurveCertificate
from skynet.protocol.ids import NodeId, PeerId
from skynet.protocol.roles import Grant, Role, covers

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """The decision to let a process in."""

    node_id: NodeId
    peer_id: PeerId
    role: Role
    grants: tuple[Grant, ...]
    swarm_name: str
    source: str

    def welcome(self, certificate: CurveCertificate, ports: Mapping[str, int], lease_s: float) -> Welcome:
        """The answer, once the process's CURVE key is admitted at the coordinator's sockets."""
        return Welcome(
            peer_id=self.peer_id,
            role=self.role,
            grants=self.grants,
            swarm_name=self.swarm_name,
            coordinator=certificate,
            ports=dict(ports),
            lease_s=lease_s,
            seen_address=self.source,
        )


def must_invite(bind: Sequence[str], interfaces: Sequence[Interface]) -> bool:
    """Whether listening on these addresses forces mode `invite`: on any that reaches beyond the local network."""
    return not all(_is_local_binding(host, interfaces) for host in bind)


def _is_local_binding(host: str, interfaces: Sequence[Interface]) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or (not address.is_unspecified and is_lan_source(host, interfaces))


class Gatekeeper:
    """Decides admissions from the store, the visitor's address, and a time that the caller passes. Blocking."""

    def __init__(self, store: Store, *, forces_invite: bool = False) -> None:
        self._store = store
        self._forces_invite = forces_invite

    @property
    def mode(self) -> Mode:
        """Who gets in without an invite right now."""
        return Mode.INVITE if self._forces_invite else self._store.swarm().mode

    def decide(self, hello: Hello, source: str, interfaces: Sequence[Interface], now: float) -> Admitted | Refused:
        """Admit or refuse a Hello that is proven to come from its node. `source` is the address the listener saw."""
        visitor = Visitor(node_id=hello.node_id, role=hello.role, display_name=hello.display_name, source=source)
        if self._store.nodes.is_revoked(visitor.node_id):
            return _refused("revoked", "this node was revoked by the swarm's owner, who alone can say why")
        if hello.invite_id:
            refusal = self._store.invites.redeem(hello.invite_id, hello.invite_secret, visitor, now)
            if isinstance(refusal, NotRedeemed):
                return _refused("invite_invalid", refusal.reason)
        known = self._store.nodes.get(visitor.node_id)
        if known is not None and covers(_lasting_roles(known), visitor.role):
            self._store.nodes.seen(visitor, now)
        elif (refused := self._without_invite(visitor, interfaces, now)) is not None:
            return refused
        return Admitted(
            node_id=visitor.node_id,
            peer_id=hello.peer_id,
            role=hello.role,
            grants=known.grants if known else (),
            swarm_name=self._store.swarm().name,
            source=source,
        )

    def _without_invite(self, visitor: Visitor, interfaces: Sequence[Interface], now: float) -> Refused | None:
        """The rule of the present mode; None lets the visitor in."""
        if visitor.role is Role.ADMIN:
            return _refused("role", "an admin needs an invite with that role, or to be the coordinator's own user")
        mode = self.mode
        if mode is Mode.LAN and is_lan_source(visitor.source, interfaces):
            self._store.nodes.visit(visitor, now, via=Via.LAN)
            return None
        if mode is Mode.LAN:
            return _refused(
                "address",
                f"this swarm admits nodes of its local network, and {visitor.source} isn't on it; ask for an invite",
            )
        if mode is Mode.INVITE:
            return _refused("invite_required", "this swarm admits by invite; ask its owner for one and pass --invite")
        self._store.nodes.visit(visitor, now, via=None)
        return _refused(
            "awaiting_approval",
            f"node {visitor.node_id} waits to be let in as {visitor.role}; the swarm's owner can run "
            f"`skynet approve {visitor.node_id[:8]}`",
        )

    def revoke(self, node: str, now: float) -> Revoked:
        """Ban a node for good. The caller cuts its connections. Raises ConfigError if no such node is known."""
        revoked = self._store.revoke(node, now)
        logger.info("node revoked node=%s mode=%s", revoked.node_id, revoked.mode)
        return revoked


def _lasting_roles(node: NodeRecord) -> frozenset[Role]:
    """The roles that hold from any address and in any mode."""
    return frozenset(role for role, via in node.roles if via is not Via.LAN)


def _refused(code: RefusalCode, reason: str) -> Refused:
    return Refused(code=code, reason=reason)


def describe_revocation(revoked: Revoked) -> str:
    """What the owner should know after revoking, in words."""
    sentences = [f"Node {revoked.node_id} is revoked and can't come back with its key."]
    if revoked.has_left_lan:
        sentences.append(
            f"This swarm's mode was `lan`, where it could have come back with a new key: it is `{revoked.mode}` now. "
            "New nodes wait for `skynet approve`; those that are in already stay."
        )
    if revoked.closed_invites:
        sentences.append(f"Invites it had used are revoked too: {', '.join(revoked.closed_invites)}.")
    return " ".join(sentences)
