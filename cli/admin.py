"""`skynet invite`, `nodes`, `approve`, `revoke` and `drain`: who may be in the swarm."""

from __future__ import annotations

import json
import uuid
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from skynet.client.environment import Environment

from .ask import Coordinator, Invite, SwarmName, client_config
from .common import fail, printable, run_async

if TYPE_CHECKING:
    from skynet.protocol.ids import RequestId
    from skynet.protocol.messages import AdminMessage

AsJson = Annotated[bool, typer.Option("--json", help="Print the coordinator's answer as JSON.")]
invites = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Create, list and revoke invites.\n\nExample: skynet invite create --uses 3",
)


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.add_typer(invites, name="invite")
    invites.command(
        "create", help="Print an invite for a new node.\n\nExample: skynet invite create --uses 3 --hours 48"
    )(create)
    invites.command("list", help="Show every invite.\n\nExample: skynet invite list")(list_invites)
    invites.command("revoke", help="Let an invite admit nobody any more.\n\nExample: skynet invite revoke k3v7q2")(
        revoke_invite
    )
    app.command(help="Show known nodes and those that wait for approval.\n\nExample: skynet nodes")(nodes)
    app.command(help="Let a waiting node in.\n\nExample: skynet approve 7xq4")(approve)
    app.command(help="Cut a node off, now and for good.\n\nExample: skynet revoke 7xq4")(revoke)
    app.command(help="Move a worker's work elsewhere and let it exit.\n\nExample: skynet drain 7xq4.cpu")(drain)


def _ask(message: AdminMessage, as_json: bool, coordinator: str | None, swarm: str | None, invite: str | None) -> None:
    """Send one command as an admin and print the answer."""
    from skynet.client.admin import command, has_own_coordinator
    from skynet.client.swarm import ClientConfig

    config_dir = Environment.read().config_dir
    # On the coordinator's own machine its Unix socket comes before an address that is meant for other commands.
    if coordinator is None and swarm is None and has_own_coordinator(config_dir):
        config = ClientConfig(config_dir=config_dir)
    else:
        config = client_config(coordinator, swarm, invite)
    try:
        answer = run_async(command(message, config))
        typer.echo(json.dumps(answer) if as_json else printable(str(answer.get("text", answer))))
    except Exception as exc:
        fail(exc)


def _id() -> RequestId:
    from skynet.protocol.ids import RequestId

    return RequestId(uuid.uuid4().hex)


def create(
    role: Annotated[Literal["worker", "client", "admin"], typer.Option(help="What it admits as.")] = "worker",
    uses: Annotated[int, typer.Option(min=1, max=100_000, help="How many nodes it admits.")] = 1,
    hours: Annotated[float, typer.Option(min=0.01, max=87_600, help="How long it is good for.")] = 24.0,
    grant: Annotated[
        list[str] | None, typer.Option(metavar="GRANT", help="run_code or lend_device; may be given several times.")
    ] = None,
    as_json: AsJson = False,
    coordinator: Coordinator = None,
    swarm: SwarmName = None,
    invite: Invite = None,
) -> None:
    from skynet.protocol.messages import CreateInvite

    message = CreateInvite(
        request_id=_id(), role=role, uses=uses, lifetime_s=hours * 3600, grants=tuple(sorted(set(grant or ())))
    )
    _ask(message, as_json, coordinator, swarm, invite)


def list_invites(
    as_json: AsJson = False, coordinator: Coordinator = None, swarm: SwarmName = None, invite: Invite = None
) -> None:
    from skynet.protocol.messages import ListInvites

    _ask(ListInvites(request_id=_id()), as_json, coordinator, swarm, invite)


def revoke_invite(
    invite_id: Annotated[str, typer.Argument(help="The id that `skynet invite list` shows.")],
    as_json: AsJson = False,
    coordinator: Coordinator = None,
    swarm: SwarmName = None,
    invite: Invite = None,
) -> None:
    from skynet.protocol.messages import RevokeInvite

    _ask(RevokeInvite(request_id=_id(), invite_id=invite_id), as_json, coordinator, swarm, invite)


def nodes(
    as_json: AsJson = False, coordinator: Coordinator = None, swarm: SwarmName = None, invite: Invite = None
) -> None:
    from skynet.protocol.messages import ListNodes

    _ask(ListNodes(request_id=_id()), as_json, coordinator, swarm, invite)


def approve(
    node: Annotated[str, typer.Argument(help="Node id, or its beginning.")],
    as_json: AsJson = False,
    coordinator: Coordinator = None,
    swarm: SwarmName = None,
    invite: Invite = None,
) -> None:
    from skynet.protocol.messages import Approve

    _ask(Approve(request_id=_id(), node=node), as_json, coordinator, swarm, invite)


def revoke(
    node: Annotated[str, typer.Argument(help="Node id, or its beginning.")],
    as_json: AsJson = False,
    coordinator: Coordinator = None,
    swarm: SwarmName = None,
    invite: Invite = None,
) -> None:
    from skynet.protocol.messages import Revoke

    _ask(Revoke(request_id=_id(), node=node), as_json, coordinator, swarm, invite)


def drain(
    worker: Annotated[str, typer.Argument(help="Worker id, its beginning, or the worker's name.")],
    as_json: AsJson = False,
    coordinator: Coordinator = None,
    swarm: SwarmName = None,
    invite: Invite = None,
) -> None:
    from skynet.protocol.messages import Drain

    _ask(Drain(request_id=_id(), worker=worker), as_json, coordinator, swarm, invite)
