"""A worker's agent: enters the swarm, says it lives, carries out the coordinator's orders, comes back when lost."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import assert_never

import psutil
import torch

from skynet.errors import (
    AdmissionRefused,
    AwaitingApproval,
    DiscoveryError,
    ProtocolError,
    SkyNetError,
    VersionMismatch,
    WorkerError,
)
from skynet.models.manifest import ChunkRef
from skynet.models.store.store import Progress, StoreConfig
from skynet.protocol.addresses import listen_addresses, local_interfaces
from skynet.protocol.control import ControlLink, LinkLost
from skynet.protocol.entrance import COORDINATOR, EntranceConfig, Ticket, enter
from skynet.protocol.identity import ProcessKey, PublicKey
from skynet.protocol.ids import PeerId, WorkerId
from skynet.protocol.messages import (
    TO_WORKER,
    Abort,
    BadChunk,
    Discard,
    Evicted,
    Heartbeat,
    HeldShard,
    Join,
    Joined,
    Leaving,
    Link,
    LoadProgress,
    PeerInfo,
    Ping,
    Pong,
    Prepare,
    PrepareFailed,
    Probe,
    Released,
    ShareChunks,
    ShutOut,
    ToWorker,
)
from skynet.protocol.plan import Epoch, StageAssignment
from skynet.protocol.roles import Role
from skynet.protocol.sockets import SocketFactory
from skynet.worker.compute import Attach, ComputeThread, Drop, Dropped, Ended, Install, LinkUp, MeasureLinks, Report
from skynet.worker.device import device_name, lending, measure_profile, pick_device
from skynet.worker.loader import Loader
from skynet.worker.machine import bindable, claimed_suffix, host_id
from skynet.worker.progress import LoadBars
from skynet.worker.sharing import ChunkSharing
from skynet.worker.stage.heap import return_freed_memory
from skynet.worker.welcomed import Welcomed

logger = logging.getLogger(__name__)

PROGRESS_S = 0.25  # between two reports of loading progress
RETRY_S = (0.1, 2.0)  # first and longest pause between two tries to enter again


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """What a worker lends and to whom. None: choose something sensible and say what."""

    device: str | None = None
    threads: int | None = None
    memory_bytes: int | None = None  # the most this process takes, all in all
    name: str | None = None
    coordinator: str | None = None
    swarm: str | None = None
    invite: str | None = None
    listen: tuple[str, ...] = ()
    is_experimental: bool = False
    config_dir: Path
    cache_dir: Path
    hub_endpoint: str | None = None
    show_progress: bool = False  # bars on stderr while loading


async def serve(config: WorkerConfig) -> None:
    """Run a worker until it is told to stop, has left, or may not come back."""
    agent = Agent(config)
    loop = asyncio.get_running_loop()
    running = asyncio.current_task()
    assert running is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, agent.interrupt, running)
    try:
        await agent.run()
    except asyncio.CancelledError:
        logger.info("worker stopped at once")
    finally:
        await agent.close()


class Agent:
    """See the module. Owns the compute thread, the sockets' factory and every task of the process."""

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        self._device = pick_device(config.device, config.is_experimental)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self._stack = contextlib.ExitStack()
        self._suffix = self._stack.enter_context(
            claimed_suffix(
                config.config_dir, config.name or str(self._device).replace(":", "-"), config.name is not None
            )
        )
        self._process_key = ProcessKey.generate()
        self._factory = SocketFactory(self._process_key.public, self._process_key.secret)
        self._welcome = Welcomed(self._factory)
        self._hosts = tuple(dict.fromkeys((*config.listen, *listen_addresses(local_interfaces()))))
        self._loop = asyncio.get_running_loop()
        self._compute = ComputeThread(self._factory, bindable(self._hosts), self._device, config.threads, self._report)
        self._link: ControlLink[ToWorker] | None = None
        self._swarm_key: PublicKey | None = None  # of the swarm we were in: we come back to no other
        self._loads: dict[Epoch, tuple[Prepare, threading.Event]] = {}
        self._held: HeldShard | None = None  # what served last, as long as its weights are in memory
        self._loading = asyncio.Lock()
        self._bars = LoadBars(config.show_progress)
        self._tasks: set[asyncio.Task[None]] = set()
        self._failed: asyncio.Future[None] = self._loop.create_future()  # a task or thread that should go on
        self._interrupts = 0
        self._is_released = False
        self._lease_s = 4.0

    async def run(self) -> None:
        """Enter, serve, come back when the coordinator was lost; until released or refused for good.

        Raises WorkerError as soon as a task or the compute thread has ended that should have gone on.
        """
        logger.info("device chosen device=%s name=%s", self._device, device_name(self._device))
        lent = lending(self._device, self._config.memory_bytes)
        self._profile = await asyncio.to_thread(measure_profile, self._device, lent, host_id())
        self._data_port = await asyncio.to_thread(self._compute.start)
        store = StoreConfig(cache_dir=self._config.cache_dir)
        self._sharing = ChunkSharing(self._factory, bindable(self._hosts), store, self._on_bad_sender)
        self._loader = Loader(self._device, store, self._sharing, self._config.hub_endpoint)
        self._spawn(self._sharing.run(), "sharing")
        membership = asyncio.create_task(self._be_member_until_released(), name="membership")
        try:
            await asyncio.wait({membership, self._failed}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            membership.cancel()
            await asyncio.gather(membership, return_exceptions=True)
        if self._failed.done():
            self._failed.result()
        membership.result()

    async def close(self) -> None:
        """Stop everything; twice is fine."""
        for _, cancel in self._loads.values():
            cancel.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._link is not None:
            await self._link.close()
        await asyncio.to_thread(self._compute.stop)
        if hasattr(self, "_sharing"):
            await self._sharing.close()
        await asyncio.to_thread(self._factory.close)
        self._stack.close()

    def interrupt(self, running: asyncio.Task[None]) -> None:
        """First Ctrl-C: take leave. Second: exit at once."""
        self._interrupts += 1
        if self._interrupts == 1 and self._link is not None and self._link.is_open:
            logger.info("leaving: moving work elsewhere; press Ctrl-C again to exit at once")
            self._link.send(Leaving())
        else:
            running.cancel()

    # -- membership

    async def _be_member_until_released(self) -> None:
        pause_s, is_first = RETRY_S[0], True
        while not self._is_released:
            try:
                ticket = await self._enter()
            except (DiscoveryError, AwaitingApproval, OSError) as exc:
                if is_first and not isinstance(exc, AwaitingApproval):
                    raise
                logger.info("not admitted yet, trying again reason=%s", exc)
            except (AdmissionRefused, VersionMismatch):
                raise
            except ProtocolError as exc:
                if is_first:
                    raise
                logger.warning("admission failed, trying again reason=%s", exc)
            else:
                pause_s, is_first = RETRY_S[0], False
                try:
                    await self._be_member(ticket)
                except LinkLost as lost:
                    logger.warning("coordinator lost, coming back reason=%s", lost)
            if self._interrupts:
                return
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, RETRY_S[1])

    async def _enter(self) -> Ticket:
        config = self._config
        entrance = EntranceConfig(
            coordinator=config.coordinator,
            swarm=config.swarm,
            swarm_key=self._swarm_key,
            invite=config.invite,
            config_dir=config.config_dir,
        )
        ticket = await enter(entrance, Role.WORKER, self._suffix, self._process_key)
        self._swarm_key = ticket.swarm_key
        if ticket.is_first_visit:
            logger.info("first visit swarm=%s fingerprint=%s", ticket.welcome.swarm_name, ticket.fingerprint)
        return ticket

    async def _be_member(self, ticket: Ticket) -> None:
        """One membership, from Join to the loss of the link. Raises LinkLost."""
        self._worker_id = WorkerId(ticket.welcome.peer_id)
        self._lease_s = ticket.welcome.lease_s
        self._welcome.nobody()
        # Before the links are opened: a key that replaces another one cuts what is open.
        self._factory.allow(ticket.welcome.coordinator.curve_key, COORDINATOR, {"bulk"})
        self._link = await ControlLink.open(ticket, TO_WORKER, self._factory)
        self._ticket = ticket
        self._compute.order(
            Attach(ticket.endpoint("work"), ticket.endpoint("relay"), ticket.welcome.coordinator.curve_key, COORDINATOR)
        )
        self._join()
        beating = self._spawn(self._beat(), "heartbeat")
        try:
            while not self._is_released:
                self._on_message(await self._link.receive())
        finally:
            beating.cancel()
            for epoch in list(self._loads):
                self._discard(epoch)
            await self._link.close()

    def _join(self) -> None:
        assert self._link is not None
        self._link.send(
            Join(
                profile=self._profile,
                hosts=self._hosts[:16],
                data_port=self._data_port,
                bulk_port=self._sharing.port,
                pid=os.getpid(),
                held=self._held,
            )
        )

    async def _beat(self) -> None:
        process = psutil.Process()
        while True:
            self._send(
                Heartbeat(memory_used_bytes=process.memory_info().rss, steps_done=self._compute.stats.steps_done)
            )
            await asyncio.sleep(self._lease_s / 4)

    def _on_message(self, message: ToWorker) -> None:
        match message:
            case Joined():
                self._lease_s = message.lease_s
                logger.info("worker ready worker=%s lease_s=%.1f", self._worker_id, message.lease_s)
            case Prepare():
                self._prepare(message)
            case Link():
                self._link_up(message.epoch)
            case Abort():
                self._compute.abort(message.epoch)
            case Discard():
                self._discard(message.epoch)
                if self._held is not None and self._held.epoch == message.epoch:
                    self._held = None  # the coordinator wants it no more
            case ShareChunks():
                self._welcome.to_fetch(message.peers, time.monotonic())
            case ShutOut():
                self._welcome.shut_out(message.peers)
            case Probe():
                self._welcome.to_measure(message.peers, time.monotonic())
                self._compute.order(MeasureLinks(message.peers, message.measures, WorkerId(self._worker_id)))
            case Released():
                logger.info("released: nothing depends on this worker any more")
                self._is_released = True
            case Evicted():
                if message.is_final:
                    raise AdmissionRefused(f"the coordinator ended this membership: {message.reason}")
                raise LinkLost(f"evicted: {message.reason}")
            case Ping():
                self._send(Pong(nonce=message.nonce, busy=self._compute.doing.told()))
            case Pong():
                pass
            case _:
                assert_never(message)

    def _send(self, message: object) -> None:
        if self._link is not None:
            self._link.send(message)

    def _report(self, report: Report) -> None:
        """From the compute thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closing
            match report:
                case Dropped():
                    self._loop.call_soon_threadsafe(self._dropped)
                case Ended():
                    self._loop.call_soon_threadsafe(self._fail, "the compute thread ended")
                case _:
                    self._loop.call_soon_threadsafe(self._send, report)

    # -- shards

    def _prepare(self, order: Prepare) -> None:
        if order.epoch in self._loads:
            return  # sent twice
        cancel = threading.Event()
        self._loads[order.epoch] = (order, cancel)
        self._welcome.only((o for o, _ in self._loads.values()), time.monotonic())
        self._spawn(self._load(order, cancel), f"load-{order.epoch}")

    def _link_up(self, epoch: Epoch) -> None:
        """Everyone has loaded: from now on this is what we hold."""
        if epoch in self._loads:
            order = self._loads[epoch][0]
            self._held = HeldShard(epoch=epoch, digest=order.model.digest, assignment=order.assignment)
        self._compute.order(LinkUp(epoch))

    async def _load(self, order: Prepare, cancel: threading.Event) -> None:
        """One load at a time, on a thread; what goes wrong is told, and the worker stays."""
        reported = 0.0

        def on_progress(progress: Progress) -> None:
            nonlocal reported
            now = time.monotonic()
            if now - reported >= PROGRESS_S or progress.bytes_done == progress.bytes_total:
                reported = now
                self._loop.call_soon_threadsafe(self._progress, order.epoch, progress)

        started = time.monotonic()
        try:
            async with self._loading, self._sharing.sources([self._reachable(peer) for peer in order.sources]):
                self._keep_only([o for o, _ in self._loads.values()])
                stage = await asyncio.to_thread(self._loader.load, order, cancel, on_progress)
        except Exception as exc:  # whatever it is: unsaid, the coordinator would wait for us
            if order.epoch in self._loads:
                logger.error("shard not loaded epoch=%s reason=%s", order.epoch, exc, exc_info=not _is_foreseen(exc))
                reason = str(exc) if _is_foreseen(exc) else repr(exc)
                self._send(PrepareFailed(epoch=order.epoch, reason=reason[:1000]))
            return
        finally:
            self._bars.end(order.epoch)
        if order.epoch not in self._loads:
            return  # discarded meanwhile
        logger.info(
            "shard loaded epoch=%s layers=%d-%d rank=%d/%d mib=%.1f seconds=%.2f",
            order.epoch, order.assignment.layers.start, order.assignment.layers.end - 1, order.assignment.rank,
            len(order.assignment.group), stage.weight_bytes / 2**20, time.monotonic() - started,
        )  # fmt: skip
        self._compute.order(Install(order.epoch, order.assignment, stage, order.peers))

    def _keep_only(self, orders: Sequence[Prepare]) -> None:
        """Forget weights that none of these orders needs."""
        self._loader.keep_only(orders)
        held = self._held
        if held is not None and not any(
            order.model.digest == held.digest and is_same_shard(order.assignment, held.assignment) for order in orders
        ):
            self._held = None

    def _reachable(self, peer: PeerInfo) -> PeerInfo:
        """The coordinator is asked at the address where we found it; others at their first."""
        return dataclasses.replace(peer, hosts=(self._ticket.host,)) if peer.peer_id == COORDINATOR else peer

    def _on_bad_sender(self, peer_id: PeerId, chunk: ChunkRef) -> None:
        """From a loader thread: tell who sent bytes that don't match their hash."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._send, BadChunk(peer=peer_id, chunk=chunk.digest.hex()))

    def _progress(self, epoch: Epoch, progress: Progress) -> None:
        if epoch not in self._loads:
            return
        self._bars.update(epoch, progress)
        self._send(
            LoadProgress(
                epoch=epoch,
                bytes_done=progress.bytes_done,
                bytes_total=progress.bytes_total,
                bytes_by_source={str(kind): n for kind, n in progress.bytes_by_source.items()},
            )
        )

    def _discard(self, epoch: Epoch) -> None:
        """Free what an epoch holds; without another that serves its weights stay, in case the next needs them again."""
        held = self._loads.pop(epoch, None)
        if held is not None:
            held[1].set()
        self._compute.abort(epoch)
        self._compute.order(Drop(epoch))

    def _dropped(self) -> None:
        """An epoch is over while another serves: what that one doesn't need goes back to the system."""
        if self._held is not None and self._held.epoch in self._loads:
            self._spawn(self._tidy_up(), "tidy-up")

    async def _tidy_up(self) -> None:
        async with self._loading:
            await asyncio.to_thread(self._loader.keep_only, [order for order, _ in self._loads.values()])
            await asyncio.to_thread(return_freed_memory)

    def _spawn(self, work: object, name: str) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.ensure_future(work)  # type: ignore[call-overload]
        task.set_name(name)
        self._tasks.add(task)
        task.add_done_callback(self._has_ended)
        return task

    def _has_ended(self, task: asyncio.Task[None]) -> None:
        """A task that failed ends the worker, with the reason: half a worker would serve nobody."""
        self._tasks.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            logger.error("task failed task=%s", task.get_name(), exc_info=exc)
            self._fail(f"{task.get_name()} ended ({exc!r})")

    def _fail(self, what: str) -> None:
        """`run` ends with this; the first counts."""
        if not self._failed.done():
            self._failed.set_exception(WorkerError(f"{what}, the log says why; start this worker again"))
            self._failed.exception()  # seen: while closing nobody else looks


def is_same_shard(a: StageAssignment, b: StageAssignment) -> bool:
    """Whether both have the same weights."""
    return (a.layers, a.num_layers, a.share, a.dtype) == (b.layers, b.num_layers, b.share, b.dtype)


def _is_foreseen(exc: Exception) -> bool:
    return isinstance(exc, SkyNetError | OSError)
