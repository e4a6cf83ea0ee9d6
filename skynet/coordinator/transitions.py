"""Makes a plan true with the fewest changes: prepares replicas, builds their caches, switches between two steps."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

from skynet.coordinator.answers import Answers
from skynet.coordinator.engine_config import EngineConfig
from skynet.coordinator.fleet import Fleet
from skynet.coordinator.membership import Membership
from skynet.coordinator.planner import Plan, ReplicaPlan
from skynet.coordinator.replica import Phase, Replica, ReplicaFault, Transport
from skynet.coordinator.scheduler import Scheduler, SchedulerConfig
from skynet.coordinator.stepping import Stepper
from skynet.protocol.ids import WorkerId
from skynet.protocol.messages import ModelRef, PeerInfo, Prepare, ShareChunks
from skynet.protocol.plan import Epoch, StageAssignment

logger = logging.getLogger(__name__)
MAX_HELPERS = 8  # workers outside of a replica that its workers may fetch chunks from


class Transitions:
    """See the module. One at a time: whoever calls `bring_about` waits for it."""

    def __init__(
        self,
        config: EngineConfig,
        model: ModelRef,
        fleet: Fleet,
        answers: Answers,
        stepper: Stepper,
        membership: Membership,
        transport: Transport,
        sources: Callable[[], tuple[PeerInfo, ...]],
        start_counter: int,
        on_change: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._model = model
        self._fleet = fleet
        self._answers = answers
        self._stepper = stepper
        self._membership = membership
        self._transport = transport
        self._sources = sources
        self._start_counter = start_counter
        self._on_change = on_change
        self._clock = clock
        self._epochs = itertools.count(1)

    async def bring_about(self, target: Plan) -> None:
        """Serve on meanwhile. Raises the ReplicaFault of a replica that couldn't be made ready."""
        self._fleet.release_broken()
        wanted = [(planned, target.replica_assignments(planned)) for planned in target.replicas]
        present = self._fleet.replicas
        kept = [r for r in present if any(r.assignments == assignments for _, assignments in wanted)]
        old = [r for r in present if r not in kept]
        crowded = frozenset(target.transition.must_drop_first)
        for planned, assignments in wanted:
            same = next((r for r in kept if r.assignments == assignments), None)
            if same is not None:
                same.plan = planned  # its prediction is of now
                continue
            fresh = self._make_replica(planned, assignments)
            overlapping = [r for r in old if r.workers & fresh.workers and r in self._fleet.replicas]
            await self._replace(overlapping, fresh, drops_first=bool(crowded & fresh.workers))
        for replica in old:
            await self._retire(replica)

    def _make_replica(self, planned: ReplicaPlan, assignments: dict[WorkerId, StageAssignment]) -> Replica:
        return Replica(
            epoch=Epoch(self._start_counter, next(self._epochs)),
            plan=planned,
            assignments=assignments,
            scheduler=Scheduler(scheduler_config(planned, assignments, self._config.max_step_s)),
            transport=self._transport,
        )

    async def _replace(self, old: list[Replica], fresh: Replica, *, drops_first: bool) -> None:
        """Load, link, and build the KV of running answers; then switch. On a fault nothing of the new one remains."""
        self._fleet.preparing.append(fresh)  # until it is in service: whoever loses a worker of it must find it
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
            self._fleet.preparing.remove(fresh)
            if fresh not in self._fleet.replicas:
                fresh.fail(ReplicaFault(f"epoch {fresh.epoch} was given up"))
                self._fleet.give_back(fresh)

    async def _prepare(self, replica: Replica) -> None:
        """Load and link."""
        members = self._membership.members
        gone = [w for w in replica.workers if w not in members]
        if gone:
            raise ReplicaFault(f"{', '.join(sorted(gone))} left before the plan was carried out", frozenset(gone))
        peers = {w: members[w].peer_info for w in sorted(replica.workers)}
        helpers = self._helpers(replica)
        for worker_id in helpers:
            self._transport.send_control(worker_id, ShareChunks(peers=tuple(peers.values())))
        sources = {**peers, **{w: members[w].peer_info for w in helpers}}
        ours = self._sources()
        orders = {
            worker_id: Prepare(
                epoch=replica.epoch,
                model=self._model,
                assignment=assignment,
                peers=tuple(p for w, p in peers.items() if w != worker_id),
                sources=(*ours, *(p for w, p in sources.items() if w != worker_id)),
            )
            for worker_id, assignment in replica.assignments.items()
        }
        await replica.prepare(orders, self._config.silence_s)

    def _helpers(self, replica: Replica) -> list[WorkerId]:
        """Some others who hold chunks."""
        holding = [w for w, member in self._membership.members.items() if member.weight_bytes]
        return sorted(set(holding) - replica.workers)[:MAX_HELPERS]

    async def _warm_up(self, fresh: Replica, old: list[Replica]) -> None:
        """Build the KV of running sequences in the new epoch, while the old one goes on between our steps.

        It ends: the sequences are those of now, and a step builds more of them than the old epoch's step adds. When it
        returns, the old epoch is between two steps and as much is built as there is room for.
        """
        known = [s for r in old for s in r.scheduler.sequences()]
        num_growing = min(len(known), sum(r.scheduler.config.max_running for r in old))
        max_tokens = max(self._config.warm_tokens, 2 * num_growing)
        while serving := [r for r in old if r.phase is Phase.SERVING]:
            async with contextlib.AsyncExitStack() as locks:
                for replica in serving:  # in the order of their epochs: nobody else takes several
                    await locks.enter_async_context(replica.lock)
                fresh.scheduler.warm(s for s in known if s.sequence_id in self._answers.requests.by_sequence)
                step = fresh.scheduler.form_warm_step(max_tokens, self._clock())
                if step is None:
                    return
                try:
                    done = await self._stepper.execute(fresh, step.parts)
                except ReplicaFault as fault:
                    reason = f"building ahead: {fault}"
                    if fault.is_unfit:
                        raise ReplicaFault(reason, fault.suspects, is_unfit=True, accuser=fault.accuser) from fault
                    if not fault.is_loss:  # a suspect may well be alive: only silence evicts
                        await self._stepper.evict_silent(fault.suspects or fresh.workers)
                    raise ReplicaFault(reason, is_loss=fault.is_loss) from fault
                fresh.scheduler.apply(step, done.token_ids, self._clock())
                if step.num_tokens < max_tokens:
                    return  # it built all there was, and the old epoch hasn't moved since

    def _put_into_service(self, replica: Replica) -> None:
        """Raises the ReplicaFault of one that broke before it came to that."""
        if replica.fault is not None:
            raise replica.fault
        logger.info("replica serves epoch=%s layout=%s", replica.epoch, replica.plan.layout)
        self._fleet.put_into_service(replica, self._clock(), self._membership.lease_s)
        self._on_change()
        self._stepper.start(replica)
        self._answers.dispatch()
        replica.scheduler.warm(())  # what was built ahead for answers that ended or went elsewhere is of no use

    async def _retire(self, replica: Replica) -> None:
        """Take a replica out of service between two steps."""
        if replica not in self._fleet.replicas:
            return
        if replica.phase is Phase.SERVING:
            replica.phase = Phase.RETIRING
        replica.wake.set()
        if replica.serving is not None:
            done, _ = await asyncio.wait({replica.serving}, timeout=self._config.hard_step_s)
            if not done:
                replica.fail(ReplicaFault(f"epoch {replica.epoch} didn't end its last step"))
        self._fleet.release(replica)


def scheduler_config(
    planned: ReplicaPlan, assignments: Mapping[WorkerId, StageAssignment], max_step_s: float
) -> SchedulerConfig:
    """Blocks as planned; on slow machines prompts enter in smaller chunks, so that no step keeps others for long."""
    some = next(iter(assignments.values()))
    kv_bytes = sum(rank.kv_bytes for stage in planned.stages for rank in stage.ranks)
    usual = SchedulerConfig(
        num_blocks=some.num_blocks, block_size=some.block_size, block_bytes=kv_bytes // some.num_blocks
    )
    in_time = int(planned.prediction.prefill_tokens_per_s * max_step_s)
    return replace(usual, max_step_tokens=max(usual.max_running, min(usual.max_step_tokens, in_time)))
