"""A running swarm of real processes against strangers, members who do what they may not, and revoked nodes."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import zmq

from skynet.client.swarm import Completion, CompletionStream, Event, Swarm
from skynet.errors import AdmissionRefused, ConfigError, NotPermitted, SkyNetError
from skynet.protocol.control import ControlLink, LinkLost
from skynet.protocol.entrance import EntranceConfig, Ticket, enter
from skynet.protocol.ids import RequestId
from skynet.protocol.invites import Invite, new_secret
from skynet.protocol.messages import (
    TO_CLIENT,
    Approve,
    CreateInvite,
    Drain,
    Evicted,
    Failed,
    GetStatus,
    Heartbeat,
    Leaving,
    ListInvites,
    ListNodes,
    Revoke,
    Submit,
)
from skynet.protocol.roles import Role
from skynet.protocol.steps import SamplingParams
from skynet.testing.local_swarm import LocalSwarm, LocalSwarmConfig
from skynet.testing.processes import NodeProcess

pytestmark = pytest.mark.timeout(240)
COMPLETION = Completion(prompt="Once upon a time", max_tokens=64, ignore_eos=True)
GARBAGE = (
    b"",
    b"\0" * 64,
    b"GET / HTTP/1.1\r\n\r\n",
    b"\xff\0\0\0\0\0\0\0\x01\x7f" + os.urandom(4096),
    os.urandom(1 << 16),
)


@pytest.fixture(scope="module")
def swarm() -> Iterator[LocalSwarm]:
    """Two ranks: one of the coordinator's own node."""
    with LocalSwarm(LocalSwarmConfig(layout="2x1", dtype="float32")) as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(swarm: LocalSwarm) -> list[int]:
    return swarm.complete(COMPLETION).token_ids


@pytest.fixture
def served(swarm: LocalSwarm, undisturbed: list[int]) -> Iterator[LocalSwarm]:
    """Whatever a test does to the swarm, it answers as before, by the same processes."""
    before = [swarm.coordinator, *swarm.workers.values()]
    yield swarm
    assert swarm.complete(COMPLETION).token_ids == undisturbed
    assert all(node is not None and node.is_running for node in before)


