"""The client and the coordinator's server in one process, over real sockets; no workers."""

from __future__ import annotations

import asyncio
import re
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from skynet.client.admin import command, has_own_coordinator
from skynet.client.swarm import ClientConfig, Completion, Swarm, _put
from skynet.coordinator.news import MAX_WAITERS_PER_CLIENT
from skynet.coordinator.planner import PlannerConfig
from skynet.coordinator.served import open_model
from skynet.coordinator.server import CoordinatorServer, _Admitted
from skynet.coordinator.server_config import CoordinatorConfig
from skynet.errors import ConfigError, RequestFailed, SkyNetError
from skynet.models.embedded import EMBEDDED_DIR
from skynet.protocol.allowance import Allowance
from skynet.protocol.control import LinkLost
from skynet.protocol.identity import ProcessKey
from skynet.protocol.ids import PeerId, RequestId, WorkerId
from skynet.protocol.invites import decode_invite
from skynet.protocol.messages import (
    BadChunk,
    ChatMessage,
    CreateInvite,
    Drain,
    Finished,
    Join,
    Notice,
    Submit,
    ToClient,
    Tokens,
)
from skynet.protocol.profile import WorkerProfile
from skynet.protocol.roles import Role

Act = Callable[[CoordinatorServer, ClientConfig], Awaitable[None]]


@pytest.fixture
def play(tmp_path: Path) -> Callable[[Act], None]:
    """Run something beside a coordinator."""
    model = open_model("embedded", None, tmp_path / "cache", None)

    async def run(act: Act) -> None:
        config = CoordinatorConfig(
            port=0, bind=("127.0.0.1",), mdns=False, config_dir=tmp_path / "config", cache_dir=tmp_path / "cache"
        )
        server = CoordinatorServer(config, PlannerConfig(), model)
        running = asyncio.create_task(server.run())
        try:
            async with asyncio.timeout(20):
                await asyncio.sleep(0)
                client = ClientConfig(
                    coordinator=f"127.0.0.1:{server.listener.port}", config_dir=tmp_path / "client", find_s=5
                )
                await act(server, client)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await server.close()

    return lambda act: asyncio.run(run(act))


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():  # noqa: ASYNC110  (its deadline is the play's)
        await asyncio.sleep(0.005)


def clients_of(server: CoordinatorServer) -> list[PeerId]:
    return [peer for peer in server._admitted if ".c-" in peer]


def test_client_that_is_gone_is_forgotten_and_one_that_is_there_stays(play: Callable[[Act], None]) -> None:
    async def act(server: CoordinatorServer, config: ClientConfig) -> None:
        async with Swarm(config) as stays:
            await stays.status()
            async with Swarm(config) as goes:
                await goes.status()
                assert len(clients_of(server)) == 2
            [stayed] = [peer for peer in clients_of(server) if peer.endswith(stays._suffix)]
            [gone] = [peer for peer in clients_of(server) if peer != stayed]
            await until(lambda: server.control.connection_of(gone) is None)
            now = asyncio.get_running_loop().time()
            server.forget_absent(now + 3600)
            assert clients_of(server) == [stayed]
            assert server.factory.registry.key_of(gone) is None
            await stays.status()

    play(act)


