"""Who gets in, through a real listener: by address, approval and invite; and who doesn't."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import uvloop

from skynet.coordinator.admission import describe_revocation
from skynet.coordinator.store import Mode
from skynet.errors import AdmissionRefused, AwaitingApproval, DiscoveryError, ProtocolError
from skynet.protocol import hello as wire
from skynet.protocol.admission import request_admission
from skynet.protocol.codec import PROTOCOL_VERSION
from skynet.protocol.hello import Challenge, Refused
from skynet.protocol.identity import NodeKey, ProcessKey, SwarmKey
from skynet.protocol.roles import Grant, Role
from skynet.protocol.tls import server_context
from tests.security.admission_world import HOST, LENGTH, World, applicant, false_listener, world


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_loopback_worker_is_welcome_without_any_flag(
    tmp_path: Path, run: Callable[[Coroutine[object, object, None]], None]
) -> None:
    async def main() -> None:
        async with world(tmp_path) as swarm:
            node = NodeKey.generate()
            welcome, key = await swarm.ask(applicant(node))
            assert key == swarm.swarm_key.public_key
            assert (welcome.peer_id, welcome.role, welcome.swarm_name) == (f"{node.node_id}.cpu", Role.WORKER, "home")
            assert (welcome.seen_address, welcome.ports, welcome.grants) == (HOST, {"control": 1}, ())
            await swarm.settled()
            assert swarm.listener.stats.welcomed == 1

    run(main())


def test_nothing_is_said_to_a_coordinator_with_another_key(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as swarm:
            said: list[Challenge] = []

            def hello(challenge: Challenge, _key: object) -> bytes:
                said.append(challenge)
                return b""

            expected = SwarmKey.generate()
            with pytest.raises(DiscoveryError, match=f"{swarm.swarm_key.fingerprint}.*{expected.fingerprint}"):
                await request_admission(HOST, swarm.listener.port, pinned_key=expected.public_key, hello=hello)
            assert said == []
            await swarm.settled()
            assert swarm.listener.stats.refused == swarm.listener.stats.welcomed == 0

    asyncio.run(main())


def test_nobody_takes_a_curve_key_that_another_process_holds(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as swarm:
            victim = ProcessKey.generate()
            taken = ProcessKey(victim.public, ProcessKey.generate().secret)
            with pytest.raises(AdmissionRefused, match="doesn't hold the secret"):
                await swarm.ask(replace(applicant(), process_key=taken))
            await swarm.ask(replace(applicant(), process_key=victim))

    asyncio.run(main())


def test_a_coordinator_that_failed_to_decide_is_asked_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as swarm:
            decide, failures = swarm.gatekeeper.decide, [RuntimeError("disk"), RuntimeError("disk")]

            def fail_twice(*arguments: object) -> object:
                if failures:
                    raise failures.pop()
                return decide(*arguments)  # type: ignore[arg-type]

            swarm.gatekeeper.decide = fail_twice  # type: ignore[method-assign,assignment]
            await swarm.ask(applicant())
            assert swarm.listener.stats.refused == 2

    asyncio.run(main())


def test_admin_is_never_admitted_by_address(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as swarm:
            with pytest.raises(AdmissionRefused, match="admin needs an invite"):
                await swarm.ask(applicant(role=Role.ADMIN))

    asyncio.run(main())


def test_new_node_waits_for_approval_and_is_let_in_after_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, Mode.APPROVE) as swarm:
            node = NodeKey.generate()
            with pytest.raises(AwaitingApproval, match=f"skynet approve {node.node_id[:8]}"):
                await swarm.ask(applicant(node))
            await asyncio.to_thread(swarm.store.nodes.approve, node.node_id[:8], time.time())
            assert (await swarm.ask(applicant(node))).welcome.role is Role.WORKER
            assert (await swarm.ask(applicant(node, Role.CLIENT))).welcome.role is Role.CLIENT
            with pytest.raises(AdmissionRefused):
                await swarm.ask(applicant(node, Role.ADMIN))

    asyncio.run(main())


def test_who_asks_again_and_again_is_refused_in_the_log_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with world(tmp_path, Mode.APPROVE) as swarm:
            for _ in range(3):
                with pytest.raises(AwaitingApproval):
                    await swarm.ask(applicant(node))
            with pytest.raises(AwaitingApproval):
                await swarm.ask(applicant(other))

    node, other = NodeKey.generate(), NodeKey.generate()
    with caplog.at_level("DEBUG", logger="skynet.protocol.admission"):
        asyncio.run(main())
    told = [(r.levelname, r.getMessage()) for r in caplog.records if r.getMessage().startswith("node refused")]
    assert [level for level, _ in told] == ["INFO", "DEBUG", "DEBUG", "INFO"]
    assert node.node_id[:8] in told[0][1]
    assert other.node_id[:8] in told[-1][1]


def test_client_is_not_made_a_worker_by_its_invite(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, Mode.INVITE) as swarm:
            made = swarm.store.invites.create(Role.CLIENT, (), uses=1, now=time.time())
            right = {"invite_id": made.record.invite_id, "invite_secret": made.secret}
            node = NodeKey.generate()
            with pytest.raises(AdmissionRefused, match="admits a client, not a worker"):
                await swarm.ask(applicant(node, Role.WORKER, **right))
            assert swarm.store.invites.all()[0].used == 0
            assert (await swarm.ask(applicant(node, Role.CLIENT, **right))).welcome.role is Role.CLIENT
            with pytest.raises(AdmissionRefused, match="admits by invite"):
                await swarm.ask(applicant(node, Role.WORKER))

    asyncio.run(main())


def test_invite_grants_and_is_remembered(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, Mode.INVITE) as swarm:
            made = swarm.store.invites.create(Role.ADMIN, (Grant.RUN_CODE,), uses=1, now=time.time())
            right = {"invite_id": made.record.invite_id, "invite_secret": made.secret}
            node = NodeKey.generate()
            welcome = (await swarm.ask(applicant(node, Role.ADMIN, **right))).welcome
            assert (welcome.role, welcome.grants) == (Role.ADMIN, (Grant.RUN_CODE,))
            again = (await swarm.ask(applicant(node, Role.ADMIN))).welcome
            assert again.grants == (Grant.RUN_CODE,)

    asyncio.run(main())


@pytest.mark.parametrize("fault", ["expired", "exhausted", "forged", "unknown", "revoked"])
def test_bad_invite_is_refused_with_its_reason_even_on_loopback(tmp_path: Path, fault: str) -> None:
    async def main() -> None:
        async with world(tmp_path) as swarm:
            made_at = time.time() - (100 if fault == "expired" else 0)
            made = swarm.store.invites.create(Role.WORKER, (), uses=1, now=made_at, lifetime_s=50)
            invite_id, secret = made.record.invite_id, made.secret
            if fault == "exhausted":
                await swarm.ask(applicant(invite_id=invite_id, invite_secret=secret))
            if fault == "revoked":
                swarm.store.invites.revoke(invite_id, time.time())
            secret = bytes(20) if fault == "forged" else secret
            invite_id = "zzzzzzzz" if fault == "unknown" else invite_id
            reasons = {"expired": "expired", "exhausted": "used up", "revoked": "was revoked"}
            reason = reasons.get(fault, "never gave out")
            with pytest.raises(AdmissionRefused, match=reason):
                await swarm.ask(applicant(invite_id=invite_id, invite_secret=secret))

    asyncio.run(main())


def test_revoked_node_stays_out_whatever_it_brings(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as swarm:
            node, other = NodeKey.generate(), NodeKey.generate()
            await swarm.ask(applicant(node))
            await swarm.ask(applicant(other))
            revoked = await asyncio.to_thread(swarm.gatekeeper.revoke, node.node_id[:10], time.time())
            assert "it is `approve` now" in describe_revocation(revoked)
            made = swarm.store.invites.create(Role.WORKER, (), uses=1, now=time.time())
            for secret in (b"", made.secret):
                invite_id = made.record.invite_id if secret else ""
                with pytest.raises(AdmissionRefused, match="revoked"):
                    await swarm.ask(applicant(node, invite_id=invite_id, invite_secret=secret))
            assert (await swarm.ask(applicant(other))).welcome, "who was in before stays"
            with pytest.raises(AwaitingApproval):
                await swarm.ask(applicant())

    asyncio.run(main())


def test_bind_beyond_the_local_network_forces_invites(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, forces_invite=True) as swarm:
            with pytest.raises(AdmissionRefused, match="--invite"):
                await swarm.ask(applicant())

    asyncio.run(main())


async def _exchange(swarm: World, hello: bytes) -> Refused:
    stranger = await swarm.connect()
    await stranger.receive()
    await stranger.send_framed(hello)
    answer = wire.decode(await stranger.receive()).open(Refused)
    stranger.close()
    return answer


def test_replayed_hello_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as swarm:
            stranger = await swarm.connect()
            challenge = wire.decode(await stranger.receive()).open(Challenge)
            recorded = applicant().hello(challenge, swarm.swarm_key.public_key)
            await stranger.send_framed(recorded)
            assert wire.decode(await stranger.receive()).kind == "welcome"
            stranger.close()
            answer = await _exchange(swarm, recorded)
            assert answer.code == "malformed"
            assert "isn't by" in answer.reason

    asyncio.run(main())


def test_hello_made_for_another_swarm_can_not_be_passed_on(tmp_path: Path) -> None:
    """Somebody in the middle, with a swarm of his own, relays our challenge to a newcomer and its Hello to us."""

    async def main() -> None:
        async with world(tmp_path) as swarm:
            stranger = await swarm.connect()
            challenge = wire.decode(await stranger.receive()).open(Challenge)
            await stranger.send_framed(applicant().hello(challenge, SwarmKey.generate().public_key))
            assert wire.decode(await stranger.receive()).open(Refused).code == "malformed"
            stranger.close()

    asyncio.run(main())


@pytest.mark.parametrize(("ahead", "older"), [(1, "upgrade the coordinator"), (-1, "upgrade this side")])
def test_hello_of_another_version_is_told_which_side_to_upgrade(tmp_path: Path, ahead: int, older: str) -> None:
    async def main() -> None:
        async with world(tmp_path) as swarm:
            data = msgspec.msgpack.encode(("skynet", PROTOCOL_VERSION + ahead, "8.8", "hello", b"?", b""))
            answer = await _exchange(swarm, data)
            assert answer.code == "version"
            assert answer.reason.endswith(older)

    asyncio.run(main())


# -- a coordinator that can't be trusted ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [b"", b"\0\0\0\0", b"\xff\xff\xff\xff", LENGTH.pack(3) + b"abc", LENGTH.pack(4096), b"\0\0\x10\0" + b"\x93" * 4096],
)
def test_garbage_from_a_listener_is_an_error_in_time(answer: bytes) -> None:
    async def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        await writer.drain()
        writer.close()

    async def main() -> None:
        async with false_listener(serve, server_context(SwarmKey.generate())) as port:
            with pytest.raises((ProtocolError, DiscoveryError)):
                await request_admission(HOST, port, pinned_key=None, hello=applicant().hello, timeout_s=0.5)

    asyncio.run(main())


@pytest.mark.parametrize("greeting", [b"", b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_something_else_on_that_port_is_named(greeting: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        while await reader.read(65536):
            pass

    async def main() -> None:
        async with false_listener(serve) as port:
            with pytest.raises(DiscoveryError, match=f"{HOST} port {port}"):
                await request_admission(HOST, port, pinned_key=None, hello=applicant().hello, timeout_s=0.5)

    asyncio.run(main())


def test_nobody_there_is_said_at_once() -> None:
    with socket.socket() as unheard:
        unheard.bind((HOST, 0))
        port = unheard.getsockname()[1]
    with pytest.raises(DiscoveryError, match="check the address"):
        asyncio.run(request_admission(HOST, port, pinned_key=None, hello=applicant().hello, timeout_s=10))
