"""The engine over workers that are played: each step is answered from a KV cache that they really keep.

What the engine does wrong shows as a wrong, missing or repeated token: a token is a function of all that its KV cache
holds, cells of another epoch or another sequence included.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from skynet.client.planning import plan_for
from skynet.coordinator import membership
from skynet.coordinator.engine import Engine
from skynet.coordinator.engine_config import EngineConfig
from skynet.coordinator.membership import Membership
from skynet.coordinator.planner import Layout, PlannerConfig, plan, plan_as_dict
from skynet.coordinator.replica import Phase, ReplicaFault
from skynet.coordinator.served import ServedModel, open_model
from skynet.coordinator.server import CoordinatorServer
from skynet.coordinator.status import describe, profiles
from skynet.coordinator.waiting import state_of
from skynet.protocol.ids import PeerId, RequestId, WorkerId
from skynet.protocol.messages import (
    Busy,
    Discard,
    Evicted,
    Failed,
    Finished,
    HeldShard,
    Join,
    Link,
    Linked,
    LoadProgress,
    Notice,
    Ping,
    Pong,
    Prepare,
    Prepared,
    PrepareFailed,
    Probe,
    Released,
    ShareChunks,
    Submit,
    ToClient,
    Tokens,
    ToWorker,
)
from skynet.protocol.plan import Epoch
from skynet.protocol.profile import LinkProfile, WorkerProfile
from skynet.protocol.steps import RunStep, SamplingParams, StepDone, StepFailed

CLIENT = PeerId("a" * 26 + ".c-1")
NUM_TOKENS = 8
PATIENCE_S = 10.0
Strike = Callable[["Stage"], None]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return open_model("embedded", None, Path(tmp_path_factory.mktemp("cache")), None)


@dataclass
class Client:
    """Gets what the engine tells, in order; it may stop reading, or go and come back."""

    reads: bool = True
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    tail: str | None = None
    end: Finished | Failed | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self, message: ToClient) -> bool:
        if not self.reads:
            return False
        if isinstance(message, Tokens):
            if message.token_ids:
                assert message.position == len(self.token_ids), "a token was repeated or is missing"
                self.token_ids += message.token_ids
                self.text += message.text
            elif self.tail is None:
                self.tail = message.text
                self.text += message.text
        elif isinstance(message, Finished | Failed):
            assert self.end is None, "an answer ended twice"
            self.end = message
            self.ended.set()
        return True


@dataclass
class Stage:
    """Where it plays: the real engine, and workers whose every message is carried out by the event loop."""

    engine: Engine
    clients: dict[RequestId, Client] = field(default_factory=dict)
    num_steps: int = 0
    steps: list[RunStep] = field(default_factory=list)
    at_step: Callable[[int, str], None] = lambda number, moment: None
    live: set[WorkerId] = field(default_factory=set)
    mute: set[WorkerId] = field(default_factory=set)  # alive, but they don't answer pings
    unfit: set[WorkerId] = field(default_factory=set)
    loading: set[WorkerId] = field(default_factory=set)  # and never done, unless the test says so
    notices: list[str] = field(default_factory=list)
    released: set[WorkerId] = field(default_factory=set)
    evicted: set[WorkerId] = field(default_factory=set)
    hung: dict[WorkerId, float] = field(default_factory=dict)  # in a step, for so many seconds
    slow: set[WorkerId] = field(default_factory=set)  # whose links are slow
    num_lost_probes: int = 0  # that many more measurements come to nothing
    apart: set[frozenset[WorkerId]] = field(default_factory=set)  # can't reach each other
    shared: dict[WorkerId, set[WorkerId]] = field(default_factory=dict)  # with whom, though they aren't in its plan
    held: dict[WorkerId, set[Epoch]] = field(default_factory=dict)  # shards
    cells: dict[tuple[Epoch, int, int], int] = field(default_factory=dict)  # KV cache
    heard: dict[tuple[Epoch, int], set[WorkerId]] = field(default_factory=dict)  # who has got a step

    # -- workers

    def join(
        self, name: str, memory_bytes: int = 1 << 30, held: HeldShard | None = None, host_id: str = "here"
    ) -> WorkerId:
        worker_id = WorkerId("w" * 26 + f".{name}")
        profile = WorkerProfile(
            device="cpu",
            device_name="played",
            threads=1,
            memory_bytes=memory_bytes,
            weight_bytes_per_s={"bfloat16": 1e9, "float32": 1e9},
            matmul_flops_per_s={"bfloat16": 1e11, "float32": 1e11},
            host_id=host_id,
        )
        if worker_id in self.engine.membership.members:
            self.engine.lost(worker_id, "joined again")
        join = Join(profile=profile, hosts=("127.0.0.1",), data_port=1, bulk_port=2, pid=1, held=held)
        self.engine.membership.join(worker_id, join, b"k" * 40, "127.0.0.1", self.engine._clock())
        self.live.add(worker_id)
        self.held[worker_id] = set()
        self.engine.membership.work_linked(worker_id)
        self.engine.joined(worker_id)
        return worker_id

    def kill(self, worker_id: WorkerId) -> None:
        self.live.discard(worker_id)
        self.held.pop(worker_id, None)
        self.engine.lost(worker_id, "killed")

    def serving(self) -> list[WorkerId]:
        """In the order of the stages."""
        replica = next((r for r in self.engine.replicas if r.phase is Phase.SERVING), None)
        return [] if replica is None else list(replica.plan.worker_ids)

    def send_control(self, worker_id: WorkerId, message: ToWorker) -> bool:
        if worker_id not in self.live:
            return False
        asyncio.get_running_loop().call_soon(self._on_control, worker_id, message)
        return True

    def _on_control(self, worker_id: WorkerId, message: ToWorker) -> None:
        if worker_id not in self.live:
            return
        match message:
            case Prepare() if worker_id in self.unfit:
                self.engine.on_worker(worker_id, PrepareFailed(epoch=message.epoch, reason="disk full"))
            case Prepare() if worker_id in self.loading:
                self.held[worker_id].add(message.epoch)
            case Prepare():
                self.held[worker_id].add(message.epoch)
                self.engine.on_worker(worker_id, Prepared(epoch=message.epoch, weight_bytes=1, kv_bytes=1))
            case Link():
                self.engine.on_worker(worker_id, self._linked(worker_id, message))
            case Discard():
                self.held[worker_id].discard(message.epoch)
            case Ping() if worker_id not in self.mute:
                self.engine.on_pong(worker_id, Pong(nonce=message.nonce, busy=self._busy(worker_id)))
            case Probe() if message.measures and self.num_lost_probes:
                self.num_lost_probes -= 1
            case Probe() if message.measures:
                self.engine.measured(worker_id, [self._measure(worker_id, WorkerId(p.peer_id)) for p in message.peers])
            case ShareChunks():
                self.shared[worker_id] = {WorkerId(peer.peer_id) for peer in message.peers}
            case Released():
                self.released.add(worker_id)
                self.live.discard(worker_id)
                self.held.pop(worker_id)
            case Evicted():
                self.evicted.add(worker_id)

    def _busy(self, worker_id: WorkerId) -> Busy | None:
        """Those that hang keep the others waiting."""
        replica = next((r for r in self.engine.replicas if worker_id in r.workers), None)
        if replica is None or not self.hung.keys() & replica.workers:
            return None
        waits_for = () if worker_id in self.hung else tuple(PeerId(w) for w in replica.workers - {worker_id})
        since_s = self.hung.get(worker_id, 100.0)
        return Busy(epoch=replica.epoch, step=replica.step_number - 1, since_s=since_s, waits_for=waits_for)

    def _linked(self, worker_id: WorkerId, message: Link) -> Linked:
        replica = self.engine.fleet.find(message.epoch, worker_id)
        peers = replica.workers if replica is not None else ()
        unreachable = [PeerId(w) for w in peers if frozenset((w, worker_id)) in self.apart]
        return Linked(epoch=message.epoch, unreachable=tuple(unreachable))

    def _measure(self, worker_id: WorkerId, peer: WorkerId) -> LinkProfile:
        a, b = sorted((worker_id, peer))
        is_slow = self.slow & {a, b}
        return LinkProfile(
            a=a, b=b, round_trip_s=5e-3 if is_slow else 1e-4, bandwidth_bytes_per_s=2e6 if is_slow else 1e9
        )

    def send_work(self, worker_id: WorkerId, step: RunStep) -> bool:
        if worker_id not in self.live:
            return False
        heard = self.heard.setdefault((step.epoch, step.step), set())
        heard.add(worker_id)
        replica = next(r for r in [*self.engine.replicas, *self.engine.fleet.preparing] if r.epoch == step.epoch)
        if heard == replica.workers:
            self.num_steps += 1
            self.steps.append(step)
            number, loop = self.num_steps, asyncio.get_running_loop()
            loop.call_soon(self.at_step, number, "sent")
            loop.call_soon(self._run, step, replica.plan.stages[-1].worker_ids[0], replica.workers, number)
        return True

    def _run(self, step: RunStep, sampler: WorkerId, workers: frozenset[WorkerId], number: int) -> None:
        if self.hung.keys() & workers:
            return
        if not all(step.epoch in self.held.get(w, ()) for w in workers):
            return  # somebody is gone, or the epoch is over
        done = StepDone(epoch=step.epoch, step=step.step, token_ids=tuple(self._compute(step)))
        self.at_step(number, "run")
        self.engine.on_step(sampler, done)
        self.at_step(number, "answered")

    def _compute(self, step: RunStep) -> list[int]:
        block_size = self.engine.config.planner.block_size
        sampled = []
        for part in step.parts:
            for position, token_id in enumerate(part.token_ids, part.start):
                block = part.block_table[position // block_size]
                self.cells[step.epoch, block, position % block_size] = token_id
            if part.sample is not None:
                end = part.start + len(part.token_ids)
                held = [
                    self.cells.get((step.epoch, part.block_table[p // block_size], p % block_size), -1)
                    for p in range(end)
                ]
                sampled.append(300 + zlib.crc32(repr(held).encode()) % 1500)
        return sampled

    # -- clients

    def ask(self, name: str, prompt: str = "Once upon a time", max_tokens: int = NUM_TOKENS) -> Client:
        client = self.clients.setdefault(RequestId(name), Client())
        submit = Submit(
            request_id=RequestId(name),
            prompt=prompt,
            max_tokens=max_tokens,
            ignore_eos=True,
            sampling=SamplingParams(),
            received=tuple(client.token_ids),
        )
        self.engine.submit(submit, CLIENT)
        return client

    def tell(self, _: PeerId, message: ToClient) -> bool:
        if isinstance(message, Notice):
            self.notices.append(message.text)
        if not isinstance(message, Tokens | Finished | Failed):
            return True
        return self.clients[message.request_id].take(message)

    # -- afterwards

    def leftovers(self) -> list[object]:
        """Requests, sequences, blocks, leases and shards that aren't in service."""
        engine = self.engine
        sequences = [*engine.requests.by_id, *engine.requests.by_sequence, *engine.fleet.queue, *engine.answers.behind]
        transitions = [*engine.fleet.preparing, *engine.stepper.asked]
        blocks = [
            (r.epoch, r.scheduler.blocks.num_free)
            for r in engine.replicas
            if r.scheduler.num_sequences or r.scheduler.blocks.num_free < r.scheduler.blocks.num_blocks
        ]
        serving = {r.epoch for r in engine.replicas}
        shards = [(w, epoch) for w, epochs in self.held.items() for epoch in epochs - serving]
        leases = [lease for lease in engine.leases.export() if lease.epoch not in serving]
        return [*sequences, *transitions, *blocks, *shards, *leases]

    async def nothing_is_left_over(self) -> None:
        try:
            await until(lambda: not self.leftovers() and bool(self.serving()))
        except TimeoutError:
            pytest.fail(f"left over: {self.leftovers()}, serving: {self.serving()}")


