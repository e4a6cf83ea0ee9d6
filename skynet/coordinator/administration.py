"""What admins may change: invites, approvals, revocations, drains; over a 0600 Unix socket or as an admitted admin."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import time
from typing import TYPE_CHECKING, Any, assert_never

from skynet.coordinator.admission import describe_revocation
from skynet.errors import ConfigError, SkyNetError
from skynet.protocol.admin_socket import read_frame, send_frame, socket_path
from skynet.protocol.codec import Decoder, encode
from skynet.protocol.ids import PeerId, RequestId, WorkerId
from skynet.protocol.invites import Invite, encode_invite
from skynet.protocol.messages import (
    AdminMessage,
    Answer,
    Approve,
    CreateInvite,
    Drain,
    Failed,
    ListInvites,
    ListNodes,
    Revoke,
    RevokeInvite,
)
from skynet.protocol.roles import Grant, Role

if TYPE_CHECKING:
    from skynet.coordinator.server import CoordinatorServer

logger = logging.getLogger(__name__)
COMMAND_S = 10.0
MAX_VISITORS = 16


class Administration:
    """Carries out admin commands. Whoever reaches the Unix socket is the coordinator's own user."""

    def __init__(self, server: CoordinatorServer) -> None:
        self._server = server
        self._path = socket_path(server.config.config_dir)
        self._decoder = Decoder[AdminMessage](
            CreateInvite, ListInvites, RevokeInvite, ListNodes, Approve, Revoke, Drain
        )
        self._slots = asyncio.Semaphore(MAX_VISITORS)
        self._made: int | None = None  # inode of the socket's file that is ours

    async def run(self) -> None:
        """Listen on the Unix socket until cancelled."""
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()  # of a coordinator that was killed
        before = os.umask(0o177)
        try:
            listening = await asyncio.start_unix_server(self._visit, str(self._path))
        except OSError as exc:
            raise ConfigError(
                f"{self._path}: can't listen there ({exc.strerror}); choose a shorter SKYNET_CONFIG_DIR"
            ) from exc
        finally:
            os.umask(before)
        self._made = self._path.stat().st_ino
        async with listening:
            await listening.serve_forever()

    def close(self) -> None:
        """Remove the socket's file if it is the one that we made; twice is fine."""
        with contextlib.suppress(FileNotFoundError):
            if self._made is not None and self._path.stat().st_ino == self._made:
                self._path.unlink()

    async def _visit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with self._slots, asyncio.timeout(COMMAND_S):
                answer: Answer | Failed
                request_id = RequestId("unread")
                try:
                    message, _ = self._decoder.decode([await read_frame(reader)])
                    request_id = message.request_id
                    answer = Answer(request_id=request_id, body=json.dumps(self.carry_out(message)))
                except SkyNetError as exc:
                    answer = Failed(request_id=request_id, error=type(exc).__name__, text=str(exc))
                await send_frame(writer, bytes(encode(answer)[0]))
        except (EOFError, OSError, TimeoutError) as exc:
            logger.warning("admin connection ended reason=%s", exc)
        finally:
            writer.close()

    def carry_out(self, message: AdminMessage) -> dict[str, Any]:
        """Do it and say what was done: `text` for people, the rest for programs. Raises ConfigError."""
        match message:
            case CreateInvite():
                return self._create_invite(message)
            case ListInvites():
                return self._list_invites()
            case RevokeInvite():
                record = self._server.store.invites.revoke(message.invite_id, time.time())
                return {"text": f"invite {record.invite_id} admits nobody any more", "invite_id": record.invite_id}
            case ListNodes():
                return self._list_nodes()
            case Approve():
                node = self._server.store.nodes.approve(message.node, time.time())
                return {"text": f"node {node.node_id} ({node.display_name}) is let in", "node_id": node.node_id}
            case Revoke():
                return self._revoke(message)
            case Drain():
                return self._drain(message)
            case _:
                assert_never(message)

    def _create_invite(self, message: CreateInvite) -> dict[str, Any]:
        server = self._server
        try:
            grants = tuple(Grant(grant) for grant in message.grants)
        except ValueError as exc:
            raise ConfigError(f"--grant: {exc}; use {', '.join(Grant)}") from exc
        made = server.store.invites.create(Role(message.role), grants, message.uses, time.time(), message.lifetime_s)
        invite = Invite(
            invite_id=made.record.invite_id,
            secret=made.secret,
            swarm_name=server.config.name,
            swarm_key=server.swarm_key.public_key,
            addresses=tuple((host, server.listener.port) for host in server.announced_hosts()),
            role=made.record.role,
            grants=grants,
            expires_at=int(made.record.expires_at),
            uses=message.uses,
        )
        text = encode_invite(invite)
        how = "worker" if message.role == "worker" else "status"
        return {
            "text": f"{text}\n\nFor {message.uses} node(s), role {message.role}. "
            f"Use it with: skynet {how} --invite {text[:24]}...",
            "invite": text,
            "invite_id": invite.invite_id,
        }

    def _list_invites(self) -> dict[str, Any]:
        now = time.time()
        invites: list[dict[str, Any]] = [
            {
                "invite_id": r.invite_id,
                "role": str(r.role),
                "uses": r.uses,
                "used": r.used,
                "expires_at": r.expires_at,
                "is_open": r.is_open(now),
            }
            for r in self._server.store.invites.all()
        ]
        lines = [
            f"{i['invite_id']}  {i['role']:<7} used {i['used']}/{i['uses']}  "
            f"{'open until ' + _when(i['expires_at']) if i['is_open'] else 'closed'}"
            for i in invites
        ]
        return {"text": "\n".join(lines) or "no invites; make one with `skynet invite create`", "invites": invites}

    def _list_nodes(self) -> dict[str, Any]:
        nodes: list[dict[str, Any]] = [
            {
                "node_id": n.node_id,
                "display_name": n.display_name,
                "roles": [str(role) for role, _ in n.roles],
                "awaits": None if n.waiting_for is None else str(n.waiting_for),
                "is_revoked": n.revoked_at is not None,
                "last_seen": n.last_seen,
                "address": n.last_address,
            }
            for n in self._server.store.nodes.all()
        ]
        lines = [
            f"{n['node_id']}  {n['display_name'] or '-':<24} "
            + (
                "revoked"
                if n["is_revoked"]
                else f"awaits approval as {n['awaits']}"
                if n["awaits"]
                else ", ".join(n["roles"]) or "-"
            )
            for n in nodes
        ]
        return {"text": "\n".join(lines) or "no nodes yet", "nodes": nodes, "mode": str(self._server.gatekeeper.mode)}

    def _revoke(self, message: Revoke) -> dict[str, Any]:
        revoked = self._server.gatekeeper.revoke(message.node, time.time())
        cut = self._server.cut_off(revoked.node_id, "revoked by the swarm's owner")
        return {
            "text": f"{describe_revocation(revoked)} {cut} process(es) were cut off.",
            "node_id": revoked.node_id,
            "mode": str(revoked.mode),
            "num_cut": cut,
        }

    def _drain(self, message: Drain) -> dict[str, Any]:
        members, (node, _, name) = self._server.membership.members, message.worker.partition(".")
        parts = {w: w.partition(".")[::2] for w in members}
        found = [w for w, (n, s) in parts.items() if s == message.worker or (n.startswith(node) and s == name)]
        found = found or [w for w in members if w.startswith(message.worker)]
        if len(found) != 1:
            raise ConfigError(
                f"drain {message.worker}: {len(found)} workers match{': ' if found else ''}{', '.join(found[:8])}; "
                "`skynet status` shows their names"
            )
        self._server.engine.drain(WorkerId(found[0]))
        return {"text": f"{found[0]} drains: its work moves elsewhere, then it exits", "worker": PeerId(found[0])}


def _when(timestamp: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(timestamp))
