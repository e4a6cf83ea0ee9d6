"""The compute thread: owns the model, the KV cache and the data-plane sockets of one device, and blocks on them.

It does one thing at a time: run a step, or carry out an order from the agent. The agent's thread talks to it by `order`
(a bounded queue and a wake-up) and `abort`, which ends any wait at once; it answers by `report`, in its own thread.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
import zmq

from skynet.errors import ConfigError, Nonsense, ProtocolError, SkyNetError, StepAborted, StepRejected, WorkerError
from skynet.protocol.channel import DataChannel
from skynet.protocol.codec import Decoder, encode
from skynet.protocol.ids import PeerId, WorkerId
from skynet.protocol.messages import WORK_TO_WORKER, Linked, PeerInfo, Ping, Prepared, ProbeReport
from skynet.protocol.plan import Epoch, StageAssignment
from skynet.protocol.profile import LinkProfile
from skynet.protocol.sockets import Port, SocketFactory
from skynet.protocol.steps import RunStep, StepDone, StepFailed
from skynet.worker.doing import Doing, WatchedGroup
from skynet.worker.stage.sampler import Sampled
from skynet.worker.stage.stage import Stage
from skynet.worker.zmq_group import ZmqGroup, recv_hidden, send_hidden

logger = logging.getLogger(__name__)

MAX_ORDERS: Final = 256
MEASURE_S: Final = 4.0  # for all links of one order
FAST_BYTES_PER_S: Final = 50e6  # faster links are measured with more bytes: slow ones would keep work waiting
IDLE_S: Final = 3600.0  # a wait for work; orders and aborts end it
LINK_S: Final = 5.0  # to open the links of an epoch


@dataclass(frozen=True, slots=True)
class Attach:
    """Take work from this coordinator (again)."""

    work_endpoint: str
    relay_endpoint: str
    key: bytes
    peer_id: PeerId


@dataclass(frozen=True, slots=True)
class Install:
    """Serve this shard in this epoch, with these peers."""

    epoch: Epoch
    assignment: StageAssignment
    stage: Stage
    peers: tuple[PeerInfo, ...]


@dataclass(frozen=True, slots=True)
class LinkUp:
    """Open the links of an installed epoch."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class MeasureLinks:
    """Link with these peers, and measure if it is our turn."""

    peers: tuple[PeerInfo, ...]
    measures: bool
    own_id: WorkerId


@dataclass(frozen=True, slots=True)
class Drop:
    """Free what this epoch holds."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Stop:
    """End the thread."""


Order = Attach | Install | LinkUp | MeasureLinks | Drop | Stop


@dataclass(frozen=True, slots=True)
class Dropped:
    """What this epoch held is free; said to the agent alone."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Ended:
    """The thread ends, asked to or not; the last that the agent hears of it."""


Report = Prepared | Linked | ProbeReport | Dropped | Ended


@dataclass(slots=True)
class _Epoch:
    """An installed shard. Owned by the compute thread."""

    install: Install
    group: ZmqGroup
    watched: WatchedGroup  # the same, told of
    is_aborted: bool = False
    next_step: int = 0


@dataclass(slots=True)
class ComputeStats:
    """Counters; written by the compute thread, read by anyone."""

    steps_done: int = 0
    tokens_done: int = 0
    busy_s: float = 0.0


