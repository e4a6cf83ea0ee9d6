"""The coordinator process: listens, admits, hands messages to the engine, and answers clients and admins."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, assert_never

from skynet import __version__
from skynet.coordinator.administration import Administration
from skynet.coordinator.admission import Admitted, Gatekeeper, must_invite
from skynet.coordinator.engine import Engine
from skynet.coordinator.engine_config import EngineConfig
from skynet.coordinator.gateway.config import GatewayConfig
from skynet.coordinator.instance import sole_coordinator
from skynet.coordinator.membership import Membership
from skynet.coordinator.news import StatusNews
from skynet.coordinator.planner import PlannerConfig
from skynet.coordinator.served import ServedModel, open_model
from skynet.coordinator.server_config import CoordinatorConfig
from skynet.coordinator.sharing import ModelSharing
from skynet.coordinator.status import describe, profiles
from skynet.coordinator.store import Mode, Store, Via, Visitor
from skynet.errors import ConfigError, MalformedMessage, ProtocolError, SkyNetError, foreign_text
from skynet.protocol.addresses import expand_wildcards, listen_addresses, local_interfaces
from skynet.protocol.admission import AdmissionListener
from skynet.protocol.control import Switchboard
from skynet.protocol.discovery import Advertiser
from skynet.protocol.entrance import COORDINATOR
from skynet.protocol.hello import Hello, Refused, Welcome
from skynet.protocol.identity import CurveCertificate, NodeKey, ProcessKey, SwarmKey
from skynet.protocol.ids import PeerId, RequestId, WorkerId
from skynet.protocol.messages import (
    TO_COORDINATOR,
    WORK_TO_COORDINATOR,
    Answer,
    Approve,
    BadChunk,
    Cancel,
    CreateInvite,
    Drain,
    Evicted,
    Failed,
    GetProfiles,
    GetStatus,
    Heartbeat,
    Join,
    Joined,
    Leaving,
    Linked,
    ListInvites,
    ListNodes,
    LoadProgress,
    PeerInfo,
    Ping,
    Pong,
    Prepared,
    PrepareFailed,
    ProbeReport,
    Revoke,
    RevokeInvite,
    ShutOut,
    Submit,
    ToClient,
    ToCoordinator,
    ToWorker,
    WorkMessage,
)
from skynet.protocol.relay import RELAY_DOMAIN, RelayServer
from skynet.protocol.roles import Role, check_may_send
from skynet.protocol.sockets import Port, SocketFactory
from skynet.protocol.steps import RunStep

if TYPE_CHECKING:
    from skynet.coordinator.gateway.gateway import Gateway

logger = logging.getLogger(__name__)
T = TypeVar("T")

ABSENT_S = 60.0  # an admitted process that has no control link for this long must be admitted again


async def serve(config: CoordinatorConfig) -> None:
    """Run a coordinator until SIGINT or SIGTERM."""
    if not 0.5 <= config.lease_s <= 3600:
        raise ConfigError(f"--lease-s {config.lease_s}: between 0.5 and 3600 seconds")
    config.check_name()
    config.check_hosts()
    planner, gateway = config.planner(), config.gateway()
    with sole_coordinator(config.config_dir):
        await _serve_alone(config, planner, gateway)


async def _serve_alone(config: CoordinatorConfig, planner: PlannerConfig, gateway: GatewayConfig | None) -> None:
    model = await _open_model(config)
    if planner.layout is not None and planner.layout.pipeline > model.spec.num_layers:
        raise ConfigError(f"--layout {planner.layout}: the model has {model.spec.num_layers} layers, pin fewer stages")
    if (config.context_tokens or 0) > model.spec.max_positions:
        raise ConfigError(
            f"--context {config.context_tokens}: the model takes at most {model.spec.max_positions} tokens"
        )
    running = asyncio.current_task()
    assert running is not None
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, running.cancel)
    server = CoordinatorServer(config, planner, model)
    try:
        if gateway is not None:
            server.open_gateway(gateway)
        await server.run()
    except asyncio.CancelledError:
        logger.info("coordinator stopped")
    finally:
        await server.close()


async def _open_model(config: CoordinatorConfig) -> ServedModel:
    """On a thread that ends soon after an interrupt, however large the model is."""
    cancel = threading.Event()
    try:
        return await asyncio.to_thread(
            open_model, config.model, config.dtype, config.cache_dir, config.hub_endpoint, cancel
        )
    finally:
        cancel.set()


@dataclass(slots=True)
class _Admitted:
    """A process that was let in, until its node is revoked. Filled at admission."""

    role: Role
    curve_key: bytes
    seen_host: str
    last_linked: float  # when it had a control link for the last time that we looked


class CoordinatorServer:
    """See the module. Everything it starts, `close` stops."""

    def __init__(self, config: CoordinatorConfig, planner: PlannerConfig, model: ServedModel) -> None:
        self.config = config
        self.model = model
        directory = config.config_dir
        self.swarm_key = SwarmKey.load_or_create(directory)
        self.store = Store.open(config.database or directory / "coordinator.db")
        self.store.claim(self.swarm_key.public_key, config.name)
        interfaces = local_interfaces()
        self.hosts: Sequence[str] = config.bind or listen_addresses(interfaces)
        forces_invite = must_invite(config.bind, interfaces)
        if config.admission is not None:
            self.store.set_mode(_mode(config.admission))
        self.gatekeeper = Gatekeeper(self.store, forces_invite=forces_invite)
        self._let_owner_in()
        self.process_key = ProcessKey.generate()
        self.factory = SocketFactory(self.process_key.public, self.process_key.secret)
        self.membership = Membership(lease_s=config.lease_s)
        self._admitted: dict[PeerId, _Admitted] = {}
        self._loop = asyncio.get_running_loop()
        self._news = StatusNews(self._answer)
        control = self._bind("control", 1)
        work = self._bind("work", 2)
        self.control: Switchboard[ToCoordinator] = Switchboard(
            self.factory.asynchronous(control),
            TO_COORDINATOR,
            self._on_control,
            self.factory.punish,
            self.factory.suspend,
        )
        self.work: Switchboard[WorkMessage] = Switchboard(
            self.factory.asynchronous(work),
            WORK_TO_COORDINATOR,
            self._on_work,
            self.factory.punish,
            self.factory.suspend,
        )
        self.sharing = ModelSharing(self.factory, self._bind("bulk", 3), model, config.cache_dir)
        self.relay = self._near(4, lambda port: RelayServer(self.factory, self.hosts, port))
        self.relay.start()
        self.ports = {
            "control": control.number,
            "work": work.number,
            "bulk": self.sharing.port,
            "relay": self.relay.port,
        }
        self.listener = AdmissionListener(self.swarm_key, self._admit, self.hosts, config.port)
        self.engine = Engine(
            EngineConfig(planner=planner),
            model,
            self.membership,
            transport=self,
            tell=self.tell,
            sources=lambda: (self._own_info(),),
            start_counter=self.store.next_start(),
            on_change=self._news.changed,
        )
        self.administration = Administration(self)
        self._gateway: Gateway | None = None

    def open_gateway(self, config: GatewayConfig) -> None:
        """Have `run` serve HTTP too. Raises ConfigError if its port can't be had."""
        from skynet.coordinator.gateway.gateway import Gateway  # slow to import, and not everybody wants it

        self._gateway = Gateway(config, self.engine)

    def _let_owner_in(self) -> None:
        """Whoever holds the node key beside our own keys is our owner: no invite or approval is needed for that one."""
        node_id = NodeKey.load_or_create(self.config.config_dir).node_id
        owner = Visitor(node_id=node_id, role=Role.WORKER, display_name="the coordinator's owner", source="local")
        self.store.nodes.visit(owner, time.time(), via=Via.APPROVAL)

    def _bind(self, domain: str, offset: int) -> Port:
        """A ROUTER near the port for newcomers, so that firewalls can be told."""
        bind = self.factory.bind_router
        return self._near(offset, lambda port: bind(domain, self.hosts, port, on_disconnected=self._from_guard))

    def _near(self, offset: int, listen: Callable[[int], T]) -> T:
        """Listen so many ports above the one for newcomers, or anywhere if that is taken or nobody chose one."""
        wanted = self.config.port + offset if 0 < self.config.port <= 65535 - offset else 0
        try:
            return listen(wanted)
        except ConfigError:
            if not wanted:
                raise
            logger.warning("port taken, another is used port=%d", wanted)
            return listen(0)

    async def run(self) -> None:
        """Until cancelled."""
        self.listener.start()
        hosts = expand_wildcards(self.hosts, local_interfaces())
        advertiser = Advertiser(
            self.config.name, self.swarm_key, self.listener.port, hosts, certificate=self._certificate()
        )
        if self.config.mdns:
            await advertiser.start()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self.listener.run(), name="admission")
                tasks.create_task(self.control.run(), name="control")
                tasks.create_task(self.work.run(), name="work")
                tasks.create_task(self.engine.run(), name="engine")
                tasks.create_task(self.sharing.run(), name="sharing")
                if self._gateway is not None:
                    tasks.create_task(self._gateway.run(), name="gateway")
                tasks.create_task(self.administration.run(), name="administration")
                tasks.create_task(self._news.run(), name="status")
                tasks.create_task(self._forget_absent_again_and_again(), name="forget-absent")
                self._greet()
        finally:
            await advertiser.stop()

    def _greet(self) -> None:
        """What an owner wants to know at start: where, who may enter, and the key to compare."""
        logger.info(
            "coordinator ready swarm=%s version=%s fingerprint=%s port=%d model=%s",
            self.config.name, __version__, self.swarm_key.fingerprint, self.listener.port, self.model.ref.name,
        )  # fmt: skip
        for host in self.hosts:
            logger.info("listening address=%s port=%d admits=%s", host, self.listener.port, self.gatekeeper.mode)

    async def close(self) -> None:
        """Stop everything; twice is fine."""
        await self.listener.stop()
        if self._gateway is not None:
            self._gateway.close()
        self.control.close()
        self.work.close()
        self.sharing.close()
        await asyncio.to_thread(self.relay.stop)
        self.administration.close()
        await asyncio.to_thread(self.factory.close)
        self.store.close()

    # -- admission

    async def _admit(self, hello: Hello, source: str) -> Welcome | Refused:
        interfaces = local_interfaces()
        decision = await asyncio.to_thread(self.gatekeeper.decide, hello, source, interfaces, time.time())
        if isinstance(decision, Refused):
            return decision
        if self.store.nodes.is_revoked(hello.node_id):  # revoked while we decided; from here on nothing waits
            return Refused(code="revoked", reason="this node was revoked by the swarm's owner, who alone can say why")
        self.let_in(decision, hello.certificate.curve_key)
        return decision.welcome(self._certificate(), self.ports, self.config.lease_s)

    def _certificate(self) -> CurveCertificate:
        """Our CURVE key, vouched for by the swarm's; made anew each time, since it holds for 30 days."""
        return self.process_key.certify(self.swarm_key, self.swarm_key.public_key, time.time())

    def let_in(self, decision: Admitted, curve_key: bytes) -> None:
        """Open our sockets to this process's key."""
        domains = {"control", "work", "bulk", RELAY_DOMAIN} if decision.role is Role.WORKER else {"control"}
        self.factory.allow(curve_key, decision.peer_id, domains)
        self._admitted[decision.peer_id] = _Admitted(decision.role, curve_key, decision.source, _now())
        logger.debug("let in peer=%s role=%s source=%s", decision.peer_id, decision.role, decision.source)

    def cut_off(self, node_id: str, reason: str) -> int:
        """End every membership of a node at once; how many processes that were."""
        gone = [peer for peer in self._admitted if peer.split(".")[0] == node_id]
        for peer in gone:
            self.control.send(peer, Evicted(reason=reason, is_final=True))
            del self._admitted[peer]
            self.factory.deny(peer)
            self._gone(peer, reason)
        for worker_id in self.membership.members if gone else ():
            self.control.send(PeerId(worker_id), ShutOut(peers=tuple(gone)))
        return len(gone)

    async def _forget_absent_again_and_again(self) -> None:
        while True:
            await asyncio.sleep(ABSENT_S / 4)
            self.forget_absent(_now())

    def forget_absent(self, now: float) -> None:
        """Close our sockets to processes that are gone: every client is a new one, and each had a key of its own."""
        patience_s = max(ABSENT_S, 4 * self.config.lease_s)  # an idle client says something each lease
        for peer, admitted in list(self._admitted.items()):
            if self.control.connection_of(peer) is not None:
                admitted.last_linked = now
            elif now - admitted.last_linked > patience_s:
                logger.info("forgotten peer=%s role=%s", peer, admitted.role)
                del self._admitted[peer]
                self.factory.forget(peer)

    # -- messages in

    def _on_control(self, peer: PeerId, message: ToCoordinator) -> None:
        admitted = self._admitted.get(peer)
        if admitted is None:
            return
        try:
            check_may_send(admitted.role, message.kind)
            self._dispatch(peer, admitted, message)
        except SkyNetError as exc:
            reason = foreign_text(str(exc))
            logger.warning("request refused peer=%s kind=%s reason=%s", peer, message.kind, reason)
            request_id = getattr(message, "request_id", None)
            if request_id is not None:
                self.tell(peer, Failed(request_id=request_id, error=type(exc).__name__, text=str(exc)))
            elif isinstance(exc, ProtocolError):
                self.control.send(peer, Evicted(reason=str(exc)))
        except Exception as exc:  # a bug of ours that one peer's message shows: the others are served on
            logger.exception("message not handled peer=%s kind=%s", peer, message.kind)
            request_id = getattr(message, "request_id", None)
            if request_id is not None:
                text = f"the coordinator failed at this: {exc!r}"
                self.tell(peer, Failed(request_id=request_id, error="RequestFailed", text=text))

    def _dispatch(self, peer: PeerId, admitted: _Admitted, message: ToCoordinator) -> None:
        worker_id = WorkerId(peer)
        if (
            admitted.role is Role.WORKER
            and not isinstance(message, Join)
            and not self.membership.heard(worker_id, _now())
        ):
            self.control.send(peer, Evicted(reason="not a member any more; join again"))
            return
        match message:
            case Join():
                self._join(worker_id, admitted, message)
            case Heartbeat():
                member = self.membership.members[worker_id]
                member.memory_used_bytes, member.steps_done = message.memory_used_bytes, message.steps_done
                self.control.send(peer, Pong(nonce=0))
            case Prepared() | PrepareFailed() | Linked() | LoadProgress():
                self.engine.on_worker(worker_id, message)
            case Leaving():
                self.engine.drain(worker_id)
            case ProbeReport():
                self.engine.measured(worker_id, message.links)
            case BadChunk():
                self._note_bad_chunk(worker_id, message)
            case Submit():
                self.engine.submit(message, peer)
            case Cancel():
                self.engine.cancel(peer, message.request_id)
            case GetStatus():
                self._news.ask(peer, message.request_id, self._status_text, _now(), message.newer_than)
            case GetProfiles():
                self._news.ask(peer, message.request_id, self._profiles_text, _now())
            case CreateInvite() | ListInvites() | RevokeInvite() | ListNodes() | Approve() | Revoke() | Drain():
                self._answer(peer, message.request_id, json.dumps(self.administration.carry_out(message)))
            case Ping():
                self.control.send(peer, Pong(nonce=message.nonce))
            case Pong():
                self.engine.on_pong(worker_id, message)
            case _:
                assert_never(message)

    def _join(self, worker_id: WorkerId, admitted: _Admitted, join: Join) -> None:
        if not (0 < join.data_port < 65536 and 0 < join.bulk_port < 65536):
            raise MalformedMessage(f"worker {worker_id}: ports {join.data_port} and {join.bulk_port} can't be reached")
        if worker_id in self.membership.members:
            self.engine.lost(worker_id, "joined again")
        self.membership.join(worker_id, join, admitted.curve_key, admitted.seen_host, _now())
        device, memory_gib = foreign_text(join.profile.device, 64), join.profile.memory_bytes / 2**30
        logger.info("worker joined worker=%s device=%s memory_gib=%.2f", worker_id, device, memory_gib)
        self.control.send(PeerId(worker_id), Joined(lease_s=self.config.lease_s))
        if self.work.connection_of(PeerId(worker_id)) is not None and self.membership.work_linked(worker_id):
            self.engine.joined(worker_id)

    def _note_bad_chunk(self, worker_id: WorkerId, message: BadChunk) -> None:
        culprit = self.membership.members.get(WorkerId(message.peer))
        logger.warning(
            "bad chunk reported by=%s from=%s chunk=%s",
            worker_id,
            foreign_text(message.peer, 64),
            foreign_text(message.chunk, 64),
        )
        if culprit is not None:
            culprit.bad_chunks += 1

    def _on_work(self, peer: PeerId, message: WorkMessage) -> None:
        worker_id = WorkerId(peer)
        if not self.membership.heard(worker_id, _now()):
            return  # its Join is still on its way
        if isinstance(message, Ping):
            if self.membership.work_linked(worker_id):
                self.engine.joined(worker_id)
        else:
            self.engine.on_step(worker_id, message)

    def _from_guard(self, peer: PeerId, connection: int) -> None:
        """A connection ended; called in the guard's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._disconnected, peer, connection)

    def _disconnected(self, peer: PeerId, connection: int) -> None:
        """A peer that reconnected has a newer connection, whose end this wasn't."""
        if connection in (self.control.connection_of(peer), self.work.connection_of(peer)):
            self._gone(peer, "its connection ended")

    def _gone(self, peer: PeerId, reason: str) -> None:
        self.control.forget(peer)
        self.work.forget(peer)
        self.engine.lost(WorkerId(peer), reason)
        self.engine.client_gone(peer)
        self._news.forget(peer)

    # -- messages out

    def send_control(self, worker_id: WorkerId, message: ToWorker) -> bool:
        return self.control.send(PeerId(worker_id), message)

    def send_work(self, worker_id: WorkerId, message: RunStep) -> bool:
        return self.work.send(PeerId(worker_id), message)

    def tell(self, client: PeerId, message: ToClient) -> bool:
        """False: it isn't connected or doesn't read. The engine tells it again what belongs to an answer."""
        if self._gateway is not None and self._gateway.owns(client):
            return self._gateway.tell(client, message)
        return self.control.send(client, message)

    def _answer(self, peer: PeerId, request_id: RequestId, body: str) -> None:
        self.tell(peer, Answer(request_id=request_id, body=body))

    # -- status

    def status(self) -> dict[str, Any]:
        """What `skynet status` shows."""
        return describe(self, self._news.revision)

    def _status_text(self) -> str:
        return json.dumps(self.status())

    def _profiles_text(self) -> str:
        return json.dumps(profiles(self.engine))

    def announced_hosts(self) -> tuple[str, ...]:
        """Where newcomers may find us: as the owner says, then where we listen; loopback if there is nothing else."""
        own = expand_wildcards(self.hosts, local_interfaces())
        outside = tuple(host for host in own if not ipaddress.ip_address(host).is_loopback)
        return (self.config.announce + (outside or own))[:8]

    def _own_info(self) -> PeerInfo:
        return PeerInfo(
            peer_id=COORDINATOR,
            curve_key=self.process_key.public,
            hosts=tuple(self.hosts)[:16],
            data_port=0,
            bulk_port=self.sharing.port,
        )


def _now() -> float:
    return time.monotonic()


def _mode(text: str) -> Mode:
    try:
        return Mode(text)
    except ValueError as exc:
        raise ConfigError(f"--admission {text}: use {', '.join(Mode)}") from exc
