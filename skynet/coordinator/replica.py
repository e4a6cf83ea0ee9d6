"""One complete copy of the model across workers, as the coordinator drives it: step by step."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Protocol

from skynet.coordinator.observed import Pace
from skynet.coordinator.planner import ReplicaPlan
from skynet.coordinator.scheduler import Scheduler
from skynet.errors import WorkerError, foreign_text
from skynet.protocol.ids import WorkerId
from skynet.protocol.messages import Abort, Discard, Link, Linked, Prepare, Prepared, PrepareFailed, ToWorker
from skynet.protocol.plan import Epoch, StageAssignment
from skynet.protocol.steps import RunStep, SequencePart, StepDone, StepFailed

logger = logging.getLogger(__name__)


class Transport(Protocol):
    """How messages reach workers. Sending never waits. False: no connection, or the worker doesn't read."""

    def send_control(self, worker_id: WorkerId, message: ToWorker) -> bool: ...

    def send_work(self, worker_id: WorkerId, message: RunStep) -> bool: ...


class ReplicaFault(WorkerError):
    """A replica can't go on in this epoch. `suspects` didn't do their part, as far as is known."""

    def __init__(
        self,
        reason: str,
        suspects: frozenset[WorkerId] = frozenset(),
        *,
        is_unfit: bool = False,
        accuser: WorkerId | None = None,
        is_loss: bool = False,
        is_expected: bool = False,
    ) -> None:
        super().__init__(reason)
        self.suspects = suspects
        self.is_unfit = is_unfit  # the suspects can't hold their shard, as they said, or sent others nonsense,
        self.accuser = accuser  # as this one says
        self.is_expected = is_expected  # they left as they should: nothing is wrong
        self.is_loss = is_loss  # the suspects are known to be gone: nobody else need be asked or blamed


class Phase(Enum):
    """How far a replica is."""

    PREPARING = auto()  # workers load their shards
    SERVING = auto()
    RETIRING = auto()  # finishes the step that runs, starts no other
    BROKEN = auto()  # lost a worker or a step: aborted, to be replaced