class ComputeThread:
    """See the module. `report` is called from the compute thread and must not block."""

    def __init__(
        self,
        factory: SocketFactory,
        bind_addresses: Sequence[str],
        device: torch.device,
        num_threads: int | None,
        report: Callable[[Report], None],
    ) -> None:
        self._factory = factory
        self._bind_addresses = bind_addresses
        self._device = device
        self._num_threads = num_threads
        self._report = report
        self._orders: queue.Queue[Order] = queue.Queue(MAX_ORDERS)
        self._aborted: set[Epoch] = set()
        self._linked: set[PeerId] = set()
        self._epochs: dict[Epoch, _Epoch] = {}
        self._work: Port | None = None
        self._decoder = Decoder(*WORK_TO_WORKER)
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self.stats = ComputeStats()
        self.doing = Doing()
        self.channel: DataChannel | None = None
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)

    # -- called from other threads

    def start(self) -> int:
        """Start; returns the data port."""
        self._thread.start()
        self._started.wait(30)
        if self._failure is not None:
            raise self._failure
        return self._open_channel.port

    def order(self, order: Order) -> None:
        """Queue an order and wake the thread; never waits. Raises WorkerError if it takes no orders any more."""
        try:
            self._orders.put_nowait(order)
        except queue.Full:
            raise WorkerError(
                f"the compute thread hangs: {MAX_ORDERS} orders wait for it; start this worker again"
            ) from None
        if self.channel is not None:
            self.channel.wake()

    def abort(self, epoch: Epoch) -> None:
        """Leave every step of this epoch now."""
        self._aborted.add(epoch)
        if self.channel is not None:
            self.channel.abort(epoch)

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the thread; twice is fine."""
        if self._thread.is_alive():
            for epoch in list(self._epochs):
                self.abort(epoch)
            with contextlib.suppress(WorkerError):
                self.order(Stop())
            self._thread.join(timeout_s)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def _open_channel(self) -> DataChannel:
        assert self.channel is not None
        return self.channel

    # -- the compute thread

    def _run(self) -> None:
        logger.debug("compute thread runs tid=%d", threading.get_native_id())
        try:
            if self._num_threads is not None:
                torch.set_num_threads(self._num_threads)
            self.channel = DataChannel(self._factory, self._bind_addresses)
        except BaseException as exc:
            self._failure = exc
            raise
        finally:
            self._started.set()
        try:
            with torch.inference_mode():
                while self._turn():
                    pass
        finally:
            self._report(Ended())
            self._detach()
            self._open_channel.close()

    def _turn(self) -> bool:
        """Carry out waiting orders, then wait for work and do it. False: stop."""
        while True:
            try:
                order = self._orders.get_nowait()
            except queue.Empty:
                break
            if isinstance(order, Stop):
                return False
            try:
                self._carry_out(order)
            except SkyNetError as exc:
                logger.warning("order failed order=%s reason=%s", type(order).__name__, exc)
            except Exception:  # a bug of ours, or a library's surprise: this thread must outlive it
                logger.exception("order failed order=%s", type(order).__name__)
        self._note_aborts()
        try:
            sockets = [self._work.socket] if self._work is not None else []
            if self._open_channel.wait(sockets, time.monotonic() + IDLE_S) and self._work is not None:
                self._take_work(self._work)
        except StepAborted:
            pass
        return True

    def _note_aborts(self) -> None:
        for epoch in list(self._aborted):
            self._aborted.discard(epoch)
            held = self._epochs.get(epoch)
            if held is not None:
                held.is_aborted = True

    def _carry_out(self, order: Order) -> None:
        match order:
            case Attach():
                self._detach()
                self._work = self._factory.connect_dealer(order.work_endpoint, order.key, order.peer_id)
                self._open_channel.use_relay(order.relay_endpoint, order.key, order.peer_id)
                self._work.socket.send_multipart(encode(Ping(nonce=0)))
            case Install():
                self._install(order)
            case LinkUp():
                self._link(order.epoch)
            case MeasureLinks():
                self._measure(order)
            case Drop():
                self._drop(order.epoch)
            case Stop():
                raise AssertionError("handled by the loop")

    def _detach(self) -> None:
        if self._work is not None:
            self._work.close()
            self._work = None

    def _install(self, order: Install) -> None:
        assignment = order.assignment
        group = ZmqGroup(self._open_channel, [PeerId(w) for w in assignment.group], assignment.rank, order.epoch)
        others = [PeerId(w) for rank, w in enumerate(assignment.group) if rank != assignment.rank]
        self._epochs[order.epoch] = _Epoch(order, group, WatchedGroup(group, others, self.doing))
        self._report(Prepared(epoch=order.epoch, weight_bytes=order.stage.weight_bytes, kv_bytes=order.stage.kv_bytes))

    def _link(self, epoch: Epoch) -> None:
        """Open links to the ranks this one talks to; report who is relayed and who can't be reached at all."""
        held = self._epochs.get(epoch)
        if held is None:
            return
        assignment = held.install.assignment
        wanted = {*assignment.group, *assignment.downstream, *([assignment.upstream] if assignment.upstream else [])}
        relayed: list[PeerId] = []
        unreachable: list[PeerId] = []
        deadline = time.monotonic() + LINK_S
        for peer in held.install.peers:
            if peer.peer_id not in {PeerId(w) for w in wanted}:
                continue
            try:
                addresses = [(host, peer.data_port) for host in peer.hosts]
                self._linked.add(peer.peer_id)
                self._open_channel.connect(peer.peer_id, peer.curve_key, addresses, deadline)
            except (WorkerError, ConfigError) as exc:  # ConfigError: an address that can't be one
                logger.warning("peer unreachable peer=%s reason=%s", peer.peer_id, exc)
                unreachable.append(peer.peer_id)
            else:
                if self._open_channel.path(peer.peer_id) == "relayed":
                    relayed.append(peer.peer_id)
        self._report(Linked(epoch=epoch, relayed=tuple(relayed), unreachable=tuple(unreachable)))

    def _measure(self, order: MeasureLinks) -> None:
        """Unreachable peers are left out. The other side, idle or between steps, answers from its own waits."""
        channel = self._open_channel
        for peer in order.peers:
            self._linked.add(peer.peer_id)
            try:
                channel.dial(peer.peer_id, peer.curve_key, [(host, peer.data_port) for host in peer.hosts])
            except ConfigError as exc:  # an address that can't be one
                logger.warning("peer unreachable peer=%s reason=%s", peer.peer_id, exc)
        if not order.measures:
            return
        deadline = time.monotonic() + MEASURE_S
        links = []
        for peer in order.peers:
            try:
                channel.await_links([peer.peer_id], deadline)
                probed = channel.probe(peer.peer_id, deadline, num_bytes=1 << 20)
                if probed.bandwidth_bytes_per_s > FAST_BYTES_PER_S:
                    wide = channel.probe(peer.peer_id, deadline, num_round_trips=1, num_bytes=4 << 20)
                    probed = probed._replace(bandwidth_bytes_per_s=wide.bandwidth_bytes_per_s)
            except WorkerError as exc:
                logger.info("link not measured peer=%s reason=%s", peer.peer_id, exc)
                continue
            a, b = sorted((order.own_id, WorkerId(peer.peer_id)))
            links.append(
                LinkProfile(
                    a=a,
                    b=b,
                    round_trip_s=probed.round_trip_s,
                    bandwidth_bytes_per_s=probed.bandwidth_bytes_per_s,
                    is_relayed=channel.path(peer.peer_id) == "relayed",
                )
            )
        self._report(ProbeReport(links=tuple(links)))

    def _drop(self, epoch: Epoch) -> None:
        is_held = self._epochs.pop(epoch, None) is not None
        self._open_channel.retire(epoch)  # also one that never got here: it may have been aborted
        if not is_held:
            return
        needed = {
            PeerId(w) for held in self._epochs.values() for stage in held.install.assignment.stages for w in stage
        }
        for peer_id in self._linked - needed:
            self._open_channel.disconnect(peer_id)
        self._linked &= needed
        self._report(Dropped(epoch))

    # -- steps

    def _take_work(self, work: Port) -> None:
        received = work.receive(zmq.NOBLOCK)
        if received is None:
            return
        try:
            step, _ = self._decoder.decode([f.buffer for f in received.frames])
        except ProtocolError as exc:
            logger.warning("work refused reason=%s", exc)
            return
        reply = self._step(step)
        if reply is not None:
            try:
                work.socket.send_multipart(encode(reply), zmq.NOBLOCK)
            except zmq.Again:
                logger.warning("result dropped: the coordinator doesn't read epoch=%s step=%d", step.epoch, step.step)
        if isinstance(reply, StepFailed) and reply.is_nonsense and reply.suspect is not None:
            self._shut_out(PeerId(reply.suspect))

    def _shut_out(self, peer_id: PeerId) -> None:
        """Close the link to one that sent nonsense, once that is told; only another epoch links with it again."""
        logger.warning("link closed peer=%s reason=it sent nonsense", peer_id)
        self._open_channel.disconnect(peer_id)
        self._linked.discard(peer_id)

    def _step(self, step: RunStep) -> StepDone | StepFailed | None:
        """Run one step; what to tell the coordinator, if anything. Whatever it raises, the thread goes on."""
        held = self._epochs.get(step.epoch)
        if held is None or held.is_aborted:
            return None  # a frame of an epoch that is over
        started = time.perf_counter()
        self.doing.begin(step.epoch, step.step)
        try:
            sampled = self._forward(held, step)
        except StepAborted:
            held.is_aborted = True
            return None
        except Nonsense as exc:
            return _failed(step, exc, suspect=exc.sender)
        except WorkerError as exc:
            return _failed(step, exc)
        except Exception as exc:  # torch's own, or a bug of ours
            logger.exception("step failed epoch=%s step=%d", step.epoch, step.step)
            return _failed(step, exc)
        finally:
            self.doing.end()
            self.stats.busy_s += time.perf_counter() - started
        self.stats.steps_done += 1
        self.stats.tokens_done += sum(len(part.token_ids) for part in step.parts)
        if sampled is None:
            return None
        return StepDone(epoch=step.epoch, step=step.step, token_ids=sampled.token_ids, logprobs=sampled.logprobs)

    def _forward(self, held: _Epoch, step: RunStep) -> Sampled | None:
        if step.step < held.next_step:
            raise StepRejected(f"step {step.step} of epoch {step.epoch} came again")
        held.next_step = step.step + 1
        assignment, stage, group = held.install.assignment, held.install.stage, held.group
        group.begin_step(step.step, step.timeout_s)
        deadline = time.monotonic() + step.timeout_s
        hidden = None
        if assignment.upstream is not None:
            num_tokens = sum(len(part.token_ids) for part in step.parts)
            like = torch.empty((num_tokens, stage.hidden_size), dtype=stage.dtype)
            upstream = PeerId(assignment.upstream)
            with self.doing.waiting((upstream,)):
                hidden = recv_hidden(self._open_channel, upstream, step.epoch, step.step, like, deadline)
        result = stage.run(step, hidden, held.watched)
        if isinstance(result, torch.Tensor):
            peers = [PeerId(peer) for peer in assignment.downstream]
            with self.doing.waiting(peers):
                send_hidden(self._open_channel, peers, step.epoch, step.step, result, deadline)
            return None
        return result


def _failed(step: RunStep, exc: Exception, suspect: str | None = None) -> StepFailed:
    """`suspect` sent nonsense."""
    reason = f"{type(exc).__name__}: {exc}"[:1000]
    return StepFailed(epoch=step.epoch, step=step.step, reason=reason, suspect=suspect, is_nonsense=suspect is not None)
