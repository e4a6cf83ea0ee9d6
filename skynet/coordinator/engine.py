"""Serves one model on the members of a swarm: plans, prepares replicas, runs their steps, moves answers between them.

Two kinds of task: `_converge` brings the replicas in line with the plan whenever membership changes, and one `_serve`
per replica runs its steps. Sequences live in exactly one place: the queue (no replica can run them) or a replica's
scheduler. A fault anywhere ends an epoch, never a request: its sequences go back to the queue with the ids they have.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from skynet.coordinator.leases import Lease, LeaseKind, LeaseTable
from skynet.coordinator.membership import Membership, WorkerState
from skynet.coordinator.planner import Plan, PlannerConfig, ReplicaPlan, plan
from skynet.coordinator.replica import Phase, Replica, ReplicaFault, Transport
from skynet.coordinator.requests import FinishReason, Request, RequestTable, end_of_answer, node_of
from skynet.coordinator.returning import Returned, absent, plan_in_force, without_cache
from skynet.coordinator.scheduler import Scheduler, SchedulerConfig, Sequence, Step
from skynet.coordinator.served import ServedModel
from skynet.coordinator.text import AnswerText
from skynet.errors import CapacityError, ConfigError, RequestFailed, SkyNetError
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
from skynet.protocol.profile import LinkProfile
from skynet.protocol.steps import SequencePart, StepDone, StepFailed

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How patient the engine is, and how much it takes on."""

    planner: PlannerConfig
    step_floor_s: float = 2.0  # a step may always take this long before its ranks are asked whether they live
    step_slack: float = 8.0  # and this many times what the plan predicts
    hard_step_s: float = 120.0  # however slow the machines are, a step ends by then
    ping_s: float = 3.0  # a worker that doesn't answer within this, when a step is late, is lost
    max_faults: int = 4  # a request whose steps fail this often in a row, with no worker lost, ends with an error
    max_probes: int = 64  # links measured before one plan
    probe_s: float = 3.0  # how long to wait for measurements
    warm_tokens: int = 64  # of running answers that one step builds in a new epoch, while the old one waits
    reunion_s: float = 5.0  # after a restart, workers that served together are waited for this long
    settle_s: float = 0.25  # workers that start together join together: wait this long before the first plan
    tick_s: float = 0.25  # how often leases and deadlines are looked at
    silence_s: float = 30.0  # loading without progress for this long is a fault
    orphan_s: float = 15.0  # an answer whose client is gone is kept for this long
    max_requests: int = 512  # running and waiting; more are refused at once
    max_node_requests: int = 256  # of one node, so that it can't keep the others out
    retry_s: float = 5.0  # the longest pause between two plans that couldn't be carried out
    unfit_s: float = (
        30.0  # without enough workers, one that couldn't load is tried again after this, then twice this...
    )


