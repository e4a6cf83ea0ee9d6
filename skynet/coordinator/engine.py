"""Serves one model on the members of a swarm: plans, prepares replicas, runs their steps, moves answers between them.

Two kinds of task: `_converge` brings the replicas in line with the plan whenever membership changes, and one `_serve`
per replica runs its steps. Sequences live in exactly one place: the queue (no replica can run them) or a replica's
scheduler. A fault anywhere ends an epoch, never a request: the sequences go back to the queue with the token ids they have.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from skynet.coordinator.leases import Lease, LeaseKind, LeaseTable
from skynet.coordinator.membership import Membership, WorkerState
from skynet.coordinator.planner import Plan, PlannerConfig, ReplicaPlan, plan
from skynet.coordinator.replica import Phase, Replica, ReplicaFault, Transport
from skynet.coordinator.requests import FinishReason, Request, RequestTable, end_of_answer, node_of
from skynet.coordinator.scheduler import Scheduler, SchedulerConfig, Sequence
from skynet.coordinator.served import ServedModel
from skynet.coordinator.text import AnswerText
from skynet.errors import CapacityError, RequestFailed, SkyNetError
from skynet.protocol.entrance import COORDINATOR
from skynet.protocol.ids import LeaseId, PeerId, RequestId, SequenceId, WorkerId
from skynet.protocol.messages import (
    Evicted,
    Failed,
    Finished,
    Linked,
    LoadProgress,
    Notice,
    PeerInfo,
    Ping,
    Prepare,
    Prepared,
    PrepareFailed,
    Probe,
    Released,
    Submit,
    ToClient,
    Tokens,
)
from skynet.protocol.plan import Epoch, StageAssignment
from skynet.protocol.profile import LinkProfile, WorkerProfile
from skynet.protocol.steps import SequencePart, StepDone, StepFailed

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How patient the engine is, and how much it takes on."""

    planner: PlannerConfig
    step_floor_s: float = 2.0  # a step may always take this long before its ranks are asked whether they live
    step_slack: float = 8.0  # and this many times what the plan predicts
    hard_step_s: float = 120.0  # however slow the machines are, a step ends by then
    ping_s: float = 1.0  # a worker that doesn't answer within this, when a step is late, is lost
    max_faults: int = 4  # a request whose steps fail this often in a row, with no worker lost, ends with an error
    max_probes: int = 64  # links measured before one plan
    probe_s: float = 3.0  # how long to wait for measurements
    warm_tokens: int = 64  # of running answers that one step builds in a new epoch, while the old one waits
    settle_s: float = 0.25  # workers that start together join together: wait this long before the first plan
    tick_s: float = 0.25  # how often leases and deadlines are looked at
    silence_s: float = 30.0  # loading without progress for this long is a fault
    orphan_s: float = 15.0  # an answer whose client is gone is kept for this long
    max_requests: int = 512  # running and waiting; more are refused at once


