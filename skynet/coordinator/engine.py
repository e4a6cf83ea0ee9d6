"""Serves one model on the members of a swarm: plans whenever something changed, and has the plan made true.

`_converge` does that again and again; `_watch` looks at leases and deadlines. Requests are in `answers`, steps in
`stepping`, changes from plan to plan in `transitions`; what all of them share is the `fleet`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from skynet.coordinator.answers import Answers, Tell
from skynet.coordinator.engine_config import EngineConfig
from skynet.coordinator.fleet import Fleet
from skynet.coordinator.leases import LeaseTable
from skynet.coordinator.machines import held_bytes, lent_bytes
from skynet.coordinator.membership import Membership, WorkerState
from skynet.coordinator.observed import Observations
from skynet.coordinator.planner import Plan, plan
from skynet.coordinator.replica import Replica, ReplicaFault, Transport
from skynet.coordinator.requests import RequestTable
from skynet.coordinator.returning import Returned, absent, plan_in_force, without_cache
from skynet.coordinator.served import ServedModel
from skynet.coordinator.stepping import Stepper
from skynet.coordinator.survey import Survey
from skynet.coordinator.transitions import Transitions
from skynet.coordinator.waiting import why_waiting
from skynet.errors import CapacityError
from skynet.protocol.ids import PeerId, RequestId, WorkerId
from skynet.protocol.messages import (
    Evicted,
    Linked,
    LoadProgress,
    PeerInfo,
    Pong,
    Prepared,
    PrepareFailed,
    Released,
    Submit,
)
from skynet.protocol.profile import LinkProfile
from skynet.protocol.steps import StepDone, StepFailed

logger = logging.getLogger(__name__)


class Engine:
    """See the module. Everything runs on one event loop; nothing here blocks it."""

    def __init__(
        self,
        config: EngineConfig,
        model: ServedModel,
        membership: Membership,
        transport: Transport,
        tell: Tell,
        sources: Callable[[], tuple[PeerInfo, ...]],
        start_counter: int,
        on_change: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.model = model
        self.membership = membership
        self.fleet = Fleet()
        self.plan: Plan | None = None
        self.answers = Answers(config, model, self.fleet, tell, on_change, clock, lambda: self.why_waiting)
        self.stepper = Stepper(
            config,
            model.spec.vocab_size,
            self.fleet,
            self.answers,
            membership,
            transport,
            lost=self.lost,
            replan=self.members_changed,
            timed=self._timed,
            clock=clock,
        )
        self._transitions = Transitions(
            config,
            model.ref,
            self.fleet,
            self.answers,
            self.stepper,
            membership,
            transport,
            sources,
            start_counter,
            on_change,
            clock,
        )
        self.observations = Observations()
        self._transport = transport
        self._clock = clock
        self._on_change = on_change
        self._changed = asyncio.Event()
        self.survey = Survey(config, membership, transport, clock)

    # -- what others show

    @property
    def replicas(self) -> list[Replica]:
        return self.fleet.replicas

    @property
    def requests(self) -> RequestTable:
        return self.answers.requests

    @property
    def leases(self) -> LeaseTable:
        return self.fleet.leases

    @property
    def shortage(self) -> CapacityError | None:
        """Why no replica serves, or why no better plan can be made."""
        return self.fleet.shortage

    @property
    def why_waiting(self) -> str | None:
        """The same for people: what is being waited for, as long as that isn't workers."""
        return why_waiting(self.fleet, self.membership)

    @property
    def num_requests(self) -> int:
        """Requests in progress."""
        return self.answers.num_requests

    @property
    def num_queued(self) -> int:
        """Sequences that no replica can run."""
        return len(self.fleet.queue)

    def lent_bytes(self, remembered: Plan | None = None) -> dict[WorkerId, int]:
        """What each member lends, others on its machine considered."""
        before = remembered or self.plan
        held = (*(before.replicas if before else ()), *(replica.plan for replica in self.fleet.all))
        return lent_bytes(self.membership, held_bytes(held))

    async def run(self) -> None:
        """Until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._converge(), name="converge")
                tasks.create_task(self._watch(), name="watch")
                tasks.create_task(self._explore(), name="explore")
        finally:
            await self.stepper.stop()
            await self.answers.reader.stop()

    # -- requests

    def submit(self, submit: Submit, client: PeerId) -> None:
        """Start a request, or go on with one that was begun. Refusals are told to the client."""
        self.answers.submit(submit, client)

    def cancel(self, client: PeerId, request_id: RequestId) -> None:
        """Free everything of a client's request at once; unknown ones are fine."""
        self.answers.cancel(client, request_id)

    def client_gone(self, client: PeerId) -> None:
        """Keep its answers for a while: it may come back."""
        self.answers.client_gone(client)

    # -- membership

    def joined(self, worker_id: WorkerId) -> None:
        """A worker is there: it lends its memory; plan anew."""
        member = self.membership.members[worker_id]
        self.observations.joined(worker_id, member.join.profile)
        self.leases.lend(worker_id, {"memory_bytes": member.join.profile.memory_bytes})
        self.members_changed()

    def drain(self, worker_id: WorkerId) -> None:
        """Move a worker's work elsewhere, then let it go."""
        if self.membership.drain(worker_id):
            logger.info("worker drains worker=%s", worker_id)
            self.members_changed()

    def measured(self, worker_id: WorkerId, links: Iterable[LinkProfile]) -> None:
        """A worker measured its links; only what it can know counts."""
        self.survey.measured(worker_id, links)

    def members_changed(self) -> None:
        """Plan anew."""
        self._changed.set()
        self._on_change()

    def lost(self, worker_id: WorkerId, reason: str, *, is_expected: bool = False) -> None:
        """A worker is gone. Its replicas break at once; `_converge` replaces them."""
        if self.membership.remove(worker_id) is None:
            return
        level = logging.INFO if is_expected else logging.WARNING
        logger.log(level, "worker %s worker=%s reason=%s", "left" if is_expected else "lost", worker_id, reason)
        self.survey.forget(worker_id)
        self.stepper.forget(worker_id)
        self.fleet.lost(worker_id, reason, is_expected=is_expected)
        self.members_changed()

    def on_worker(self, worker_id: WorkerId, message: Prepared | PrepareFailed | Linked | LoadProgress) -> None:
        """What a worker says about an epoch; words about epochs that are over fall on the floor."""
        replica = self.fleet.find(message.epoch, worker_id)
        if replica is None:
            return
        member = self.membership.members[worker_id]
        match message:
            case Prepared():
                member.loading, member.weight_bytes, member.kv_bytes = None, message.weight_bytes, message.kv_bytes
                replica.on_prepared(worker_id, message)
            case PrepareFailed():
                member.loading = None
                replica.on_prepared(worker_id, message)
            case Linked():
                self.survey.linked(worker_id, message.relayed, message.unreachable)
                replica.on_linked(worker_id, message)
            case LoadProgress():
                member.loading = message
                self._on_change()
                replica.progressed.set()

    def on_step(self, worker_id: WorkerId, message: StepDone | StepFailed) -> None:
        replica = self.fleet.find(message.epoch, worker_id)
        if replica is not None:
            replica.on_work(worker_id, message)

    def on_pong(self, worker_id: WorkerId, pong: Pong) -> None:
        """A worker's answer to one of our pings."""
        if worker_id in self.membership.members:
            self.stepper.on_pong(worker_id, pong)
        self.survey.on_pong(worker_id, pong.nonce)

    # -- planning

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
        if self.plan is not None or self.fleet.has_served:
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

    def _remembered(self) -> Plan | None:
        """The plan under which workers got what they hold."""
        if self.plan or self.replicas:
            return self.plan
        return plan_in_force(self.model.spec, self.model.ref.digest, self.config.planner, self._returned())

    async def _carry_out_best_plan(self) -> None:
        target = await self._plan_anew()
        for _ in range(self.config.max_surveys):
            if not self._may_measure() or not await self.survey.verify(target):
                break
            target = await self._plan_anew()
        await self._transitions.bring_about(target)
        self.plan = target
        self._on_change()
        self.answers.dispatch()
        self._release_draining()
        self.fleet.shortage = None

    def _may_measure(self) -> bool:
        """Answers that were under way can't wait for measurements too."""
        return not self.fleet.queue or not (self.fleet.has_served or self._returned())

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
        current, config = self._remembered(), self.config.planner
        lent = self.lent_bytes(current)
        if current is not None and not self.replicas:
            current = without_cache(current, lent)
        claims = {w: replace(claim, memory_bytes=lent[w]) for w, claim in usable.items()}
        profiles = self.observations.corrected(claims)
        needed = max(config.min_context_tokens, min(self.answers.needed_positions(), config.max_context_tokens))
        inputs = (self.model.spec, profiles, self.survey.links())
        try:  # with a cache that holds every answer which has begun
            made = await asyncio.to_thread(plan, *inputs, replace(config, min_context_tokens=needed), current)
        except CapacityError:
            if needed == config.min_context_tokens:
                raise
            made = await asyncio.to_thread(plan, *inputs, config, current)  # those that don't fit wait
        if config.layout is not None and not made.layout_is_met and not self.fleet.has_served:
            raise CapacityError(
                f"layout {config.layout} needs {config.layout.num_workers} workers, {len(usable)} are there"
            )
        return made

    def _timed(self, replica: Replica) -> None:
        """Steps took much longer or shorter than its workers' rates say: plan with what they took. Or just that."""
        ratio, now, workers = replica.pace.ratio, self._clock(), replica.plan.worker_ids
        claims = self.membership.usable()
        if not replica.pace.is_off(now):
            self.observations.confirm(workers, claims)
        elif self.observations.fold(workers, ratio, claims):
            logger.info("rates corrected epoch=%s measured_to_predicted=%.2f", replica.epoch, ratio)
            replica.pace = replica.pace.corrected(now)
            self._changed.set()
        else:
            replica.pace = replica.pace.left_alone(now)

    def _note_unfit(self, fault: ReplicaFault) -> None:
        if fault.is_loss:
            return  # known already; whoever has joined again since isn't to blame
        for worker_id in fault.suspects & self.membership.members.keys():
            if fault.is_unfit:
                self.membership.mark_unfit(
                    worker_id, str(fault), self._clock(), self.config.unfit_s, accuser=fault.accuser
                )
            else:
                self.lost(worker_id, str(fault))
                self._transport.send_control(worker_id, Evicted(reason=str(fault)))

    def _short(self, shortage: CapacityError) -> None:
        """What is there can't hold the model: say so, let leavers go, wait for workers."""
        if str(shortage) != str(self.shortage):
            logger.warning("not enough workers reason=%s", shortage)
        self.fleet.shortage = shortage
        self._on_change()
        self.fleet.release_broken()
        self._release_draining()
        self.answers.dispatch()

    def _release_draining(self) -> None:
        """Nothing depends on leavers any more (or nothing can be done about it): let them go."""
        needed = self.fleet.workers() if self.shortage is None else frozenset()
        for member in list(self.membership.members.values()):
            if member.state is WorkerState.DRAINING and member.worker_id not in needed:
                self._transport.send_control(member.worker_id, Released())
                self.lost(member.worker_id, "its work is done here", is_expected=True)

    # -- the passing of time

    async def _watch(self) -> None:
        """Leases, waiting requests and orphaned answers."""
        while True:
            await asyncio.sleep(self.config.tick_s)
            now = self._clock()
            for worker_id in self.membership.expired(now):
                self.lost(worker_id, f"no sign of life for {self.membership.lease_s} s")
            self.fleet.renew(self.membership.lease_ends(), now)
            if self.membership.mend_cuts(now) or (self.shortage is not None and self.membership.forgive(now)):
                self.members_changed()
            try:
                self.answers.look_after(now)
                self.survey.ping()
            except Exception:  # a bug of ours: leases are watched and answers go on
                logger.exception("looking after failed")

    async def _explore(self) -> None:
        """While nothing is to do: near machines are measured, so that a better plan can be found."""
        while True:
            await asyncio.sleep(self.config.explore_s)
            try:
                if self.fleet.is_idle and not self._changed.is_set() and await self.survey.explore():
                    self._changed.set()
            except Exception:  # a bug of ours: what was measured so far will do
                logger.exception("measuring failed")