class Engine:
    """See the module. Everything runs on one event loop; nothing here blocks it.

    `tell` sends a message to a client and never waits. False: it isn't connected or doesn't read; it is told later.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: ServedModel,
        membership: Membership,
        transport: Transport,
        tell: Callable[[PeerId, ToClient], bool],
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
        self._asked: list[dict[WorkerId, asyncio.Event]] = []  # who was asked whether it lives, by each who asks
        self._behind: dict[tuple[str, RequestId], Request] = {}  # whose clients don't read as fast as they are told

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
                replica.fail(ReplicaFault(f"{worker_id} is gone: {reason}", frozenset({worker_id}), is_loss=True))
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
        for asked in self._asked:
            if worker_id in asked:
                asked[worker_id].set()

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
        if (num_own := self.requests.num_of(node_of(client))) >= self.config.max_node_requests:
            raise CapacityError(f"{num_own} of your requests are in progress, no node may have more; wait for some")
        if any(not 0 <= token_id < self.model.spec.vocab_size for token_id in submit.received):
            raise ConfigError(f"received token ids must lie in [0, {self.model.spec.vocab_size}), some don't")
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
        request.rewind(len(submit.received))
        self._flush(request)

    def _flush(self, request: Request) -> None:
        """Tell the client what it hasn't been told, in order; `_watch` goes on where it didn't read."""
        while request.orphaned_at is None and (message := request.untold()) is not None:
            if not self._tell(request.client, message):
                self._behind[request.key] = request
                return
            request.told(message)
        self._behind.pop(request.key, None)

    def cancel(self, client: PeerId, request_id: RequestId) -> None:
        """Free everything of a client's request at once; unknown ones are fine."""
        request = self.requests.find(node_of(client), request_id)
        if request is not None and request.end is None:
            request.client = client
            self._finish(request, "cancelled")

    def client_gone(self, client: PeerId) -> None:
        """Keep its answers for a while: it may come back."""
        for request in [*self.requests.of_client(client), *(r for r in self._behind.values() if r.client == client)]:
            request.orphaned_at = self._clock()
            self._behind.pop(request.key, None)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        request.finish(reason)
        self._close(request)

    def _fail(self, request: Request, error: SkyNetError) -> None:
        request.end = Failed(request_id=request.request_id, error=type(error).__name__, text=str(error))
        self._close(request)

    def _close(self, request: Request) -> None:
        self._drop(request.sequence.sequence_id)
        self.requests.close(request)
        self._on_change()
        self._flush(request)

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
            if request.notice != text and self._tell(request.client, Notice(request_id=request.request_id, text=text)):
                request.notice = text

    # -- steps

    async def _serve(self, replica: Replica) -> None:
        """Run a replica's steps until it is taken out of service. Whatever ends that early is a fault of its epoch."""
        step: Step | None = None
        while replica.phase is Phase.SERVING:
            replica.wake.clear()
            step = None
            try:
                async with replica.lock:
                    step = replica.scheduler.form_step(self._clock()) if replica.phase is Phase.SERVING else None
                    token_ids = await self._execute(replica, step.parts) if step is not None else ()
                if step is not None:
                    self._apply(replica, step, token_ids)
            except ReplicaFault as fault:
                replica.fail(fault)
            except Exception as exc:  # a bug of ours ends an epoch like any fault, and loudly
                logger.exception("serving failed epoch=%s", replica.epoch)
                replica.fail(ReplicaFault(f"the coordinator failed: {exc!r}"))
            if step is None:
                await replica.wake.wait()
            else:
                await asyncio.sleep(0)  # let arrivals in between steps
        if replica.phase is Phase.BROKEN:
            await self._broken(replica, () if step is None else step.parts)

    def _apply(self, replica: Replica, step: Step, token_ids: tuple[int, ...]) -> None:
        for progress in replica.scheduler.apply(step, token_ids, self._clock()):
            request = self.requests.by_sequence.get(progress.sequence_id)
            if request is None:
                continue
            try:
                self._progress(request, progress.token_id, progress.finish_reason)
            except Exception as exc:  # a bug of ours: it ends this answer and no other
                logger.exception("answer not told request=%s", request.request_id)
                self._fail(request, RequestFailed(f"the coordinator couldn't go on with this answer: {exc!r}"))

    async def _execute(self, replica: Replica, parts: tuple[SequencePart, ...]) -> tuple[int, ...]:
        """One step; when it is late, its workers must show that they live."""
        predicted = replica.predicted_step_s(sum(len(part.token_ids) for part in parts))
        patience_s = max(self.config.step_floor_s, self.config.step_slack * predicted)
        running = asyncio.ensure_future(replica.execute(parts, max(self.config.hard_step_s, patience_s)))
        try:
            while True:
                done, _ = await asyncio.wait({running}, timeout=patience_s)
                if done:
                    token_ids = running.result()
                    if any(not 0 <= token_id < self.model.spec.vocab_size for token_id in token_ids):
                        raise ReplicaFault(f"a step of epoch {replica.epoch} sampled ids outside the vocabulary")
                    return token_ids
                logger.warning("step late epoch=%s after_s=%.1f predicted_s=%.3f", replica.epoch, patience_s, predicted)
                await self._evict_silent(replica.workers)
        finally:
            running.cancel()

    async def _evict_silent(self, workers: frozenset[WorkerId]) -> None:
        """Ask workers whether they live; those that don't say so in time are lost. Several may ask at once."""
        members = {w: self.membership.members[w] for w in workers if w in self.membership.members}
        asked = {w: asyncio.Event() for w in members}
        self._asked.append(asked)
        asked_at = self._clock()
        try:
            for worker_id in asked:
                self._transport.send_control(worker_id, Ping(nonce=0))
            async with asyncio.timeout(self.config.ping_s):
                for event in asked.values():
                    await event.wait()
        except TimeoutError:
            pass
        finally:
            self._asked = [other for other in self._asked if other is not asked]
        for worker_id, member in members.items():
            is_same = self.membership.members.get(worker_id) is member  # one that joined again wasn't asked
            if is_same and not asked[worker_id].is_set() and member.last_heard < asked_at:
                self.lost(worker_id, f"didn't answer within {self.config.ping_s} s while its step was late")

    async def _broken(self, replica: Replica, parts: tuple[SequencePart, ...]) -> None:
        """An epoch ended before its time: find out who is gone, go on in the next one."""
        fault = replica.fault
        assert fault is not None or replica not in self.replicas
        self._release(replica)
        if fault is None:
            return  # released by somebody who knew why
        logger.warning("replica broken epoch=%s reason=%s", replica.epoch, fault)
        self._enqueue([])  # others may go on with its sequences at once
        if not fault.is_loss:  # nobody is known to be lost: blame a silent suspect, or the requests themselves
            await self._evict_silent(fault.suspects or replica.workers)
            if replica.workers <= self.membership.members.keys():
                self._blame_requests(parts, fault)
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
        request.take(token_id)
        if request.text.is_stopped:
            reason = "stop"
        if reason is None:
            self._flush(request)
        else:
            self._finish(request, reason)

    # -- planning and transitions

    async def _converge(self) -> None:
        """Bring replicas in line with the plan, again and again."""
        num_failures = 0  # in a row that nobody was found to be the cause of
        while True:
            await self._changed.wait()
            self._changed.clear()
            if not self.replicas:
                await asyncio.sleep(self.config.settle_s if not self.requests.by_id else 0)
                await self._reunite()
                self._changed.clear()
            try:
                await self._carry_out_best_plan()
                num_failures = 0
            except CapacityError as exc:
                num_failures = 0
                self._short(exc)
            except ReplicaFault as fault:
                logger.warning("transition failed reason=%s", fault)
                num_failures = 0 if fault.suspects else num_failures + 1
                self._note_unfit(fault)
                await self._retry_after(num_failures)
            except Exception as exc:  # a bug of ours: what serves goes on, and everybody hears of it
                logger.exception("planning failed")
                num_failures += 1
                if not self.replicas:
                    self._short(CapacityError(f"the coordinator can't make or carry out a plan: {exc!r}"))
                await self._retry_after(num_failures)

    async def _reunite(self) -> None:
        """After a restart: give those who served together the time to come back, so that nothing need move."""
        if self.plan is not None or self._has_served:
            return
        try:
            async with asyncio.timeout(self.config.reunion_s):
                while missing := absent(self._returned(), self.model.ref.digest):
                    logger.info("waiting for workers that served together missing=%d", len(missing))
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            logger.info("workers that served together don't come back")

    def _returned(self) -> dict[WorkerId, Returned]:
        """Usable workers that still hold what an earlier coordinator gave them."""
        members = self.membership.members
        joins = {worker_id: members[worker_id].join for worker_id in self.membership.usable()}
        return {w: Returned(join.held, join.profile.memory_bytes) for w, join in joins.items() if join.held is not None}

    def _held_plan(self) -> Plan | None:
        """What workers hold: what serves, or the weights that are left of it."""
        if self.replicas:
            return self.plan
        held = self.plan or plan_in_force(self.model.spec, self.model.ref.digest, self.config.planner, self._returned())
        memory_bytes = {w: profile.memory_bytes for w, profile in self.membership.usable().items()}
        return None if held is None else without_cache(held, memory_bytes)

    async def _carry_out_best_plan(self) -> None:
        target = await self._plan_anew()
        if await self._measure(target):
            target = await self._plan_anew()
        await self._bring_about(target)
        self.shortage = None

    async def _retry_after(self, num_failures: int) -> None:
        """Plan anew: at once where we learnt something, later and later where we didn't."""
        if num_failures:
            await asyncio.sleep(min(0.05 * 2 ** min(num_failures, 16), self.config.retry_s))
        self._changed.set()

    async def _plan_anew(self) -> Plan:
        """The best plan for who is there; made beside the loop because a large swarm takes a second."""
        usable = self.membership.usable()
        if not usable:
            unfit = [m.unfit_reason for m in self.membership.members.values() if m.unfit_reason is not None]
            raise CapacityError(f"no worker can hold its part: {unfit[0]}" if unfit else "no worker is there")
        links = tuple(self.membership.links.values())
        config = self.config.planner
        made = await asyncio.to_thread(plan, self.model.spec, usable, links, config, self._held_plan())
        if config.layout is not None and not made.layout_is_met and not self._has_served:
            raise CapacityError(
                f"layout {config.layout} needs {config.layout.num_workers} workers, {len(usable)} are there"
            )
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
        self._release_broken()
        wanted = [(planned, target.replica_assignments(planned)) for planned in target.replicas]
        kept = [r for r in self.replicas if any(r.assignments == assignments for _, assignments in wanted)]
        old = [r for r in self.replicas if r not in kept]
        crowded = frozenset(target.transition.must_drop_first)
        for planned, assignments in wanted:
            if any(r.assignments == assignments for r in kept):
                continue
            fresh = self._make_replica(planned, assignments)
            overlapping = [r for r in old if r.workers & fresh.workers and r in self.replicas]
            await self._replace(overlapping, fresh, drops_first=bool(crowded & fresh.workers))
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

    async def _replace(self, old: list[Replica], fresh: Replica, *, drops_first: bool) -> None:
        """Load, link, and build the KV of running answers; then switch. On a fault nothing of the new one remains."""
        self._preparing.append(fresh)  # until it is in service: whoever loses a worker of it must find it
        try:
            for replica in old if drops_first else ():
                await self._retire(replica)
            await self._prepare(fresh)
            await self._warm_up(fresh, old)
            for replica in old:
                if fresh.fault is None:
                    await self._retire(replica)
            self._put_into_service(fresh)
        finally:
            self._preparing.remove(fresh)
            if fresh not in self.replicas:
                fresh.fail(ReplicaFault(f"epoch {fresh.epoch} was given up"))
                self._give_back(fresh)

    async def _prepare(self, replica: Replica) -> None:
        """Load and link."""
        members = self.membership.members
        gone = [w for w in replica.workers if w not in members]
        if gone:
            raise ReplicaFault(f"{', '.join(sorted(gone))} left before the plan was carried out", frozenset(gone))
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
        """Build the KV of running sequences in the new epoch, while the old one goes on between our steps.

        It ends: the sequences are those of now, and a step builds more of them than the old epoch's step adds. When it
        returns, the old epoch is between two steps and as much is built as there is room for.
        """
        known = [s for r in old for s in r.scheduler.sequences()]
        num_growing = min(len(known), sum(r.scheduler.config.max_running for r in old))
        max_tokens = max(self.config.warm_tokens, 2 * num_growing)
        while serving := [r for r in old if r.phase is Phase.SERVING]:
            async with contextlib.AsyncExitStack() as locks:
                for replica in serving:  # in the order of their epochs: nobody else takes several
                    await locks.enter_async_context(replica.lock)
                fresh.scheduler.warm(s for s in known if s.sequence_id in self.requests.by_sequence)
                step = fresh.scheduler.form_warm_step(max_tokens, self._clock())
                if step is None:
                    return
                try:
                    token_ids = await self._execute(fresh, step.parts)
                except ReplicaFault as fault:
                    if not fault.is_loss:  # a suspect may well be alive: only silence evicts
                        await self._evict_silent(fault.suspects or fresh.workers)
                    raise ReplicaFault(f"building ahead: {fault}", is_loss=fault.is_loss) from fault
                fresh.scheduler.apply(step, token_ids, self._clock())
                if step.num_tokens < max_tokens:
                    return  # it built all there was, and the old epoch hasn't moved since

    def _put_into_service(self, replica: Replica) -> None:
        """Raises the ReplicaFault of one that broke before it came to that."""
        if replica.fault is not None:
            raise replica.fault
        self._lease(replica)
        logger.info("replica serves epoch=%s layout=%s", replica.epoch, replica.plan.layout)
        self.replicas.append(replica)
        self.shortage, self._has_served = None, True
        self._on_change()
        replica.serving = asyncio.create_task(self._serve(replica), name=f"serve-{replica.epoch}")
        self._tasks.add(replica.serving)
        replica.serving.add_done_callback(self._has_ended)
        self._enqueue([])
        replica.scheduler.warm(())  # what was built ahead for answers that ended or went elsewhere is of no use

    def _has_ended(self, serving: asyncio.Task[None]) -> None:
        self._tasks.discard(serving)
        if not serving.cancelled() and (exc := serving.exception()) is not None:
            logger.critical("serving ended by a bug task=%s", serving.get_name(), exc_info=exc)
            self.members_changed()

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
            done, _ = await asyncio.wait({replica.serving}, timeout=self.config.hard_step_s)
            if not done:
                replica.fail(ReplicaFault(f"epoch {replica.epoch} didn't end its last step"))
        self._release(replica)

    def _release(self, replica: Replica) -> None:
        """Forget a replica; its sequences go back to the queue with what they have."""
        if replica in self.replicas:
            self.replicas.remove(replica)
            self._queue.extend(replica.scheduler.evacuate())
            self._give_back(replica)
        replica.phase = Phase.BROKEN
        replica.wake.set()

    def _release_broken(self) -> None:
        for replica in [r for r in self.replicas if r.phase is Phase.BROKEN]:
            self._release(replica)

    def _give_back(self, replica: Replica) -> None:
        """Its workers are free of it."""
        for worker_id in replica.workers:
            self.leases.release(LeaseId(f"stage-{replica.epoch}-{worker_id}"), replica.epoch)
        replica.discard()

    def _note_unfit(self, fault: ReplicaFault) -> None:
        if fault.is_loss:
            return  # known already; whoever has joined again since isn't to blame
        for worker_id in fault.suspects & self.membership.members.keys():
            if fault.is_unfit:
                self.membership.mark_unfit(worker_id, str(fault), self._clock(), self.config.unfit_s)
            else:
                self.lost(worker_id, str(fault))
                self._transport.send_control(worker_id, Evicted(reason=str(fault)))

    def _short(self, shortage: CapacityError) -> None:
        """What is there can't hold the model: say so, let leavers go, wait for workers."""
        if str(shortage) != str(self.shortage):
            logger.warning("not enough workers reason=%s", shortage)
        self.shortage = shortage
        self._on_change()
        self._release_broken()
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
            if self.shortage is not None and self.membership.forgive(now):
                self.members_changed()
            for request in list(self._behind.values()):
                self._flush(request)
            queued = {s.sequence_id for s in self._queue}
            for request in list(self.requests.by_id.values()):
                if request.orphaned_at is not None and now - request.orphaned_at > self.config.orphan_s:
                    self._finish(request, "cancelled")
                elif request.sequence.sequence_id not in queued:
                    request.wait_until = now + request.submit.timeout_s
                elif now > request.wait_until:
                    reason = self.shortage or CapacityError("no replica became ready")
                    self._fail(request, CapacityError(f"waited {request.submit.timeout_s:.0f} s for workers: {reason}"))