async def until(is_so: Callable[[], bool]) -> None:
    """Wait for the event loop to bring something about."""
    async with asyncio.timeout(PATIENCE_S):
        while not is_so():  # noqa: ASYNC110  (of an engine that knows nothing of tests)
            await asyncio.sleep(0)


def play(
    model: ServedModel, act: Callable[[Stage], Awaitable[None]], layout: str | None = "1x2", **config: float
) -> Stage:
    """A stage with an engine that runs; what fails in one of its tasks fails here."""

    async def run() -> Stage:
        planner = PlannerConfig(layout=Layout.parse(layout) if layout else None, min_context_tokens=256)
        defaults = {"settle_s": 0.0, "tick_s": 0.01, "ping_s": 0.05, "probe_s": 0.5}
        stage = Stage.__new__(Stage)
        engine = Engine(
            EngineConfig(planner=planner, **{**defaults, **config}),  # type: ignore[arg-type]
            model,
            Membership(lease_s=3600),
            transport=stage,
            tell=lambda client, message: stage.tell(client, message),
            sources=lambda: (),
            start_counter=1,
        )
        stage.__init__(engine)  # type: ignore[misc]
        running = asyncio.create_task(engine.run())
        acting: asyncio.Task[None] = asyncio.create_task(_as_coroutine(act(stage)))
        async with asyncio.timeout(2 * PATIENCE_S):
            await asyncio.wait({running, acting}, return_when=asyncio.FIRST_COMPLETED)
        if acting.done():
            acting.result()
        else:
            running.result()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        return stage

    return asyncio.run(run())