def command(config_dir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What somebody with these keys gets from `skynet`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SKYNET_")}
    return subprocess.run(
        [sys.executable, "-m", "skynet.cli", *arguments],
        env=kept | {"SKYNET_CONFIG_DIR": str(config_dir), "SKYNET_CACHE_DIR": str(config_dir)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def owner(swarm: LocalSwarm, *arguments: str) -> dict[str, object]:
    """An admin command by the coordinator's own user, through the Unix socket."""
    done = command(swarm.directory / "config", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert isinstance(answer, dict)
    return answer


def infer(swarm: LocalSwarm, home: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return command(home, "infer", "Once", "--max-tokens", "2", "--coordinator", f"127.0.0.1:{swarm.port}", *options)


def assert_refused(done: subprocess.CompletedProcess[str], error: type[SkyNetError], sentence: str) -> None:
    """In words and with the documented exit code: a traceback is no refusal."""
    assert done.returncode == error.exit_code, done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def ticket(swarm: LocalSwarm, home: Path, role: Role) -> Ticket:
    config = EntranceConfig(coordinator=f"127.0.0.1:{swarm.port}", config_dir=home)
    return swarm.run(lambda _: enter(config, role, "probe"))


def listening(node: NodeProcess | None) -> set[int]:
    assert node is not None
    connections = psutil.Process(node.process.pid).net_connections("tcp")
    return {c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN}


# -- strangers


def every_port(swarm: LocalSwarm) -> list[int]:
    """Admission, control, work and bulk of the coordinator; data and bulk of the workers."""
    ports = set[int]().union(*(listening(node) for node in (swarm.coordinator, *swarm.workers.values())))
    assert len(ports) >= 4 + 2 * len(swarm.workers)
    return sorted(ports)


def test_a_plaintext_client_gets_no_word_from_any_port(served: LocalSwarm) -> None:
    ports = every_port(served)
    with zmq.Context() as context:
        sockets = [context.socket(zmq.DEALER) for _ in ports]
        try:
            for plain, port in zip(sockets, ports, strict=True):
                plain.linger = 0
                plain.connect(f"tcp://127.0.0.1:{port}")
                plain.send(b"let me in", zmq.NOBLOCK)
            assert not zmq.zmq_poll([(plain, zmq.POLLIN) for plain in sockets], 1000)
        finally:
            for plain in sockets:
                plain.close()


def test_an_unknown_key_gets_no_word_even_with_the_right_server_key(served: LocalSwarm, tmp_path: Path) -> None:
    known = ticket(served, tmp_path, Role.CLIENT)
    with zmq.Context() as context:
        sockets = [context.socket(zmq.DEALER) for _ in known.welcome.ports]
        try:
            for stranger, port in zip(sockets, known.welcome.ports.values(), strict=True):
                stranger.linger = 0
                stranger.curve_publickey, stranger.curve_secretkey = zmq.curve_keypair()
                stranger.curve_serverkey = known.welcome.coordinator.curve_key
                stranger.connect(f"tcp://127.0.0.1:{port}")
                stranger.send(b"let me in", zmq.NOBLOCK)
            assert not zmq.zmq_poll([(stranger, zmq.POLLIN) for stranger in sockets], 1000)
        finally:
            for stranger in sockets:
                stranger.close()


def test_garbage_on_every_port_disturbs_nobody(served: LocalSwarm) -> None:
    for port in every_port(served):
        for garbage in GARBAGE:
            with socket.create_connection(("127.0.0.1", port), 5) as connection:
                connection.sendall(garbage)


# -- members who do what they may not


def talk(swarm: LocalSwarm, home: Path, role: Role, *messages: object) -> list[object]:
    """Enter, send these, and hear what the coordinator says to each."""

    async def work(_: Swarm) -> list[object]:
        config = EntranceConfig(coordinator=f"127.0.0.1:{swarm.port}", config_dir=home)
        answers: list[object] = []
        for number, message in enumerate(messages):
            link = await ControlLink.open(await enter(config, role, f"probe{number}"), TO_CLIENT)
            try:
                link.send(message)
                answers.append(await link.receive())
            finally:
                await link.close()
        return answers

    return swarm.run(work)


ASKED = RequestId("asked")
NOT_FOR_CLIENTS = (
    Heartbeat(memory_used_bytes=1, steps_done=1),
    Leaving(),
    CreateInvite(request_id=ASKED),
    ListInvites(request_id=ASKED),
    ListNodes(request_id=ASKED),
    Approve(request_id=ASKED, node="x"),
    Revoke(request_id=ASKED, node="x"),
    Drain(request_id=ASKED, worker="w0"),
)
NOT_FOR_WORKERS = (
    Submit(request_id=ASKED, prompt="Once", sampling=SamplingParams()),
    GetStatus(request_id=ASKED),
    Revoke(request_id=ASKED, node="x"),
    Drain(request_id=ASKED, worker="w0"),
)


@pytest.mark.parametrize(
    ("role", "messages"), [(Role.CLIENT, NOT_FOR_CLIENTS), (Role.WORKER, NOT_FOR_WORKERS)], ids=["client", "worker"]
)
def test_what_a_role_may_not_send_is_refused(
    role: Role, messages: tuple[object, ...], served: LocalSwarm, tmp_path: Path
) -> None:
    for message, answer in zip(messages, talk(served, tmp_path, role, *messages), strict=True):
        if isinstance(answer, Failed):
            assert answer.error == NotPermitted.__name__, message
        else:
            assert isinstance(answer, Evicted), message
            assert f"a {role} may not send it" in answer.reason


def test_nobody_becomes_admin_by_asking(served: LocalSwarm, tmp_path: Path) -> None:
    with pytest.raises(AdmissionRefused, match="an admin needs an invite"):
        ticket(served, tmp_path, Role.ADMIN)


def test_the_link_of_who_sends_garbage_is_closed_and_nobody_else_disturbed(served: LocalSwarm, tmp_path: Path) -> None:
    async def babble(_: Swarm, garbage: bytes) -> None:
        config = EntranceConfig(coordinator=f"127.0.0.1:{served.port}", config_dir=tmp_path)
        link = await ControlLink.open(await enter(config, Role.CLIENT, "babbler"), TO_CLIENT)
        try:
            link._port.send([garbage, b"more", b""])
            async with asyncio.timeout(10):
                await link.receive()
        finally:
            await link.close()

    for garbage in GARBAGE:
        with pytest.raises(LinkLost):
            served.run(lambda swarm, garbage=garbage: babble(swarm, garbage))  # type: ignore[misc]


# -- who may come in


def test_a_revoked_node_is_cut_off_at_once_and_cannot_come_back(
    swarm: LocalSwarm, undisturbed: list[int], tmp_path: Path
) -> None:
    """In the middle of an answer that it takes part in; the answer goes on without it."""
    own = swarm.workers.pop("w1")
    own.stop()
    guest = swarm.start_worker("guest", home=tmp_path)
    swarm.wait_serving(60, num_workers=2)
    guest_id = next(w["id"] for w in swarm.status()["workers"] if w["id"].endswith(".guest")).partition(".")[0]
    told: list[dict[str, object]] = []

    def revoke(stream: CompletionStream, _: Event) -> None:
        if len(stream.token_ids) >= 16 and not told:
            told.append(owner(swarm, "revoke", guest_id))

    stream = swarm.complete(COMPLETION, revoke)
    assert stream.token_ids == undisturbed
    assert told[0]["num_cut"] == 1
    assert told[0]["mode"] == "approve"  # in mode `lan` it could have come back with a new key
    assert guest.wait(20) == AdmissionRefused.exit_code
    assert "revoked" in guest.lines[-1]
    swarm.workers.pop("guest")
    swarm.workers["w0"].wait_for(rf"peer cut off peer={guest_id}\.guest", 5)  # its key opens nothing there either
    again = command(tmp_path / "config", "worker", "--coordinator", f"127.0.0.1:{swarm.port}", "--device", "cpu")
    assert again.returncode == AdmissionRefused.exit_code
    assert "revoked" in again.stderr
    client = infer(swarm, tmp_path / "config")
    assert client.returncode == AdmissionRefused.exit_code
    nodes = owner(swarm, "nodes")["nodes"]
    assert isinstance(nodes, list)
    assert [node["is_revoked"] for node in nodes if node["node_id"] == guest_id] == [True]
    swarm.start_worker("w1").wait_for("worker ready", 60)  # of the coordinator's own node, which stays known


@pytest.fixture
def in_mode(swarm: LocalSwarm) -> Callable[[str], LocalSwarm]:
    """Restarts the coordinator in another mode of admission."""

    def restarted(mode: str) -> LocalSwarm:
        arguments = ("--admission", mode)
        if swarm.config.coordinator_arguments != arguments:
            swarm.serve(replace(swarm.config, coordinator_arguments=arguments))
        return swarm

    return restarted


def test_in_approve_mode_a_newcomer_waits_for_the_owner(in_mode: Callable[[str], LocalSwarm], tmp_path: Path) -> None:
    swarm = in_mode("approve")
    refused = infer(swarm, tmp_path / "client")
    assert refused.returncode == AdmissionRefused.exit_code
    assert "skynet approve " in refused.stderr
    node = refused.stderr.partition("skynet approve ")[2][:8]
    owner(swarm, "approve", node)
    assert infer(swarm, tmp_path / "client").returncode == 0
    waiting = swarm.start_worker("waiting", home=tmp_path / "worker")
    node = waiting.wait_for(r"skynet approve (\w{8})", 60)[1]
    assert len(swarm.status()["workers"]) == 2
    owner(swarm, "approve", node)
    waiting.wait_for("worker ready", 30)  # by itself: it asked again and again
    waiting.stop()
    swarm.workers.pop("waiting")


def test_in_invite_mode_an_invite_admits_as_many_nodes_as_it_says(
    in_mode: Callable[[str], LocalSwarm], tmp_path: Path
) -> None:
    swarm = in_mode("invite")
    assert "ask its owner for one" in infer(swarm, tmp_path / "first").stderr
    invite = str(owner(swarm, "invite", "create", "--role", "client", "--uses", "1")["invite"])
    damaged = invite[:-12] + ("a" if invite[-12] != "a" else "b") + invite[-11:]
    forged = str(replace(Invite.parse(invite), secret=new_secret()))
    assert_refused(infer(swarm, tmp_path / "first", "--invite", damaged), ConfigError, "its checksum doesn't match")
    assert_refused(infer(swarm, tmp_path / "first", "--invite", forged), AdmissionRefused, "never gave out that invite")
    assert infer(swarm, tmp_path / "first", "--invite", invite).returncode == 0
    assert infer(swarm, tmp_path / "first").returncode == 0  # what an invite gave stays
    exhausted = infer(swarm, tmp_path / "second", "--invite", invite)
    assert_refused(exhausted, AdmissionRefused, "the invite was for 1 node and is used up; ask for a new one")
    as_worker = command(
        tmp_path / "third", "worker", "--device", "cpu", "--coordinator", f"127.0.0.1:{swarm.port}", "--invite", invite
    )
    assert_refused(as_worker, AdmissionRefused, "the invite admits a client, not a worker")
    for_worker = str(owner(swarm, "invite", "create")["invite"])
    invited = swarm.start_worker("invited", ("--invite", for_worker), home=tmp_path / "fourth")
    invited.wait_for("worker ready", 60)
    invited.stop()
    swarm.workers.pop("invited")