class Engine:
    """See the module. Everything runs on one event loop; nothing here blocks it."""

    def __init__(
        self,
        config: EngineConfig,
        model: ServedModel,
        membership: Membership,
        transport: Transport,
        tell: Callable[[PeerId, ToClient], None],
        sources: Callable[[], tuple[PeerInfo, ...]],
        start_counter: int,
        on_change: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.model = model
        self.membership = membership
        self.requests = RequestTable()
        self.replicas: list[Replica] = []
        self.plan: Plan | None = None
        self.shortage: CapacityError | None = CapacityError("no worker has joined yet")
        self.leases = LeaseTable()
        self._preparing: list[Replica] = []
        self._queue: list[Sequence] = []
        self._transport = transport
        self._tell = tell
        self._sources = sources
        self._clock = clock
        self._start_counter = start_counter
        self._on_change = on_change
        self._epochs = itertools.count(1)
        self._sequence_ids = itertools.count(1)
        self._changed = asyncio.Event()
        self._measured = asyncio.Event()
        self._probed: set[tuple[WorkerId, WorkerId]] = set()  # asked for once; forgotten with either worker
        self._has_served = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._pongs: dict[WorkerId, asyncio.Event] = {}

    @property
    def num_queued(self) -> int:
        """Sequences that no replica can run."""
        return len(self._queue)

    async def run(self) -> None:
        """Until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._converge(), name="converge")
                tasks.create_task(self._watch(), name="watch")
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- membership

    def joined(self, worker_id: WorkerId) -> None:
        """A worker is there: it lends its memory; plan anew."""
        member = self.membership.members[worker_id]
        self.leases.lend(worker_id, {"memory_bytes": member.join.profile.memory_bytes})
        self.members_changed()

    def drain(self, worker_id: WorkerId) -> None:
        """Move a worker's work elsewhere, then let it go."""
        if self.membership.drain(worker_id):
            logger.info("worker drains worker=%s", worker_id)
            self.members_changed()

    def measured(self, worker_id: WorkerId, links: Iterable[LinkProfile]) -> None:
        """A worker measured its links; only what it can know counts."""
        self.membership.measured(link for link in links if worker_id in (link.a, link.b))
        self._measured.set()

    def members_changed(self) -> None:
        """Plan anew."""
        self._changed.set()
        self._on_change()

    def lost(self, worker_id: WorkerId, reason: str) -> None:
        """A worker is gone. Its replicas break at once; `_converge` replaces them."""
        member = self.membership.remove(worker_id)
        if member is None:
            return
        logger.warning("worker lost worker=%s reason=%s", worker_id, reason)
        self._probed = {pair for pair in self._probed if worker_id not in pair}
        self.leases.vanished(worker_id)
        for replica in [*self.replicas, *self._preparing]:
            if worker_id in replica.workers:
                replica.fail(ReplicaFault(f"{worker_id} is gone: {reason}", frozenset({worker_id})))
        self.members_changed()

    def on_worker(self, worker_id: WorkerId, message: Prepared | PrepareFailed | Linked | LoadProgress) -> None:
        """What a worker says about an epoch; words about epochs that are over fall on the floor."""
        replica = next((r for r in [*self.replicas, *self._preparing] if r.epoch == message.epoch), None)
        if replica is None or worker_id not in replica.workers:
            return
        match message:
            case Prepared():
                member = self.membership.members[worker_id]
                member.loading, member.weight_bytes, member.kv_bytes = None, message.weight_bytes, message.kv_bytes
                replica.on_prepared(worker_id, message)
            case PrepareFailed():
                self.membership.members[worker_id].loading = None
                replica.on_prepared(worker_id, message)
            case Linked():
                replica.on_linked(worker_id, message)
            case LoadProgress():
                self.membership.members[worker_id].loading = message
                self._on_change()
                replica.progressed.set()

    def on_step(self, worker_id: WorkerId, message: StepDone | StepFailed) -> None:
        for replica in [*self.replicas, *self._preparing]:
            if replica.epoch == message.epoch and worker_id in replica.workers:
                replica.on_work(worker_id, message)

    def on_pong(self, worker_id: WorkerId) -> None:
        if worker_id in self._pongs:
            self._pongs[worker_id].set()

    # -- requests

    def submit(self, submit: Submit, client: PeerId) -> None:
        """Start a request, or go on with one that was begun. Refusals are told to the client."""
        try:
            self._submit(submit, client)
        except (SkyNetError, ValueError) as exc:
            self._tell(client, Failed(request_id=submit.request_id, error=type(exc).__name__, text=str(exc)))

    def _submit(self, submit: Submit, client: PeerId) -> None:
        known = self.requests.find(node_of(client), submit.request_id)
        if known is not None:
            self._resume(known, submit, client)
            return
        if len(self.requests.by_id) >= self.config.max_requests:
            raise CapacityError(
                f"{len(self.requests.by_id)} requests are in progress, at most that many run; try again later"
            )
        prompt_ids = self.model.prompt_ids(submit)
        limit = self.model.spec.max_positions
        if len(prompt_ids) + 1 > limit:
            raise CapacityError(f"the prompt has {len(prompt_ids)} tokens, the model takes at most {limit - 1}")
        text = self.model.answer_text(submit, prompt_ids)
        for token_id in submit.received:
            text.push(token_id)
        max_tokens = min(submit.max_tokens, limit - len(prompt_ids))
        eos_ids = frozenset() if submit.ignore_eos else self.model.eos_ids
        if reason := end_of_answer(submit.received, text, eos_ids, max_tokens):
            self._tell_end(submit, client, len(prompt_ids), reason, text)
            return
        sequence = Sequence(
            sequence_id=SequenceId(next(self._sequence_ids)),
            user=node_of(client),
            token_ids=[*prompt_ids, *submit.received],
            num_prompt=len(prompt_ids),
            max_tokens=max_tokens,
            eos_ids=eos_ids,
            sampling=submit.sampling,
        )
        request = Request(
            submit=submit, client=client, sequence=sequence, text=text, wait_until=self._clock() + submit.timeout_s
        )
        self.requests.add(request)
        self._on_change()
        self._enqueue([sequence])

    def _tell_end(
        self, submit: Submit, client: PeerId, num_prompt: int, reason: FinishReason, text: AnswerText
    ) -> None:
        """A client came back with a whole answer: tell it the rest of the text and that it is complete."""
        num_received = len(submit.received)
        if rest := text.close():
            self._tell(client, Tokens(request_id=submit.request_id, position=num_received, token_ids=(), text=rest))
        self._tell(
            client,
            Finished(
                request_id=submit.request_id, reason=reason, prompt_tokens=num_prompt, completion_tokens=num_received
            ),
        )

    def _resume(self, request: Request, submit: Submit, client: PeerId) -> None:
        """The client came back: repeat what it hasn't got."""
        request.client, request.orphaned_at = client, None
        for message in request.replay(len(submit.received)):
            self._tell(client, message)

    def cancel(self, client: PeerId, request_id: RequestId) -> None:
        """Free everything of a client's request at once; unknown ones are fine."""
        request = self.requests.find(node_of(client), request_id)
        if request is not None and request.end is None:
            request.client = client
            self._finish(request, "cancelled")

    def client_gone(self, client: PeerId) -> None:
        """Keep its answers for a while: it may come back."""
        for request in self.requests.of_client(client):
            request.orphaned_at = self._clock()

    def _finish(self, request: Request, reason: FinishReason) -> None:
        self._drop(request.sequence.sequence_id)
        self.requests.close(request)
        self._on_change()
        for message in request.finish(reason):
            self._tell(request.client, message)

    def _fail(self, request: Request, error: SkyNetError) -> None:
        self._drop(request.sequence.sequence_id)
        self.requests.close(request)
        self._on_change()
        request.end = Failed(request_id=request.request_id, error=type(error).__name__, text=str(error))
        self._tell(request.client, request.end)

    def _drop(self, sequence_id: SequenceId) -> None:
        self._queue = [s for s in self._queue if s.sequence_id != sequence_id]
        for replica in self.replicas:
            replica.scheduler.cancel(sequence_id)

    # -- sequences

    def _enqueue(self, sequences: list[Sequence]) -> None:
        """Hand sequences to replicas, least loaded first; what no replica can take waits in the queue."""
        self._queue.extend(sequences)
        serving = [r for r in self.replicas if r.phase is Phase.SERVING]
        waiting, self._queue = self._queue, []
        for sequence in waiting:
            request = self.requests.by_sequence.get(sequence.sequence_id)
            if request is None:
                continue
            if not serving:
                self._queue.append(sequence)
                continue
            replica = min(serving, key=lambda r: r.scheduler.num_sequences)
            try:
                replica.scheduler.add(sequence)
            except CapacityError as exc:
                self._fail(request, exc)
            else:
                replica.wake.set()
        if self._queue and self.shortage is not None:
            self._notify_shortage()

    def _notify_shortage(self) -> None:
        for sequence in self._queue:
            request = self.requests.by_sequence[sequence.sequence_id]
            text = f"waiting for workers: {self.shortage}"
            if request.notice != text:
                request.notice = text
                self._tell(request.client, Notice(request_id=request.request_id, text=text))

    # -- steps

    async def _serve(self, replica: Replica) -> None:
        """Run a replica's steps until it is taken out of service."""
        while replica.phase is Phase.SERVING:
            replica.wake.clear()
            async with replica.lock:
                step = replica.scheduler.form_step(self._clock()) if replica.phase is Phase.SERVING else None
                if step is not None:
                    try:
                        token_ids = await self._execute(replica, step.parts)
                    except ReplicaFault as fault:
                        await self._broken(replica, fault, step.parts)
                        return
            if step is None:
                await replica.wake.wait()
                continue
            for progress in replica.scheduler.apply(step, token_ids, self._clock()):
                request = self.requests.by_sequence.get(progress.sequence_id)
                if request is not None:
                    self._progress(request, progress.token_id, progress.finish_reason)
            await asyncio.sleep(0)  # let arrivals in between steps

    async def _execute(self, replica: Replica, parts: tuple[SequencePart, ...]) -> tuple[int, ...]:
        """One step; when it is late, its workers must show that they live."""
        predicted = replica.predicted_step_s(sum(len(part.token_ids) for part in parts))
        patience_s = max(self.config.step_floor_s, self.config.step_slack * predicted)
        running = asyncio.ensure_future(replica.execute(parts, max(self.config.hard_step_s, patience_s)))
        try:
            while True:
                done, _ = await asyncio.wait({running}, timeout=patience_s)
                if done:
                    return running.result()
                logger.warning("step late epoch=%s after_s=%.1f predicted_s=%.3f", replica.epoch, patience_s, predicted)
                await self._evict_silent(replica.workers)
        finally:
            running.cancel()

    async def _evict_silent(self, workers: frozenset[WorkerId]) -> None:
        """Ask workers whether they live; those that don't say so in time are lost."""
        self._pongs = {w: asyncio.Event() for w in workers if w in self.membership.members}
        for worker_id in self._pongs:
            self._transport.send_control(worker_id, Ping(nonce=0))
        waits = {asyncio.ensure_future(event.wait()) for event in self._pongs.values()}
        if waits:
            _, late = await asyncio.wait(waits, timeout=self.config.ping_s)
            for wait in late:
                wait.cancel()
        silent = [w for w, event in self._pongs.items() if not event.is_set()]
        self._pongs = {}
        for worker_id in silent:
            self.lost(worker_id, f"didn't answer within {self.config.ping_s} s while its step was late")

    async def _broken(self, replica: Replica, fault: ReplicaFault, parts: tuple[SequencePart, ...]) -> None:
        """A step failed: end the epoch, find out who is gone, go on in the next one."""
        logger.warning("replica broken epoch=%s reason=%s", replica.epoch, fault)
        replica.fail(fault)
        alive = replica.workers <= self.membership.members.keys()
        self._release(replica)
        if alive:  # nobody is known to be lost: blame a silent suspect, or the requests themselves
            await self._evict_silent(fault.suspects or replica.workers)
            if replica.workers <= self.membership.members.keys():
                self._blame_requests(parts, fault)
        self._enqueue([])
        self.members_changed()

    def _blame_requests(self, parts: tuple[SequencePart, ...], fault: ReplicaFault) -> None:
        """No worker was lost, yet the step failed: a request that keeps failing ends, so that others go on."""
        for part in parts:
            request = self.requests.by_sequence.get(part.sequence_id)
            if request is None:
                continue
            request.num_faults += 1
            if request.num_faults >= self.config.max_faults:
                self._fail(
                    request, RequestFailed(f"its steps failed {request.num_faults} times in a row; the last: {fault}")
                )

    def _progress(self, request: Request, token_id: int, reason: FinishReason | None) -> None:
        request.num_faults = 0
        self._tell(request.client, request.take(token_id))
        if request.text.is_stopped:
            reason = "stop"
        if reason is not None:
            self._finish(request, reason)

    # -- planning and transitions

    async def _converge(self) -> None:
        """Bring replicas in line with the plan, again and again."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            if not self.replicas:
                await asyncio.sleep(self.config.settle_s if not self.requests.by_id else 0)
                self._changed.clear()
            try:
                target = await asyncio.to_thread(self._plan_anew, self.membership.usable())
                if await self._measure(target):
                    target = await asyncio.to_thread(self._plan_anew, self.membership.usable())
                await self._bring_about(target)
                self.shortage = None
            except CapacityError as exc:
                self._short(exc)
            except ReplicaFault as fault:
                logger.warning("transition failed reason=%s", fault)
                self._note_unfit(fault)
                self._changed.set()

    def _plan_anew(self, usable: Mapping[WorkerId, WorkerProfile]) -> Plan:
        """Pure but for reading the config; runs beside the loop because a large swarm takes a second."""
        if not usable:
            raise CapacityError("no worker is there")
        links = tuple(self.membership.links.values())
        made = plan(self.model.spec, usable, links, self.config.planner, self.plan if self.replicas else None)
        if self.config.planner.layout is not None and not made.layout_is_met and not self._has_served:
            layout = self.config.planner.layout
            raise CapacityError(f"layout {layout} needs {layout.num_workers} workers, {len(usable)} are there")
        return made

    async def _measure(self, target: Plan) -> bool:
        """Have links measured that a plan would use and that are only guessed; whether something new is known.

        Not while answers wait for a replica: they can't wait for measurements too.
        """
        members = self.membership.members
        pairs = [
            (a, b) for a, b in target.estimated_links if not {a, b} - members.keys() and (a, b) not in self._probed
        ][: self.config.max_probes]
        if not pairs or (self._queue and self._has_served):
            return False
        for a, b in pairs:
            self._probed.add((a, b))
            self._transport.send_control(b, Probe(peers=(members[a].peer_info,), measures=False))
            self._transport.send_control(a, Probe(peers=(members[b].peer_info,), measures=True))
        try:
            async with asyncio.timeout(self.config.probe_s):
                while any(pair not in self.membership.links for pair in pairs):
                    self._measured.clear()
                    await self._measured.wait()
        except TimeoutError:
            logger.info("links not all measured missing=%d", sum(pair not in self.membership.links for pair in pairs))
        return any(pair in self.membership.links for pair in pairs)

    async def _bring_about(self, target: Plan) -> None:
        """Make the target plan true with the fewest changes, serving on meanwhile."""
        for replica in [r for r in self.replicas if r.phase is Phase.BROKEN]:
            self._release(replica)
        wanted = [(planned, target.replica_assignments(planned)) for planned in target.replicas]
        kept = [r for r in self.replicas if any(r.assignments == assignments for _, assignments in wanted)]
        old = [r for r in self.replicas if r not in kept]
        crowded = frozenset(target.transition.must_drop_first)
        for planned, assignments in wanted:
            if any(r.assignments == assignments for r in kept):
                continue
            fresh = self._make_replica(planned, assignments)
            overlapping = [r for r in old if r.workers & fresh.workers and r in self.replicas]
            if crowded & fresh.workers:
                for replica in overlapping:
                    await self._retire(replica)
            await self._make_ready(fresh, overlapping)
            for replica in overlapping:
                await self._retire(replica)
            self._put_into_service(fresh)
        for replica in old:
            await self._retire(replica)
        self.plan = target
        self._on_change()
        self._enqueue([])
        self._release_draining()

    def _make_replica(self, planned: ReplicaPlan, assignments: dict[WorkerId, StageAssignment]) -> Replica:
        some = next(iter(assignments.values()))
        return Replica(
            epoch=Epoch(self._start_counter, next(self._epochs)),
            plan=planned,
            assignments=assignments,
            scheduler=Scheduler(SchedulerConfig(num_blocks=some.num_blocks, block_size=some.block_size)),
            transport=self._transport,
        )

    async def _make_ready(self, fresh: Replica, overlapping: list[Replica]) -> None:
        """Load, link, and build the KV of running answers; on a fault nothing of it remains."""
        self._preparing.append(fresh)
        try:
            await self._prepare(fresh)
            await self._warm_up(fresh, overlapping)
        except ReplicaFault as fault:
            fresh.fail(fault)
            raise
        finally:
            self._preparing.remove(fresh)
            if fresh.phase is not Phase.SERVING:
                fresh.discard()

    async def _prepare(self, replica: Replica) -> None:
        """Load and link."""
        members = self.membership.members
        gone = [w for w in replica.workers if w not in members]
        if gone:
            raise ReplicaFault(f"{', '.join(sorted(gone))} left before the plan was carried out")
        peers = {w: members[w].peer_info for w in sorted(replica.workers)}
        ours = self._sources()
        others = {w: member.peer_info for w, member in members.items()}
        orders = {
            worker_id: Prepare(
                epoch=replica.epoch,
                model=self.model.ref,
                assignment=assignment,
                peers=tuple(p for w, p in peers.items() if w != worker_id),
                sources=(*ours, *(p for w, p in others.items() if w != worker_id)),
            )
            for worker_id, assignment in replica.assignments.items()
        }
        await replica.prepare(orders, self.config.silence_s)

    async def _warm_up(self, fresh: Replica, old: list[Replica]) -> None:
        """Build the KV of running sequences in the new epoch, while the old one goes on between our steps."""
        while serving := [r for r in old if r.phase is Phase.SERVING]:
            fresh.scheduler.warm(s for r in serving for s in r.scheduler.sequences())
            step = fresh.scheduler.form_warm_step(self.config.warm_tokens, self._clock())
            if step is None:
                return
            async with contextlib.AsyncExitStack() as locks:
                for replica in serving:  # in the order of their epochs: nobody else takes several
                    await locks.enter_async_context(replica.lock)
                token_ids = await self._execute(fresh, step.parts)
            fresh.scheduler.apply(step, token_ids, self._clock())

    def _put_into_service(self, replica: Replica) -> None:
        logger.info("replica serves epoch=%s layout=%s", replica.epoch, replica.plan.layout)
        self._lease(replica)
        self.replicas.append(replica)
        self.shortage, self._has_served = None, True
        self._on_change()
        replica.serving = asyncio.create_task(self._serve(replica), name=f"serve-{replica.epoch}")
        self._tasks.add(replica.serving)
        replica.serving.add_done_callback(self._tasks.discard)
        self._enqueue([])

    def _lease(self, replica: Replica) -> None:
        """A shard in service is a lease of its worker, like whatever else it will lend itself for."""
        now = self._clock()
        for stage in replica.plan.stages:
            for rank in stage.ranks:
                lease = Lease(
                    lease_id=LeaseId(f"stage-{replica.epoch}-{rank.worker_id}"),
                    kind=LeaseKind.STAGE,
                    holder=COORDINATOR,
                    worker=rank.worker_id,
                    resources={"memory_bytes": rank.weight_bytes + rank.kv_bytes},
                    epoch=replica.epoch,
                    ends_at=math.inf,  # as long as the replica serves: released with it, or freed with its worker
                )
                self.leases.grant(lease, now)

    async def _retire(self, replica: Replica) -> None:
        """Take a replica out of service between two steps."""
        if replica not in self.replicas:
            return
        if replica.phase is Phase.SERVING:
            replica.phase = Phase.RETIRING
        replica.wake.set()
        if replica.serving is not None:
            await asyncio.wait({replica.serving}, timeout=self.config.hard_step_s)
        self._release(replica)

    def _release(self, replica: Replica) -> None:
        """Forget a replica; its sequences go back to the queue with what they have."""
        if replica in self.replicas:
            self.replicas.remove(replica)
            for worker_id in replica.workers:
                self.leases.release(LeaseId(f"stage-{replica.epoch}-{worker_id}"), replica.epoch)
            self._queue.extend(replica.scheduler.evacuate())
        replica.phase = Phase.BROKEN
        replica.wake.set()
        replica.discard()

    def _note_unfit(self, fault: ReplicaFault) -> None:
        for worker_id in fault.suspects:
            member = self.membership.members.get(worker_id)
            if member is None:
                continue
            if fault.is_unfit:
                member.unfit_reason = str(fault)
            else:
                self.lost(worker_id, str(fault))
                self._transport.send_control(worker_id, Evicted(reason=str(fault)))

    def _short(self, shortage: CapacityError) -> None:
        """What is there can't hold the model: say so, let leavers go, wait for workers."""
        if str(shortage) != str(self.shortage):
            logger.warning("not enough workers reason=%s", shortage)
        self.shortage = shortage
        self._on_change()
        for replica in [r for r in self.replicas if r.phase is Phase.BROKEN]:
            self._release(replica)
        self._release_draining()
        self._enqueue([])

    def _release_draining(self) -> None:
        """Nothing depends on leavers any more (or nothing can be done about it): let them go."""
        needed = (
            frozenset[WorkerId]().union(*(r.workers for r in self.replicas)) if self.shortage is None else frozenset()
        )
        for member in list(self.membership.members.values()):
            if member.state is WorkerState.DRAINING and member.worker_id not in needed:
                self._transport.send_control(member.worker_id, Released())
                self.lost(member.worker_id, "left")

    # -- the passing of time

    async def _watch(self) -> None:
        """Leases, waiting requests and orphaned answers."""
        while True:
            await asyncio.sleep(self.config.tick_s)
            now = self._clock()
            for worker_id in self.membership.expired(now):
                self.lost(worker_id, f"no sign of life for {self.membership.lease_s} s")
            queued = {s.sequence_id for s in self._queue}
            for request in list(self.requests.by_id.values()):
                if request.orphaned_at is not None and now - request.orphaned_at > self.config.orphan_s:
                    self._finish(request, "cancelled")
                elif request.sequence.sequence_id not in queued:
                    request.wait_until = now + request.submit.timeout_s
                elif now > request.wait_until:
                    reason = self.shortage or CapacityError("no replica became ready")
                    self._fail(request, CapacityError(f"waited {request.submit.timeout_s:.0f} s for workers: {reason}"))