async def _as_coroutine(awaitable: Awaitable[None]) -> None:
    await awaitable


async def start(stage: Stage, *names: str, memory_bytes: int = 1 << 30) -> None:
    for name in names:
        stage.join(name, memory_bytes)
    await until(lambda: bool(stage.serving()))


PROMPTS = {"one": "Once upon a time", "two": "The weather " * 20, "three": "A"}


async def answer_all(stage: Stage) -> None:
    """Three answers at once, then a look at what is left over."""
    for name, prompt in PROMPTS.items():
        stage.ask(name, prompt)
    await until(lambda: all(c.end is not None for c in stage.clients.values()))


@pytest.fixture(scope="module")
def undisturbed(model: ServedModel) -> dict[RequestId, Client]:
    async def act(stage: Stage) -> None:
        await start(stage, "a", "b")
        await answer_all(stage)
        await stage.nothing_is_left_over()

    clients = play(model, act).clients
    assert all(len(c.token_ids) == NUM_TOKENS for c in clients.values())
    return clients


def lose_first(stage: Stage) -> None:
    stage.kill(stage.serving()[0])
    stage.join("late")


def lose_last(stage: Stage) -> None:
    stage.kill(stage.serving()[-1])
    stage.join("late")


def lose_all(stage: Stage) -> None:
    for worker_id in stage.serving():
        stage.kill(worker_id)
    stage.join("late")
    stage.join("later")


def leave(stage: Stage) -> None:
    stage.join("late")
    stage.engine.drain(stage.serving()[0])


def join(stage: Stage) -> None:
    stage.join("late")


def join_again(stage: Stage) -> None:
    """The same worker's new process, before the old one was seen to be gone."""
    stage.join(stage.serving()[0].partition(".")[2])


def fail_step(stage: Stage) -> None:
    replica = stage.engine.replicas[0]
    worker_id = stage.serving()[0]
    failed = StepFailed(
        epoch=replica.epoch, step=replica.step_number - 1, reason="link cut", suspect=stage.serving()[1]
    )
    stage.engine.on_step(worker_id, failed)


def come_back(stage: Stage) -> None:
    """The client's connection ends, and it submits again with what it has."""
    stage.engine.client_gone(CLIENT)
    for name, client in stage.clients.items():
        if client.end is None:
            stage.ask(name, PROMPTS[name])


def pause_reading(stage: Stage) -> None:
    for client in stage.clients.values():
        client.reads = False

    def read_again() -> None:
        for client in stage.clients.values():
            client.reads = True

    asyncio.get_running_loop().call_later(0.03, read_again)


STRIKES: tuple[Strike, ...] = (
    lose_first, lose_last, lose_all, leave, join, join_again, fail_step, come_back, pause_reading,
)  # fmt: skip


@pytest.mark.parametrize("moment", ["sent", "run", "answered"])
@pytest.mark.parametrize("strike", STRIKES, ids=lambda s: s.__name__)
def test_answers_are_the_same_whatever_happens_at_whichever_step(
    model: ServedModel, undisturbed: dict[RequestId, Client], strike: Strike, moment: str
) -> None:
    for number in range(1, NUM_TOKENS + 1):

        async def act(stage: Stage, at: int = number) -> None:
            await start(stage, "a", "b")

            def at_step(n: int, m: str) -> None:
                if (n, m) == (at, moment) and stage.serving():
                    strike(stage)

            stage.at_step = at_step
            await answer_all(stage)
            await stage.nothing_is_left_over()

        stage = play(model, act)
        for name, client in stage.clients.items():
            assert isinstance(client.end, Finished), client.end
            assert client.token_ids == undisturbed[name].token_ids
            assert client.text == undisturbed[name].text
        assert not stage.evicted, "a live worker was evicted"