@dataclass(slots=True, eq=False)
class Replica:
    """Workers, epoch and scheduler of one copy of the model. Steps run one at a time, numbered without gaps."""

    epoch: Epoch
    plan: ReplicaPlan
    assignments: Mapping[WorkerId, StageAssignment]
    scheduler: Scheduler
    transport: Transport
    phase: Phase = Phase.PREPARING
    fault: ReplicaFault | None = None
    step_number: int = 0
    tokens_done: int = 0
    pace: Pace = field(default_factory=Pace)  # its steps against the plan; kept by the stepper
    _waiting: asyncio.Future[StepDone] | None = None
    _prepared: dict[WorkerId, asyncio.Future[None]] = field(default_factory=dict)
    _linked: dict[WorkerId, asyncio.Future[None]] = field(default_factory=dict)
    sizes: dict[WorkerId, Prepared] = field(default_factory=dict)  # what each worker holds of it
    relayed: set[tuple[str, str]] = field(default_factory=set)
    _recent: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=64))  # when, tokens sampled
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # held while a step runs on its workers
    wake: asyncio.Event = field(default_factory=asyncio.Event)  # there may be work
    serving: asyncio.Task[None] | None = None  # set by the engine
    progressed: asyncio.Event = field(default_factory=asyncio.Event)  # a worker reported loading progress

    @property
    def workers(self) -> frozenset[WorkerId]:
        return frozenset(self.assignments)

    @property
    def tokens_per_s(self) -> float:
        """Of the last steps; 0 when idle for five seconds."""
        if len(self._recent) < 2 or time.monotonic() - self._recent[-1][0] > 5:
            return 0.0
        span = self._recent[-1][0] - self._recent[0][0]
        return sum(n for _, n in list(self._recent)[1:]) / span if span > 0 else 0.0

    def planned_step_s(self, num_tokens: int) -> float:
        """How long the plan says that a step of so many tokens takes."""
        prediction = self.plan.prediction
        return 1 / prediction.decode_tokens_per_s + num_tokens / prediction.prefill_tokens_per_s

    def predicted_step_s(self, num_tokens: int) -> float:
        """The same, corrected by what steps took lately."""
        return self.planned_step_s(num_tokens) * self.pace.ratio

    # -- getting ready

    async def prepare(self, orders: Mapping[WorkerId, Prepare], silence_s: float) -> None:
        """Have every worker load its shard, then link up. Raises ReplicaFault; silence_s without progress is one."""
        loop = asyncio.get_running_loop()
        self._prepared = {w: loop.create_future() for w in orders}
        self._linked = {w: loop.create_future() for w in orders}
        if self.fault is not None:
            raise self.fault
        for worker_id, order in orders.items():
            self.transport.send_control(worker_id, order)
        await self._all(self._prepared, silence_s, "didn't load its shard")
        for worker_id in orders:
            self.transport.send_control(worker_id, Link(epoch=self.epoch))
        await self._all(self._linked, silence_s, "didn't link to its peers")
        self.phase = Phase.SERVING

    async def _all(self, futures: Mapping[WorkerId, asyncio.Future[None]], silence_s: float, what: str) -> None:
        while any(not future.done() for future in futures.values()):
            self.progressed.clear()
            try:
                async with asyncio.timeout(silence_s):
                    await self.progressed.wait()
            except TimeoutError:
                late = frozenset(w for w, future in futures.items() if not future.done())
                raise ReplicaFault(
                    f"{', '.join(sorted(late))} {what}: no progress in {silence_s:.0f} s", late
                ) from None
        for future in futures.values():
            future.result()  # raises the ReplicaFault that `fail` put there

    def on_prepared(self, worker_id: WorkerId, message: Prepared | PrepareFailed) -> None:
        future = self._prepared.get(worker_id)
        if isinstance(message, PrepareFailed):
            reason = foreign_text(message.reason)
            self.fail(ReplicaFault(f"{worker_id}: {reason}", frozenset({worker_id}), is_unfit=True))
        elif future is not None and not future.done():
            self.sizes[worker_id] = message
            future.set_result(None)
            self.progressed.set()

    def has_loaded(self, worker_id: WorkerId) -> bool:
        """Whether this worker has its shard in memory."""
        return worker_id in self.sizes

    def on_linked(self, worker_id: WorkerId, message: Linked) -> None:
        future = self._linked.get(worker_id)
        self.relayed |= {(worker_id, peer) for peer in message.relayed}
        if message.unreachable:
            self.fail(ReplicaFault(f"{worker_id} can't reach {foreign_text(', '.join(message.unreachable))}"))
        elif future is not None and not future.done():
            future.set_result(None)
            self.progressed.set()

    # -- running steps

    async def execute(self, parts: tuple[SequencePart, ...], timeout_s: float) -> StepDone:
        """Run one batch through every stage: the sampled token of each part that asked for one, in order.

        Raises ReplicaFault when a rank is lost, refuses, or nothing comes back within timeout_s.
        """
        if self.fault is not None:
            raise self.fault
        step = RunStep(epoch=self.epoch, step=self.step_number, parts=parts, timeout_s=timeout_s)
        self.step_number += 1
        self._waiting = asyncio.get_running_loop().create_future()
        plain = _without_extras(step)
        deaf = frozenset(
            worker_id
            for worker_id, assignment in self.assignments.items()
            if not self.transport.send_work(worker_id, step if assignment.is_last else plain)
        )
        if deaf:
            raise ReplicaFault(f"step {step.step} didn't reach {', '.join(sorted(deaf))}", deaf)
        try:
            async with asyncio.timeout(timeout_s):
                done = await self._waiting
        except TimeoutError as exc:
            raise ReplicaFault(f"step {step.step} of epoch {self.epoch}: no result in {timeout_s:.1f} s") from exc
        finally:
            self._waiting = None
        wanted = sum(part.sample is not None for part in parts)
        if len(done.token_ids) != wanted:
            raise ReplicaFault(f"step {step.step}: {len(done.token_ids)} tokens came back, {wanted} were asked for")
        if not _has_logprobs_as_asked(done, parts):
            raise ReplicaFault(f"step {step.step}: came back without the logprobs that were asked for, or with others")
        self.tokens_done += wanted
        self._recent.append((time.monotonic(), wanted))
        return done

    def on_work(self, worker_id: WorkerId, message: StepDone | StepFailed) -> None:
        """A rank reports. Only the sampling rank's result counts, and only for the step we wait for."""
        if isinstance(message, StepFailed):
            reason = foreign_text(message.reason)
            suspect = next((w for w in self.assignments if w == message.suspect), None)
            logger.warning(
                "step failed epoch=%s step=%d worker=%s reason=%s", self.epoch, message.step, worker_id, reason
            )
            suspects = frozenset({suspect} if suspect else ())
            is_unfit = bool(suspects) and message.is_nonsense
            self.fail(ReplicaFault(f"{worker_id}: {reason}", suspects, is_unfit=is_unfit, accuser=worker_id))
            return
        assignment = self.assignments[worker_id]
        expected = message.step == self.step_number - 1 and assignment.is_last and assignment.rank == 0
        if expected and self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(message)

    def fail(self, fault: ReplicaFault) -> None:
        """End this epoch: whoever waits on it gets the fault. The first fault counts."""
        if self.fault is not None:
            return
        self.fault, self.phase = fault, Phase.BROKEN
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(fault)
        for future in [*self._prepared.values(), *self._linked.values()]:
            if not future.done():
                future.set_exception(fault)
                future.exception()  # several futures carry it; one reader is enough
        self.progressed.set()
        self.wake.set()
        self.abort()

    def abort(self) -> None:
        """Have every rank leave its steps at once."""
        for worker_id in self.assignments:
            self.transport.send_control(worker_id, Abort(epoch=self.epoch))

    def discard(self) -> None:
        """Have every rank free what this epoch holds."""
        for worker_id in self.assignments:
            self.transport.send_control(worker_id, Discard(epoch=self.epoch))


def _without_extras(step: RunStep) -> RunStep:
    """What stages before the last need of it: they don't sample, and what sampling takes may be long."""
    if not any(part.extra_bytes for part in step.parts):
        return step
    return replace(step, parts=tuple(replace(part, sample=None, seen=None) for part in step.parts))


def _has_logprobs_as_asked(done: StepDone, parts: tuple[SequencePart, ...]) -> bool:
    asked = [part.sample.logprobs for part in parts if part.sample is not None]
    if not done.logprobs:
        return all(count is None for count in asked)
    return len(done.logprobs) == len(asked) and all(
        (count is None) == (found is None) and (found is None or len(found.top_ids) <= (count or 0))
        for count, found in zip(asked, done.logprobs, strict=True)
    )
