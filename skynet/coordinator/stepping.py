"""Runs replicas' steps, one task each, and finds out who is to blame when one is late or fails."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator

from skynet.coordinator.answers import Answers
from skynet.coordinator.engine_config import EngineConfig
from skynet.coordinator.fleet import Fleet
from skynet.coordinator.membership import Membership
from skynet.coordinator.replica import Phase, Replica, ReplicaFault, Transport
from skynet.coordinator.scheduler import Step
from skynet.protocol.ids import WorkerId
from skynet.protocol.messages import Busy, Evicted, Ping, Pong
from skynet.protocol.steps import SequencePart, StepDone

logger = logging.getLogger(__name__)


class Stepper:
    """See the module. `lost` is told of workers that don't answer, `replan` when an epoch ended before its time.

    `timed` is told of replicas whose steps say something about their workers: not as predicted, or so for long.
    """

    def __init__(
        self,
        config: EngineConfig,
        vocab_size: int,
        fleet: Fleet,
        answers: Answers,
        membership: Membership,
        transport: Transport,
        lost: Callable[[WorkerId, str], None],
        replan: Callable[[], None],
        timed: Callable[[Replica], None],
        clock: Callable[[], float],
    ) -> None:
        self.asked: list[dict[WorkerId, asyncio.Event]] = []  # who was asked whether it lives, by each who asks
        self._busy: dict[WorkerId, Busy] = {}  # as of the last answer
        self._config = config
        self._vocab_size = vocab_size
        self._fleet = fleet
        self._answers = answers
        self._membership = membership
        self._transport = transport
        self._lost = lost
        self._replan = replan
        self._timed = timed
        self._clock = clock
        self._tasks: set[asyncio.Task[None]] = set()

    def forget(self, worker_id: WorkerId) -> None:
        """It is gone, and its last words with it."""
        self._busy.pop(worker_id, None)

    def start(self, replica: Replica) -> None:
        """Serve with this replica until it is taken out of service."""
        replica.serving = asyncio.create_task(self._serve(replica), name=f"serve-{replica.epoch}")
        self._tasks.add(replica.serving)
        replica.serving.add_done_callback(self._has_ended)

    async def stop(self) -> None:
        """End every serving task."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _has_ended(self, serving: asyncio.Task[None]) -> None:
        self._tasks.discard(serving)
        if not serving.cancelled() and (exc := serving.exception()) is not None:
            logger.critical("serving ended by a bug task=%s", serving.get_name(), exc_info=exc)
            self._replan()

    async def _serve(self, replica: Replica) -> None:
        """Whatever ends this early is a fault of the replica's epoch."""
        step: Step | None = None
        while replica.phase is Phase.SERVING:
            replica.wake.clear()
            step = None
            try:
                async with replica.lock:
                    step = replica.scheduler.form_step(self._clock()) if replica.phase is Phase.SERVING else None
                    done = await self.execute(replica, step.parts) if step is not None else None
                if step is not None and done is not None:
                    for progress in replica.scheduler.apply(step, done.token_ids, self._clock(), done.logprobs):
                        self._answers.take(progress)
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

    async def execute(self, replica: Replica, parts: tuple[SequencePart, ...]) -> StepDone:
        """One step; when it is late, its workers must show that they live. Raises ReplicaFault."""
        num_tokens = sum(len(part.token_ids) for part in parts)
        predicted = replica.predicted_step_s(num_tokens)
        patience_s = max(self._config.step_floor_s, self._config.step_slack * predicted)
        began = self._clock()
        running = asyncio.ensure_future(replica.execute(parts, max(self._config.hard_step_s, patience_s)))
        try:
            while True:
                done, _ = await asyncio.wait({running}, timeout=patience_s)
                if done:
                    step_done = running.result()
                    if any(not 0 <= token_id < self._vocab_size for token_id in _ids_in(step_done)):
                        raise ReplicaFault(f"a step of epoch {replica.epoch} sampled ids outside the vocabulary")
                    self._note_pace(replica, num_tokens, self._clock() - began)
                    return step_done
                logger.warning("step late epoch=%s after_s=%.1f predicted_s=%.3f", replica.epoch, patience_s, predicted)
                await self.evict_silent(replica.workers)
                self._evict_stuck(replica, max(self._config.stuck_floor_s, 3 * patience_s))
        finally:
            running.cancel()

    def _note_pace(self, replica: Replica, num_tokens: int, took_s: float) -> None:
        replica.pace = replica.pace.after(replica.planned_step_s(num_tokens), took_s)
        if replica.phase is Phase.SERVING and (replica.pace.is_off(self._clock()) or replica.pace.is_proven):
            self._timed(replica)

    async def evict_silent(self, workers: frozenset[WorkerId]) -> None:
        """Ask workers whether they live; those that don't say so in time are lost. Several may ask at once."""
        members = {w: self._membership.members[w] for w in workers if w in self._membership.members}
        asked = {w: asyncio.Event() for w in members}
        self.asked.append(asked)
        asked_at = self._clock()
        try:
            for worker_id in asked:
                self._transport.send_control(worker_id, Ping(nonce=0))
            async with asyncio.timeout(self._config.ping_s):
                for event in asked.values():
                    await event.wait()
        except TimeoutError:
            pass
        finally:
            self.asked = [other for other in self.asked if other is not asked]
        for worker_id, member in members.items():
            is_same = self._membership.members.get(worker_id) is member  # one that joined again wasn't asked
            if is_same and not asked[worker_id].is_set() and member.last_heard < asked_at:
                self._lost(worker_id, f"didn't answer within {self._config.ping_s} s while its step was late")

    def _evict_stuck(self, replica: Replica, limit_s: float) -> None:
        """A rank that says it has been in this step for long, and waits for nobody, hangs; the others wait for it."""
        for worker_id in sorted(replica.workers):
            busy = self._busy.get(worker_id)
            if busy is None or (busy.epoch, busy.step) != (replica.epoch, replica.step_number - 1):
                continue
            if busy.waits_for or busy.since_s < limit_s:
                continue
            reason = f"its compute thread has hung in step {busy.step} for {busy.since_s:.0f} s; start it again"
            self._transport.send_control(worker_id, Evicted(reason=reason, is_final=True))
            self._lost(worker_id, reason)

    def on_pong(self, worker_id: WorkerId, pong: Pong) -> None:
        """It lives, and tells what its compute thread is at."""
        if pong.busy is None:
            self._busy.pop(worker_id, None)
        else:
            self._busy[worker_id] = pong.busy
        for asked in self.asked:
            if worker_id in asked:
                asked[worker_id].set()

    async def _broken(self, replica: Replica, parts: tuple[SequencePart, ...]) -> None:
        """An epoch ended before its time: find out who is gone, go on in the next one."""
        fault = replica.fault
        assert fault is not None or replica not in self._fleet.replicas
        self._fleet.release(replica)
        if fault is None:
            return  # released by somebody who knew why
        if fault.is_expected:
            logger.info("replica ended epoch=%s reason=%s", replica.epoch, fault)
        else:
            logger.warning("replica broken epoch=%s reason=%s", replica.epoch, fault)
        self._answers.dispatch()  # others may go on with its sequences at once
        if fault.is_unfit:  # it lives, but others can't use what it sends
            for worker_id in fault.suspects & self._membership.members.keys():
                self._membership.mark_unfit(
                    worker_id, str(fault), self._clock(), self._config.unfit_s, accuser=fault.accuser
                )
        elif not fault.is_loss:  # nobody is known to be lost: blame a silent suspect, or the requests themselves
            await self.evict_silent(fault.suspects or replica.workers)
            if replica.workers <= self._membership.members.keys():
                self._answers.blame(parts, fault)
        self._replan()


def _ids_in(done: StepDone) -> Iterator[int]:
    """Every token id that a worker told."""
    yield from done.token_ids
    for found in done.logprobs:
        yield from () if found is None else found.top_ids