def shards_of(stage: Stage) -> dict[str, HeldShard]:
    """What the workers in service would tell another coordinator, by name."""
    (replica,) = stage.engine.replicas
    digest = stage.engine.model.ref.digest
    return {
        w.partition(".")[2]: HeldShard(epoch=replica.epoch, digest=digest, assignment=assignment)
        for w, assignment in replica.assignments.items()
    }


def test_restarted_coordinator_waits_for_those_who_served_and_leaves_everything_where_it_was(
    model: ServedModel,
) -> None:
    held: dict[str, HeldShard] = {}

    async def before(stage: Stage) -> None:
        await start(stage, "y", "z")
        held.update(shards_of(stage))

    play(model, before)
    assert set(held) == {"y", "z"}

    async def after(stage: Stage) -> None:
        client = stage.ask("one")
        for name in ("a", "b", "z"):
            stage.join(name, held=held.get(name))
        await asyncio.sleep(0.05)  # nothing happens: there is no event to wait for
        assert not stage.engine.replicas
        stage.join("y", held=held["y"])
        await until(lambda: client.end is not None)
        assert shards_of(stage).keys() == held.keys()
        assert all(shards_of(stage)[name].assignment == shard.assignment for name, shard in held.items())

    play(model, after)


def test_those_who_served_and_do_not_come_back_are_not_waited_for_long(model: ServedModel) -> None:
    held: dict[str, HeldShard] = {}

    async def before(stage: Stage) -> None:
        await start(stage, "y", "z")
        held.update(shards_of(stage))

    play(model, before)

    async def after(stage: Stage) -> None:
        await start(stage, "a", "b")
        stage.join("z", held=held["z"])
        assert stage.serving()

    play(model, after)

    async def alone(stage: Stage) -> None:
        stage.join("z", held=held["z"])
        stage.join("a")
        await until(lambda: bool(stage.serving()))

    play(model, alone, reunion_s=0.05)


def test_near_worker_that_joins_takes_the_place_of_a_far_one(model: ServedModel) -> None:
    """Nothing tells that it is near but a measurement that no plan asks for; the first ones are lost, too."""

    async def act(stage: Stage) -> None:
        near, far = stage.join("near", host_id="box"), stage.join("far", host_id="hut")
        stage.slow.add(far)
        await until(lambda: bool(stage.serving()))
        stage.num_lost_probes = 1
        late = stage.join("late", host_id="tower")
        await until(lambda: set(stage.serving()) == {near, late})

    play(model, act, layout="2x1", probe_s=0.05, explore_s=0.01)


def test_who_leaves_lets_its_successor_fetch_what_it_holds(model: ServedModel) -> None:
    async def act(stage: Stage) -> None:
        stage.join("a")
        await until(lambda: bool(stage.serving()))
        successor = stage.join("b")
        (leaver,) = stage.serving()
        stage.engine.drain(leaver)
        await until(lambda: leaver in stage.released)
        assert stage.shared == {leaver: {successor}}

    play(model, act, layout="1x1")


def test_a_loss_ends_the_wait_for_measurements(model: ServedModel) -> None:
    """They may be those of the worker that is lost, and the answer waits for a plan."""

    async def act(stage: Stage) -> None:
        for name in "abcd":
            stage.join(name, host_id=name)
        await until(lambda: bool(stage.serving()) and stage.engine.fleet.is_idle)
        first, second = stage.serving()
        stage.num_lost_probes = num_probes = 100
        stage.engine.drain(first)
        await until(lambda: stage.num_lost_probes < num_probes)
        client = stage.ask("r", max_tokens=200)
        stage.kill(second)
        await until(lambda: client.end is not None)
        assert len(client.token_ids) == 200

    play(model, act, probe_s=3600.0, explore_s=3600.0)


def test_workers_that_cannot_reach_each_other_are_not_put_together_again(model: ServedModel) -> None:
    async def act(stage: Stage) -> None:
        a, b = stage.join("a", host_id="box"), stage.join("b", host_id="hut")
        stage.apart.add(frozenset((a, b)))
        c = stage.join("c", host_id="tower")
        await until(lambda: c in stage.serving())

    play(model, act, layout="2x1")