def test_bug_that_one_client_meets_disturbs_no_other(
    play: Callable[[Act], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(submit: Submit, client: PeerId) -> None:
        raise OverflowError("out of range")

    async def act(server: CoordinatorServer, config: ClientConfig) -> None:
        async with Swarm(config) as unlucky, Swarm(config) as other:
            monkeypatch.setattr(server.engine, "submit", fail)
            with pytest.raises(RequestFailed, match="out of range"):
                async for _ in unlucky.complete(Completion(prompt="hello")):
                    pass
            await other.status()

    play(act)


@pytest.mark.parametrize("question", ["status", "profiles"])
def test_client_that_asks_without_pause_is_slowed_down_and_not_cut_off(
    play: Callable[[Act], None], monkeypatch: pytest.MonkeyPatch, question: str
) -> None:
    """What is told of a large swarm takes long to make; here 20 ms."""

    def describe_much(*_: object) -> dict[str, Any]:
        until_s = time.thread_time() + 0.02
        while time.thread_time() < until_s:
            pass
        return {}

    async def act(server: CoordinatorServer, config: ClientConfig) -> None:
        monkeypatch.setattr("skynet.coordinator.server.describe", describe_much)
        monkeypatch.setattr("skynet.coordinator.server.profiles", describe_much)
        server.control._toll._allowance = Allowance(share=0.1, burst_s=0.1)
        async with Swarm(config) as eager:
            for _ in range(10):
                await getattr(eager, question)()
            assert not server.factory.registry._suspended

    play(act)


def test_clients_that_ask_together_get_one_status_and_a_flood_of_questions_is_paid_by_who_sends_it(
    play: Callable[[Act], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def act(server: CoordinatorServer, config: ClientConfig) -> None:
        made: list[int] = []

        def describe(server: CoordinatorServer, revision: int) -> dict[str, Any]:
            made.append(revision)
            return {}

        monkeypatch.setattr("skynet.coordinator.server.describe", describe)
        async with Swarm(config) as one, Swarm(config) as other:
            await one.status()  # from now on questions wait for the next look
            made.clear()
            await asyncio.gather(*(swarm.status() for swarm in (one, other) for _ in range(MAX_WAITERS_PER_CLIENT)))
            assert len(made) <= 3
            made.clear()
            await asyncio.gather(*(one.status() for _ in range(4 * MAX_WAITERS_PER_CLIENT)))
            assert len(made) > 2 * MAX_WAITERS_PER_CLIENT

    play(act)


def test_what_a_worker_says_of_its_device_and_of_chunks_is_logged_in_one_bounded_line(
    play: Callable[[Act], None], caplog: pytest.LogCaptureFixture
) -> None:
    forged = "cpu\n2026 INFO all is well \x1b[2J" + "x" * 5000

    async def act(server: CoordinatorServer, config: ClientConfig) -> None:
        async with Swarm(config) as somebody:
            await somebody.status()
        worker_id, key = WorkerId("w" * 26 + ".a"), ProcessKey.generate().public
        profile = WorkerProfile(
            device=forged, device_name=forged, threads=1, memory_bytes=1 << 30,
            weight_bytes_per_s={"bfloat16": 1e9}, matmul_flops_per_s={"bfloat16": 1e11},
        )  # fmt: skip
        join = Join(profile=profile, hosts=("127.0.0.1",), data_port=1, bulk_port=2, pid=1)
        admitted = _Admitted(Role.WORKER, key, "127.0.0.1", 0.0)
        server._admitted[PeerId(worker_id)] = admitted
        server._on_control(PeerId(worker_id), join)
        server._on_control(PeerId(worker_id), BadChunk(peer=PeerId(forged), chunk=forged))

    with caplog.at_level("INFO", logger="skynet.coordinator.server"):
        play(act)
    told = [r.getMessage() for r in caplog.records if "worker=w" in r.getMessage() or "by=w" in r.getMessage()]
    assert [message.split(" ")[:2] for message in told] == [["worker", "joined"], ["bad", "chunk"]]
    assert all(message.isprintable() and len(message) < 400 for message in told)


def test_a_worker_is_drained_by_any_name_that_means_no_other(play: Callable[[Act], None]) -> None:
    ids = [WorkerId(f"{node:w<26}.{name}") for node, name in (("ab", "cpu"), ("ac", "cpu"), ("ac", "cpu-2"))]

    async def act(server: CoordinatorServer, config: ClientConfig) -> None:
        async with Swarm(config) as somebody:
            await somebody.status()
        for number, worker_id in enumerate(ids, start=1):
            profile = WorkerProfile(
                device="cpu", device_name="cpu", threads=1, memory_bytes=1 << 30,
                weight_bytes_per_s={"bfloat16": 1e9}, matmul_flops_per_s={"bfloat16": 1e11},
            )  # fmt: skip
            join = Join(profile=profile, hosts=("127.0.0.1",), data_port=1, bulk_port=2, pid=number)
            server._admitted[PeerId(worker_id)] = _Admitted(Role.WORKER, ProcessKey.generate().public, "127.0.0.1", 0.0)
            server._on_control(PeerId(worker_id), join)
        for name, said in (("cpu", f"2 workers match: {ids[0]}, {ids[1]};"), ("x", "0 workers match;")):
            with pytest.raises(ConfigError, match=re.escape(said)):
                server.administration.carry_out(Drain(request_id=RequestId("r"), worker=name))
        for name, meant in (("ab.cpu", ids[0]), ("cpu-2", ids[2]), (str(ids[1]), ids[1])):
            answer = server.administration.carry_out(Drain(request_id=RequestId("r"), worker=name))
            assert answer["worker"] == meant

    play(act)


def test_a_model_in_a_directory_is_meant_by_its_path_and_by_its_name(tmp_path: Path) -> None:
    shutil.copytree(EMBEDDED_DIR, tmp_path / "mine")
    model = open_model(str(tmp_path / "mine"), None, tmp_path / "cache", None)
    for named in (None, "mine", "mine/", str(tmp_path / "mine"), f"{tmp_path}/mine/"):
        assert model.prompt_ids(Completion(prompt="hello", model=named).submit(RequestId("r"), ()))
    for other in ("min", "ine", "other/mine", "/mine", ""):
        with pytest.raises(ConfigError, match=f"this swarm runs {tmp_path}/mine, not "):
            model.prompt_ids(Completion(prompt="hello", model=other).submit(RequestId("r"), ()))


def test_client_asks_again_when_tokens_are_missing(play: Callable[[Act], None]) -> None:
    """Also when what is missing is the end of the answer."""

    async def act(server: CoordinatorServer, config: ClientConfig) -> None:
        submits: list[tuple[int, ...]] = []

        def answer(submit: Submit, client: PeerId) -> None:
            submits.append(submit.received)
            told = [(5, "a"), (6, "b"), (7, "c")]
            kept = {1: [0], 2: [1]}.get(len(submits), [0, 1, 2])  # which tokens arrive
            for position, (token_id, text) in enumerate(told):
                if position >= len(submit.received) and position in kept:
                    server.tell(
                        client,
                        Tokens(request_id=submit.request_id, position=position, token_ids=(token_id,), text=text),
                    )
            end = Finished(request_id=submit.request_id, reason="length", prompt_tokens=1, completion_tokens=3)
            server.tell(client, end)

        server.engine.submit = answer  # type: ignore[method-assign]
        async with Swarm(config) as swarm:
            stream = swarm.complete(Completion(prompt="hello", max_tokens=3))
            async for _ in stream:
                pass
            assert stream.text == "abc"
            assert stream.token_ids == [5, 6, 7]
            assert submits == [(), (5,), (5, 6)]

    play(act)


def test_reader_that_leaves_early_waits_for_no_timeout(play: Callable[[Act], None]) -> None:
    """The cancelled request's confirmation reaches who waits for it."""

    async def act(server: CoordinatorServer, config: ClientConfig) -> None:
        async with Swarm(config) as swarm:
            events = aiter(swarm.complete(Completion(prompt="hello")))
            event = await anext(events)
            assert event.notice is not None
            started = asyncio.get_running_loop().time()
            await events.aclose()  # type: ignore[attr-defined]
            assert asyncio.get_running_loop().time() - started < 0.9
            assert not server.engine.requests.by_id
            assert not swarm._inboxes

    play(act)


def test_request_that_failed_is_not_cancelled(play: Callable[[Act], None]) -> None:
    async def act(server: CoordinatorServer, config: ClientConfig) -> None:
        async with Swarm(config) as swarm:
            started = asyncio.get_running_loop().time()
            with pytest.raises(SkyNetError, match="not another"):
                async for _ in swarm.complete(Completion(prompt="hello", model="another")):
                    pass
            assert asyncio.get_running_loop().time() - started < 0.9

    play(act)


def test_full_backlog_gives_way_to_what_must_be_read() -> None:
    inbox: asyncio.Queue[ToClient | LinkLost] = asyncio.Queue(2)
    for _ in range(2):
        inbox.put_nowait(Notice(request_id=RequestId("r"), text="x"))
    lost = LinkLost("gone")
    _put(inbox, lost)
    assert inbox.get_nowait() is lost
    assert inbox.empty()


@pytest.mark.parametrize("bind", ["0.0.0.0", "127.0.0.1"])
def test_an_invite_leads_to_addresses_that_can_be_reached(bind: str, tmp_path: Path) -> None:
    model = open_model("embedded", None, tmp_path / "cache", None)

    async def run() -> None:
        config = CoordinatorConfig(
            port=0, bind=(bind,), announce=("swarm.example.org",), mdns=False, config_dir=tmp_path / "config",
            cache_dir=tmp_path / "cache",
        )  # fmt: skip
        server = CoordinatorServer(config, PlannerConfig(), model)
        running = asyncio.create_task(server.run())
        try:
            async with asyncio.timeout(20):
                await asyncio.sleep(0)
                owner = ClientConfig(config_dir=tmp_path / "config")
                await until(lambda: has_own_coordinator(owner.config_dir))
                made = await command(CreateInvite(request_id=RequestId("r"), role="client"), owner)
                addresses = decode_invite(made["invite"]).addresses
                assert addresses[0] == ("swarm.example.org", server.listener.port)
                assert len(addresses) > 1
                assert "0.0.0.0" not in dict(addresses)
                for host, _ in addresses[1:]:
                    own = ClientConfig(
                        coordinator=f"{host}:{server.listener.port}", invite=made["invite"],
                        config_dir=tmp_path / "guest", find_s=5,
                    )  # fmt: skip
                    async with Swarm(own) as swarm:
                        assert (await swarm.status())["name"] == "skynet"
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await server.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("bind", "announce", "named"),
    [
        ("0.0.0.0", "example.org:80", r"--announce example\.org:80: .* without a port"),
        ("0.0.0.0", "two words", r"--announce: address 'two words'"),
        ("203.0.113.7", None, r"--bind 203\.0\.113\.7: .* --bind 0\.0\.0\.0 --announce 203\.0\.113\.7"),
        ("myhost", None, r"--bind myhost: isn't an address; give one of .*127\.0\.0\.1"),
    ],
)
def test_an_impossible_address_is_refused_by_its_option(
    bind: str, announce: str | None, named: str, tmp_path: Path
) -> None:
    config = CoordinatorConfig(
        bind=(bind,), announce=(announce,) if announce else (), config_dir=tmp_path, cache_dir=tmp_path
    )
    with pytest.raises(ConfigError, match=named):
        config.check_hosts()


@pytest.mark.parametrize("text", ["\udcff", "fine \ud800"])
def test_text_that_cannot_travel_is_refused_where_it_is_given(text: str) -> None:
    with pytest.raises(ConfigError, match=r"prompt: character .* isn't UTF-8 text"):
        Completion(prompt=text)
    with pytest.raises(ConfigError, match="prompt"):
        Completion(messages=(ChatMessage(role="user", content=text),))