def test_workers_that_could_not_reach_each_other_are_tried_again_after_a_while(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nothing else happens that would make us plan anew."""
    monkeypatch.setattr(membership, "CUT_S", 1.0)

    async def act(stage: Stage) -> None:
        names = [stage.join(name) for name in "abcd"]
        await until(lambda: len(stage.serving()) == 4 and stage.engine.fleet.is_idle)
        stage.apart |= {frozenset(pair) for pair in itertools.combinations(names, 2)}
        stage.engine.replicas[0].fail(ReplicaFault("a link broke"))
        await until(lambda: stage.engine.shortage is not None)
        assert "can't reach each other" in str(stage.engine.shortage)
        stage.apart.clear()
        await until(lambda: len(stage.serving()) == 4)

    play(model, act, layout="2x2", explore_s=3600.0)


def test_join_takes_over_while_answers_run(model: ServedModel) -> None:
    """The old epoch never waits for the new one to be level, so the new one must get ahead by itself."""

    async def act(stage: Stage) -> None:
        await start(stage, "a", "b")
        client = stage.ask("long", max_tokens=1500)
        await until(lambda: len(client.token_ids) > 5)
        stage.engine.drain(stage.serving()[0])
        stage.join("late")
        await until(lambda: bool(stage.released))
        assert client.end is None, "the worker that leaves had to wait for the answer's end"
        stage.engine.cancel(CLIENT, RequestId("long"))
        await stage.nothing_is_left_over()

    play(model, act)


def test_answers_cancelled_while_they_are_moved_leave_no_blocks(model: ServedModel) -> None:
    async def act(stage: Stage) -> None:
        await start(stage, "a", "b")
        for number in range(6):
            stage.ask(f"r{number}", max_tokens=200)
        await until(lambda: stage.num_steps > 5)

        def at_step(_: int, moment: str) -> None:
            if stage.engine.fleet.preparing and moment == "sent":
                for request in list(stage.engine.requests.by_id.values())[:1]:
                    stage.engine.cancel(CLIENT, request.request_id)

        stage.at_step = at_step
        leave(stage)
        await until(lambda: bool(stage.released))
        for number in range(6):
            stage.engine.cancel(CLIENT, RequestId(f"r{number}"))
        await stage.nothing_is_left_over()

    play(model, act)


@pytest.mark.parametrize("epochs_ago", [0, 1])
def test_worker_lost_between_loading_and_the_switch_is_noticed(model: ServedModel, epochs_ago: int) -> None:
    """The new epoch is ready and the old one has a last step to end: a loss then must not go into service."""

    async def act(stage: Stage) -> None:
        await start(stage, "a", "b")
        client = stage.ask("one", max_tokens=40)
        await until(lambda: len(client.token_ids) > 3)
        old = stage.engine.replicas[0]
        leaver, stayer = stage.serving()
        late = stage.join("late")
        stage.engine.drain(leaver)

        def at_step(_: int, moment: str) -> None:
            if old.phase is Phase.RETIRING and late in stage.live:
                stage.at_step = lambda number, moment: None
                stage.kill(late if epochs_ago == 0 else stayer)
                stage.join("spare")

        stage.at_step = at_step
        await until(lambda: client.end is not None)
        assert isinstance(client.end, Finished)
        await stage.nothing_is_left_over()

    play(model, act)


def test_epoch_that_fails_between_two_steps_is_replaced(model: ServedModel) -> None:
    """Nobody waits for a step's result then, and nobody joins or leaves."""

    async def act(stage: Stage) -> None:
        await start(stage, "a", "b")
        fail_step(stage)
        client = stage.ask("one")
        await until(lambda: client.end is not None)
        assert isinstance(client.end, Finished)
        assert not stage.evicted
        await stage.nothing_is_left_over()

    play(model, act)


def test_silent_suspect_is_lost_and_a_live_one_stays(model: ServedModel) -> None:
    async def act(stage: Stage) -> None:
        await start(stage, "a", "b", "c")
        suspect = stage.serving()[1]
        stage.mute.add(suspect)
        fail_step(stage)
        client = stage.ask("one")
        await until(lambda: client.end is not None)
        assert isinstance(client.end, Finished)
        assert suspect not in stage.engine.membership.members
        assert len(stage.engine.membership.members) == 2

    play(model, act)


def test_the_lease_of_a_shard_in_service_lasts_as_long_as_its_worker_is_heard(model: ServedModel) -> None:
    async def act(stage: Stage) -> None:
        await start(stage, "a", "b")
        engine, passed_s = stage.engine, 0.0
        begun = engine._clock
        engine._clock = lambda: begun() + passed_s
        granted = engine.leases.export()
        assert {lease.worker for lease in granted} == set(stage.serving())
        for _ in range(3):
            ends = max(lease.ends_at for lease in engine.leases.export())
            passed_s += 3000  # of 3600
            for worker_id in stage.serving():
                engine.membership.heard(worker_id, engine._clock())
            await until(lambda ends=ends: all(lease.ends_at > ends for lease in engine.leases.export()))  # type: ignore[misc]
        assert [lease.lease_id for lease in engine.leases.export()] == [lease.lease_id for lease in granted]
        silent = stage.serving()[1]
        passed_s += 3000
        engine.membership.heard(stage.serving()[0], engine._clock())
        passed_s += 3000
        await until(lambda: silent not in engine.membership.members)
        assert not engine.leases.of_worker(silent)

    play(model, act)


def test_worker_that_sends_others_nonsense_is_not_planned_with_again(model: ServedModel) -> None:
    async def act(stage: Stage) -> None:
        await start(stage, "a", "b", "c")
        reporter, culprit = stage.serving()
        replica = stage.engine.replicas[0]
        told = StepFailed(
            epoch=replica.epoch, step=replica.step_number - 1, reason="7 bytes", suspect=culprit, is_nonsense=True
        )
        stage.engine.on_step(reporter, told)
        client = stage.ask("one")
        await until(lambda: client.end is not None)
        assert isinstance(client.end, Finished)
        assert culprit not in stage.serving()
        assert "7 bytes" in str(stage.engine.membership.members[culprit].unfit_reason)
        assert not stage.evicted, "it lives, and may be needed when others go"

    play(model, act)


def test_worker_that_answers_while_its_compute_thread_hangs_is_found_by_what_it_tells(model: ServedModel) -> None:
    async def act(stage: Stage) -> None:
        await start(stage, "a", "b", "c")
        client = stage.ask("one")
        await until(lambda: len(client.token_ids) == 2)
        hung = stage.serving()[1]
        stage.hung[hung] = 5.0
        await until(lambda: client.end is not None)
        assert isinstance(client.end, Finished)
        assert stage.evicted == {hung}
        assert hung not in stage.engine.membership.members

    play(model, act, step_floor_s=0.02, step_slack=0.0, stuck_floor_s=4.0)


def test_worker_that_has_been_in_a_step_for_a_short_time_is_left_alone(model: ServedModel) -> None:
    async def act(stage: Stage) -> None:
        await start(stage, "a", "b", "c")
        client = stage.ask("one")
        await until(lambda: len(client.token_ids) == 2)
        (replica,) = stage.engine.replicas
        stage.hung[stage.serving()[1]] = 3.0
        await until(lambda: replica.fault is not None)  # the hard limit of a step
        assert not stage.evicted
        stage.hung.clear()
        await until(lambda: client.end is not None)

    play(model, act, step_floor_s=0.02, step_slack=0.0, stuck_floor_s=4.0, hard_step_s=0.3)


def test_steps_on_slow_machines_are_cut_so_that_none_keeps_others_for_long(model: ServedModel) -> None:
    async def act(stage: Stage) -> None:
        await start(stage, "a", "b")
        (replica,) = stage.engine.replicas
        config = replica.scheduler.config
        pace = replica.plan.prediction.prefill_tokens_per_s
        assert config.max_step_tokens == max(config.max_running, int(pace * 0.01)) < 512
        stage.ask("long", "The weather " * 200)
        await until(lambda: not stage.engine.requests.by_id)
        lengths = [sum(len(part.token_ids) for part in step.parts) for step in stage.steps]
        assert max(lengths) == config.max_step_tokens

    play(model, act, max_step_s=0.01)


def test_refusal_of_too_large_a_request_says_how_many_bytes_are_missing(model: ServedModel) -> None:
    async def act(stage: Stage) -> None:
        for name in ("a", "b"):
            stage.join(name, memory_bytes=9 << 20)
        await until(lambda: bool(stage.serving()))
        (replica,) = stage.engine.replicas
        room = replica.scheduler.blocks.num_blocks * 16
        assert room < model.spec.max_positions
        client = stage.ask("one", max_tokens=model.spec.max_positions)
        assert isinstance(client.end, Failed)
        assert "MiB of it are missing" in client.end.text

    play(model, act)


def test_two_who_ask_at_once_both_hear_the_answers(model: ServedModel) -> None:
    async def act(stage: Stage) -> None:
        await start(stage, "a", "b")
        engine, both = stage.engine, frozenset(stage.serving())
        first = asyncio.create_task(engine.stepper.evict_silent(both))
        await asyncio.sleep(0)
        await asyncio.gather(first, engine.stepper.evict_silent(both))
        assert set(engine.membership.members) == both

    play(model, act)


def test_bug_while_serving_ends_an_epoch_and_not_the_service(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def act(stage: Stage) -> None:
        await start(stage, "a", "b")
        scheduler = stage.engine.replicas[0].scheduler
        monkeypatch.setattr(scheduler, "form_step", lambda now: 1 / 0)
        client = stage.ask("one")
        await until(lambda: client.end is not None)
        assert isinstance(client.end, Finished)

    play(model, act)
    assert "ZeroDivisionError" in caplog.text


def test_bug_while_planning_is_loud_and_tried_again(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def act(stage: Stage) -> None:
        await start(stage, "a", "b")
        with monkeypatch.context() as patched:
            patched.setattr("skynet.coordinator.engine.plan", lambda *args: 1 / 0)
            stage.join("c")
            await until(lambda: "planning failed" in caplog.text)
            client = stage.ask("one")
            await until(lambda: client.end is not None)
        stage.kill(stage.serving()[0])
        await until(lambda: len(stage.serving()) == 2)

    play(model, act)


@pytest.mark.parametrize("token_id", [-1, 2**40, 1_000_000])
def test_received_ids_outside_the_vocabulary_are_refused(model: ServedModel, token_id: int) -> None:
    async def act(stage: Stage) -> None:
        await start(stage, "a", "b")
        client = stage.clients.setdefault(RequestId("bad"), Client(token_ids=[token_id]))
        stage.ask("bad")
        assert isinstance(client.end, Failed)
        assert client.end.error == "ConfigError"

    play(model, act)


def test_one_node_cannot_take_every_place(model: ServedModel) -> None:
    async def act(stage: Stage) -> None:
        await start(stage, "a", "b")
        clients = [stage.ask(f"r{number}") for number in range(4)]
        assert [type(c.end) for c in clients] == [type(None)] * 3 + [Failed]

    play(model, act, max_node_requests=3)


def test_a_request_that_cannot_be_ended_does_not_end_the_coordinator(model: ServedModel) -> None:
    class Broken:
        def push(self, _: int) -> str:
            return ""

        def close(self) -> str:
            raise LookupError("a bug")

        is_stopped = False

    async def act(stage: Stage) -> None:
        stage.ask("bad")
        (request,) = stage.engine.requests.by_id.values()
        request.text = cast("Any", Broken())
        stage.engine.client_gone(CLIENT)  # to be cancelled soon, which this one can't be
        await until(lambda: not stage.engine.requests.by_id)
        assert isinstance(request.end, Failed)
        assert "LookupError" in request.end.text
        await start(stage, "a", "b")
        good = stage.ask("good")
        await good.ended.wait()
        assert isinstance(good.end, Finished)

    play(model, act, orphan_s=0.02)


def test_people_are_told_what_is_really_being_waited_for(model: ServedModel) -> None:
    """Before: "no worker has joined yet" while they loaded, and "spare" for who waited for the others."""

    async def act(stage: Stage) -> None:
        engine = stage.engine
        client = stage.ask("one")
        assert stage.notices == ["waiting for workers: no worker has joined yet"]
        early = stage.join("a")
        late = WorkerId("w" * 26 + ".b")
        stage.loading.add(late)
        stage.join("b")
        assert engine.why_waiting == "2 workers are there, a plan is being made"
        await until(lambda: engine.why_waiting == "1 of 2 workers load their layers")
        states = {w: state_of(m, engine.fleet) for w, m in engine.membership.members.items()}
        assert states == {early: "waiting for peers", late: "preparing"}
        (replica,) = engine.fleet.preparing
        report = LoadProgress(epoch=replica.epoch, bytes_done=37, bytes_total=100, bytes_by_source={})
        engine.on_worker(late, report)
        assert engine.why_waiting == "1 of 2 workers load their layers (30%)"
        assert state_of(engine.membership.members[late], engine.fleet) == "loading 37%"
        await until(lambda: stage.notices[-1] == "waiting for workers: 1 of 2 workers load their layers (30%)")
        engine.on_worker(late, Prepared(epoch=replica.epoch, weight_bytes=1, kv_bytes=1))
        await until(lambda: client.end is not None)
        await until(lambda: engine.why_waiting is None)
        assert {state_of(m, engine.fleet) for m in engine.membership.members.values()} == {"serving"}

    play(model, act)


def test_a_plan_made_elsewhere_is_the_one_that_is_carried_out(model: ServedModel, tmp_path: Path) -> None:
    """Before: made from what workers claim, not from what steps and measurements showed of them."""

    async def act(stage: Stage) -> None:
        stage.slow.add(WorkerId("w" * 26 + ".c"))
        await start(stage, "a", "b", "c")
        engine = stage.engine
        engine.observations.fold(stage.serving(), 4.0, engine.membership.usable())
        told = json.loads(json.dumps(profiles(engine)))
        corrected = engine.observations.corrected(engine.membership.usable())
        assert corrected != engine.membership.usable()
        assert {WorkerId(w): msgspec.convert(p, WorkerProfile) for w, p in told["workers"].items()} == corrected
        assert tuple(msgspec.convert(told["links"], list[LinkProfile])) == engine.survey.links()
        text = plan_for(
            None, None, told, objective=None, layout=None, dtype=None,
            as_json=True, cache_dir=tmp_path, hub_endpoint=None,
        )  # fmt: skip
        config, links = engine.config.planner, engine.survey.links()
        assert json.loads(text) == plan_as_dict(plan(model.spec, corrected, links, config))

    play(model, act)


def test_a_worker_that_leaves_as_it_should_is_no_warning(model: ServedModel, caplog: pytest.LogCaptureFixture) -> None:
    async def act(stage: Stage) -> None:
        await start(stage, "a")
        (only,) = stage.serving()
        stage.engine.drain(only)
        await until(lambda: only in stage.released)
        await until(lambda: not stage.engine.replicas)

    with caplog.at_level("INFO", logger="skynet.coordinator"):
        play(model, act, layout=None)
    said = [(r.levelname, r.getMessage().split(" epoch=")[0].split(" worker=")[0]) for r in caplog.records]
    assert ("INFO", "worker left") in said
    assert ("INFO", "replica ended") in said
    assert not [message for level, message in said if level == "WARNING" and "not enough" not in message]


FORGED = "disk full\n2026 INFO all is well \x1b[2J" + "x" * 5000


def one_bounded_line(text: str) -> bool:
    return "disk full 2026" in text and text.isprintable() and len(text) < 1200


def test_what_a_worker_says_reaches_log_and_status_in_one_bounded_line(model: ServedModel) -> None:
    async def act(stage: Stage) -> None:
        stage.loading.add(WorkerId("w" * 26 + ".a"))
        worker_id = stage.join("a")
        await until(lambda: bool(stage.engine.fleet.preparing))
        (replica,) = stage.engine.fleet.preparing
        stage.engine.on_worker(worker_id, PrepareFailed(epoch=replica.epoch, reason=FORGED))
        member = stage.engine.membership.members[worker_id]
        await until(lambda: member.unfit_reason is not None)
        assert member.unfit_reason is not None
        assert one_bounded_line(member.unfit_reason)

    play(model, act, layout=None)


def test_what_a_worker_says_of_a_failed_step_is_logged_in_one_bounded_line(
    model: ServedModel, caplog: pytest.LogCaptureFixture
) -> None:
    async def act(stage: Stage) -> None:
        await start(stage, "a", "b")
        replica = stage.engine.replicas[0]
        stage.engine.on_step(stage.serving()[0], StepFailed(epoch=replica.epoch, step=0, reason=FORGED))
        await until(lambda: bool(stage.serving()) and replica not in stage.engine.replicas)

    play(model, act)
    told = [r.getMessage() for r in caplog.records if "disk full" in r.getMessage()]
    assert {message.split(" epoch=")[0] for message in told} == {"step failed", "replica broken"}
    assert all(one_bounded_line(message) for message in told)


def test_whom_a_worker_says_it_cannot_reach_is_logged_in_one_bounded_line(
    model: ServedModel, caplog: pytest.LogCaptureFixture
) -> None:
    async def act(stage: Stage) -> None:
        stage.loading.add(WorkerId("w" * 26 + ".a"))
        worker_id = stage.join("a")
        await until(lambda: bool(stage.engine.fleet.preparing))
        (replica,) = stage.engine.fleet.preparing
        stage.engine.on_worker(worker_id, Linked(epoch=replica.epoch, unreachable=(PeerId(FORGED),)))
        await until(lambda: replica not in stage.engine.fleet.preparing)

    play(model, act, layout=None)
    told = [r.getMessage() for r in caplog.records if "disk full" in r.getMessage()]
    assert told
    assert all(one_bounded_line(message) for message in told)


def test_nonsense_while_a_cache_is_built_ahead_leaves_its_sender_out_and_the_old_epoch_serving(
    model: ServedModel,
) -> None:
    async def act(stage: Stage) -> None:
        await start(stage, "a", "b")
        client = stage.ask("one", max_tokens=300)
        await until(lambda: len(client.token_ids) > 3)
        (old,) = stage.engine.replicas
        leaver, stayer = stage.serving()
        late = stage.join("late")
        stage.engine.drain(leaver)

        def at_step(_: int, moment: str) -> None:
            step = stage.steps[-1]
            fresh = next((r for r in stage.engine.fleet.preparing if r.epoch == step.epoch), None)
            if moment == "sent" and fresh is not None and late in fresh.workers:
                told = StepFailed(epoch=step.epoch, step=step.step, reason="7 bytes", suspect=late, is_nonsense=True)
                stage.engine.on_step(stayer, told)

        stage.at_step = at_step
        member = stage.engine.membership.members[late]
        await until(lambda: member.unfit_reason is not None)
        assert "building ahead" in str(member.unfit_reason)
        assert "7 bytes" in str(member.unfit_reason)
        assert stage.engine.replicas == [old]
        stage.join("spare")
        await until(lambda: client.end is not None)
        assert isinstance(client.end, Finished)
        assert late not in stage.serving()
        await stage.nothing_is_left_over()

    play(model, act)


def test_status_shows_what_a_worker_serves_with_while_it_loads_something_else_beside(model: ServedModel) -> None:
    async def act(stage: Stage) -> None:
        await start(stage, "a", "b")
        leaver, stayer = stage.serving()
        stage.loading.add(stayer)
        stage.join("late")
        stage.engine.drain(leaver)
        await until(lambda: bool(stage.engine.fleet.preparing))
        (fresh,) = stage.engine.fleet.preparing
        stage.engine.on_worker(stayer, Prepared(epoch=fresh.epoch, weight_bytes=90, kv_bytes=91))
        server = SimpleNamespace(
            engine=stage.engine,
            model=model,
            membership=stage.engine.membership,
            config=SimpleNamespace(name="played"),
            swarm_key=SimpleNamespace(fingerprint=""),
            gatekeeper=SimpleNamespace(mode="lan"),
        )
        told = {w["id"]: w for w in describe(cast(CoordinatorServer, server), 0)["workers"]}
        assert (told[stayer]["weight_bytes"], told[stayer]["kv_bytes"]) == (1, 1)

    play(model, act)


LONG = "a time and " * 450  # more characters than are read at once


def test_long_prompts_are_read_beside_the_loop_one_at_a_time(model: ServedModel) -> None:
    async def act(stage: Stage) -> None:
        await start(stage, "a", "b")
        clients = [stage.ask(f"long{number}", LONG) for number in range(2)]
        short = stage.ask("short")
        assert len(stage.engine.answers.reader.waiting) == 2
        assert [request_id for _, request_id in stage.engine.requests.by_id] == ["short"]
        again = stage.ask("long1", LONG)  # who comes back meanwhile is one request
        assert stage.engine.num_requests == 3
        await until(lambda: all(client.ended.is_set() for client in (*clients, short)))
        assert again is clients[1]
        assert [len(client.token_ids) for client in (*clients, short)] == [NUM_TOKENS] * 3
        await stage.nothing_is_left_over()

    play(model, act)


def test_a_request_that_is_cancelled_while_its_prompt_is_read_never_begins(model: ServedModel) -> None:
    async def act(stage: Stage) -> None:
        await start(stage, "a", "b")
        client = stage.ask("long", LONG)
        stage.engine.cancel(CLIENT, RequestId("long"))
        assert isinstance(client.end, Finished)
        assert client.end.reason == "cancelled"
        other = stage.ask("other", LONG)  # is read after that one
        await other.ended.wait()
        assert not client.token_ids
        await stage.nothing_is_left_over()

    play(model, act)


def test_text_that_cannot_fit_is_refused_before_it_is_read(model: ServedModel) -> None:
    async def act(stage: Stage) -> None:
        await start(stage, "a", "b")
        client = stage.ask("one", "\N{LATIN SMALL LETTER E WITH ACUTE}" * 500_000)
        assert isinstance(client.end, Failed)
        assert client.end.error == "PromptTooLong"
        assert "the prompt has 500000 characters" in client.end.text
        assert not stage.engine.answers.reader.waiting

    play(model, act)


def test_worker_that_could_not_load_gets_another_chance_when_it_is_needed(model: ServedModel) -> None:
    async def act(stage: Stage) -> None:
        stage.unfit.add(stage.join("a"))
        stage.join("b")
        client = stage.ask("one")
        await until(lambda: stage.engine.shortage is not None and "1 are there" in str(stage.engine.shortage))
        stage.unfit.clear()
        await until(lambda: client.end is not None)
        assert isinstance(client.end, Finished)

    play(model, act, layout="2x1", unfit_s=0.05)


def test_client_that_comes_back_for_an_answer_that_ended_gets_all_of_it(model: ServedModel) -> None:
    async def act(stage: Stage) -> None:
        await start(stage, "a", "b")
        client = stage.ask("one")
        await until(lambda: len(client.token_ids) == 3)
        stage.engine.client_gone(CLIENT)
        await until(lambda: not stage.engine.requests.by_id)
        assert not client.ended.is_set()
        stage.ask("one")
        assert isinstance(client.end, Finished)
        assert len(client.token_ids) == NUM_TOKENS

    play(model, act)


def test_client_that_does_not_read_is_told_in_order_when_it_reads_again(model: ServedModel) -> None:
    async def act(stage: Stage) -> None:
        await start(stage, "a", "b")
        client = stage.ask("one")
        await until(lambda: len(client.token_ids) == 3)
        client.reads = False
        await until(lambda: not stage.engine.requests.by_id)
        assert not client.ended.is_set()
        client.reads = True
        await client.ended.wait()
        assert len(client.token_ids) == NUM_TOKENS
        assert not stage.engine.answers.behind

    play(model, act)


def test_what_is_remembered_of_finished_answers_is_bounded(model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skynet.coordinator.requests.MAX_FINISHED_TOKENS", 60)

    async def act(stage: Stage) -> None:
        await start(stage, "a", "b")
        for number in range(20):
            client = stage.ask(f"r{number}")
            await until(lambda c=client: c.end is not None)  # type: ignore[misc]
        assert sum(r.num_tokens for r in stage.engine.requests.done.values()) <= 60

    play(model, act)
