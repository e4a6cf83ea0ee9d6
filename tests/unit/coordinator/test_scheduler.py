"""The scheduler of one replica, driven with explicit steps and a model that is a function of the tokens so far."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from skynet.coordinator.scheduler import Scheduler, SchedulerConfig, Sequence, SequenceProgress, Step
from skynet.errors import CapacityError
from skynet.protocol.ids import SequenceId
from skynet.protocol.steps import Penalties, SamplingParams, SeenTokens, SequencePart

EOS = 0
MODULUS = 97


def model(token_ids: list[int] | tuple[int, ...]) -> int:
    """The next token, given all before it."""
    return hash(tuple(token_ids)) % MODULUS


def answer_of(prompt: list[int], max_tokens: int, eos_ids: frozenset[int] = frozenset()) -> list[int]:
    token_ids = list(prompt)
    while len(token_ids) - len(prompt) < max_tokens:
        token_ids.append(model(token_ids))
        if token_ids[-1] in eos_ids:
            break
    return token_ids[len(prompt) :]


class Cache:
    """What the workers' KV cache holds: a token id per (block, offset). Stale content shows as a wrong answer."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.cells: dict[tuple[int, int], int] = {}

    def run(self, parts: tuple[SequencePart, ...]) -> list[int]:
        for part in parts:
            for offset, token_id in enumerate(part.token_ids):
                position = part.start + offset
                self.cells[part.block_table[position // self.block_size], position % self.block_size] = token_id
        return [model(self.read(part)) for part in parts if part.sample is not None]

    def read(self, part: SequencePart) -> tuple[int, ...]:
        positions = range(part.start + len(part.token_ids))
        return tuple(self.cells[part.block_table[p // self.block_size], p % self.block_size] for p in positions)


def sequence(
    sequence_id: int,
    prompt: int | list[int] = 4,
    max_tokens: int = 4,
    user: str = "ann",
    eos: frozenset[int] = frozenset(),
) -> Sequence:
    token_ids = prompt if isinstance(prompt, list) else [sequence_id + 1] * prompt
    return Sequence(
        sequence_id=SequenceId(sequence_id),
        user=user,
        token_ids=list(token_ids),
        num_prompt=len(token_ids),
        max_tokens=max_tokens,
        eos_ids=eos,
        sampling=SamplingParams(),
    )


def make(num_blocks: int = 64, block_size: int = 4, max_running: int = 8, max_step_tokens: int = 32) -> Scheduler:
    config = SchedulerConfig(
        num_blocks=num_blocks,
        block_size=block_size,
        max_running=max_running,
        max_step_tokens=max_step_tokens,
        block_bytes=1000,
    )
    return Scheduler(config)


def one_step(scheduler: Scheduler, cache: Cache) -> tuple[Step, list[SequenceProgress]]:
    step = scheduler.form_step(0.0)
    assert step is not None
    return step, scheduler.apply(step, cache.run(step.parts), 0.0)


def drain(scheduler: Scheduler, cache: Cache | None = None, limit: int = 10_000) -> dict[int, list[int]]:
    """Run until nothing is left; the answers."""
    cache = cache or Cache(scheduler.config.block_size)
    answers: dict[int, list[int]] = {}
    for _ in range(limit):
        if not scheduler.num_sequences:
            return answers
        for progress in one_step(scheduler, cache)[1]:
            answers.setdefault(progress.sequence_id, []).append(progress.token_id)
    raise AssertionError(f"{scheduler.num_sequences} sequences are unfinished after {limit} steps")


def users_of(step: Step) -> Counter[str]:
    return Counter(run.sequence.user for run in step.runs)


def test_an_idle_scheduler_forms_no_step() -> None:
    assert make().form_step(0.0) is None


def test_a_prompt_of_one_token_starts_at_once() -> None:
    scheduler = make()
    scheduler.add(sequence(1, prompt=1))
    step = scheduler.form_step(0.0)
    assert step is not None
    assert step.parts[0].token_ids == (2,)
    assert step.num_sampled == 1


def test_answers_equal_those_of_each_sequence_alone() -> None:
    scheduler = make()
    sequences = [sequence(i, prompt=3 + i, max_tokens=5 + i, user=f"u{i % 3}") for i in range(6)]
    expected = {s.sequence_id: answer_of(s.token_ids, s.max_tokens) for s in sequences}
    for s in sequences:
        scheduler.add(s)
    assert drain(scheduler) == expected
    scheduler.blocks.check([])


def test_a_long_prompt_enters_in_chunks_and_does_not_stall_decoding() -> None:
    scheduler, cache = make(max_step_tokens=8, max_running=4), Cache(4)
    scheduler.add(sequence(1, max_tokens=20))
    one_step(scheduler, cache)
    scheduler.add(sequence(2, prompt=30, max_tokens=2, user="bob"))
    for start in (0, 7, 14, 21):
        step, progress = one_step(scheduler, cache)
        assert step.num_tokens == 8
        assert [p.sequence_id for p in progress] == [1], "decoding goes on, the unfinished prompt samples nothing"
        assert step.parts[1].start == start
        assert step.parts[1].sample is None
    _, progress = one_step(scheduler, cache)
    assert [p.sequence_id for p in progress] == [1, 2]


def test_end_of_sequence_finishes_and_frees() -> None:
    prompt = next([n] for n in range(1000) if EOS in answer_of([n], 12))
    expected = answer_of(prompt, 50, frozenset({EOS}))
    scheduler = make()
    scheduler.add(sequence(1, prompt=prompt, max_tokens=50, eos=frozenset({EOS})))
    assert drain(scheduler) == {1: expected}
    assert expected[-1] == EOS
    assert scheduler.blocks.num_free == 64


def test_finish_reasons_tell_length_from_end() -> None:
    scheduler, cache = make(), Cache(4)
    scheduler.add(sequence(1, max_tokens=1))
    scheduler.add(sequence(2, max_tokens=3, eos=frozenset(range(MODULUS))))
    assert [p.finish_reason for p in one_step(scheduler, cache)[1]] == ["length", "eos"]


def test_what_can_never_fit_is_refused_with_the_limit_and_the_missing_memory() -> None:
    scheduler = make(num_blocks=4, block_size=4)
    with pytest.raises(CapacityError, match=r"prompt of 10 tokens and answer of up to 12.* holds 17 tokens") as caught:
        scheduler.add(sequence(1, prompt=10, max_tokens=12))
    assert caught.value.missing_bytes == 2000
    scheduler.add(sequence(1, prompt=10, max_tokens=7))
    assert len(drain(scheduler)[1]) == 7


def test_when_blocks_run_out_the_youngest_is_preempted_and_recomputed() -> None:
    scheduler, cache = make(num_blocks=6, block_size=4), Cache(4)
    old, young = sequence(1, prompt=7, max_tokens=14), sequence(2, prompt=7, max_tokens=14)
    expected = {s.sequence_id: answer_of(s.token_ids, s.max_tokens) for s in (old, young)}
    scheduler.add(old)
    scheduler.add(young)
    while not scheduler.stats().num_preemptions:
        one_step(scheduler, cache)
    assert [run.sequence.sequence_id for run in scheduler._running.values()] == [1]
    drain(scheduler, cache)
    assert {s.sequence_id: s.token_ids[7:] for s in (old, young)} == expected


def test_a_cancelled_sequence_frees_its_blocks_while_its_step_runs() -> None:
    scheduler, cache = make(), Cache(4)
    scheduler.add(sequence(1))
    scheduler.add(sequence(2))
    step = scheduler.form_step(0.0)
    assert step is not None
    assert scheduler.cancel(SequenceId(1))
    assert not scheduler.cancel(SequenceId(1))
    progress = scheduler.apply(step, cache.run(step.parts), 0.0)
    assert [p.sequence_id for p in progress] == [2]
    assert scheduler.finish(SequenceId(2))
    assert scheduler.blocks.num_free == 64


def test_a_waiting_sequence_can_be_cancelled() -> None:
    scheduler, cache = make(max_running=1), Cache(4)
    scheduler.add(sequence(1))
    scheduler.add(sequence(2))
    one_step(scheduler, cache)
    assert scheduler.cancel(SequenceId(2))
    assert set(drain(scheduler, cache)) == {1}


def test_a_sequence_is_added_once() -> None:
    scheduler = make()
    scheduler.add(sequence(1))
    with pytest.raises(ValueError, match="here already"):
        scheduler.add(sequence(1))


def test_after_a_reset_nothing_is_lost_and_nothing_repeated() -> None:
    scheduler, cache = make(), Cache(4)
    sequences = [sequence(i, max_tokens=9) for i in range(3)]
    expected = [answer_of(s.token_ids, 9) for s in sequences]
    for s in sequences:
        scheduler.add(s)
    for _ in range(4):
        one_step(scheduler, cache)
    late = scheduler.form_step(0.0)
    assert late is not None
    scheduler.reset()
    assert scheduler.apply(late, cache.run(late.parts), 0.0) == [], "a step of the lost cache counts no more"
    drain(scheduler)
    assert [s.token_ids[4:] for s in sequences] == expected


def test_sequences_move_to_another_replica_with_what_they_have() -> None:
    here, there, cache = make(), make(num_blocks=16, block_size=8), Cache(4)
    sequences = [sequence(i, max_tokens=9) for i in (3, 1, 2)]
    expected = {s.sequence_id: answer_of(s.token_ids, 9) for s in sequences}
    for s in sequences:
        here.add(s)
    for _ in range(3):
        one_step(here, cache)
    moved = here.evacuate()
    assert [s.sequence_id for s in moved] == [1, 2, 3]
    assert here.num_sequences == 0
    assert here.form_step(0.0) is None
    here.blocks.check([])
    for s in moved:
        there.add(s)
    drain(there)
    assert {s.sequence_id: s.token_ids[4:] for s in sequences} == expected


def test_many_requests_of_one_user_do_not_starve_another() -> None:
    scheduler, cache = make(num_blocks=400, max_running=8), Cache(4)
    for i in range(30):
        scheduler.add(sequence(i, max_tokens=100))
    for _ in range(3):
        one_step(scheduler, cache)
    for i in range(30, 34):
        scheduler.add(sequence(i, max_tokens=100, user="bob"))
    step, _ = one_step(scheduler, cache)
    assert users_of(step)["bob"] == 4, "bob's requests take the places of ann's surplus at once"
    assert users_of(step)["ann"] == 4
    preempted = scheduler.stats().num_preemptions
    for _ in range(20):
        one_step(scheduler, cache)
    assert scheduler.stats().num_preemptions == preempted == 4, "and there is no to and fro"


def test_a_long_prompt_leaves_other_users_prompts_their_share_of_the_step() -> None:
    scheduler, cache = make(num_blocks=400, max_step_tokens=40), Cache(4)
    scheduler.add(sequence(1, prompt=900, max_tokens=2))
    one_step(scheduler, cache)
    scheduler.add(sequence(2, prompt=30, max_tokens=2, user="bob"))
    waited = 0
    while not any(p.sequence_id == 2 for p in one_step(scheduler, cache)[1]):
        waited += 1
    assert waited == 1, "two steps of half the budget each"


def test_a_large_request_is_not_overtaken_for_ever_by_small_ones() -> None:
    scheduler, cache = make(num_blocks=16, block_size=4, max_running=4), Cache(4)
    scheduler.add(sequence(0, prompt=8, max_tokens=8))
    one_step(scheduler, cache)
    scheduler.add(sequence(1, prompt=56, max_tokens=4, user="big"))
    for i in range(2, 200):
        scheduler.add(sequence(i, prompt=8, max_tokens=4, user=f"u{i % 2}"))
        if any(p.sequence_id == 1 for p in one_step(scheduler, cache)[1]):
            return
    raise AssertionError("the large request never ran")


def test_steps_in_flight_at_once_never_share_a_sequence() -> None:
    scheduler, cache = make(max_step_tokens=9, max_running=9), Cache(4)
    sequences = [sequence(i, max_tokens=6, user=f"u{i}") for i in range(4)]
    expected = [answer_of(s.token_ids, 6) for s in sequences]
    for s in sequences:
        scheduler.add(s)
    while scheduler.num_sequences:
        first, second = scheduler.form_step(0.0), scheduler.form_step(0.0)
        assert first is not None
        ids = [p.sequence_id for p in (*first.parts, *(second.parts if second else ()))]
        assert len(ids) == len(set(ids))
        for step in filter(None, (first, second)):
            scheduler.apply(step, cache.run(step.parts), 0.0)
    assert [s.token_ids[4:] for s in sequences] == expected


def test_a_wrong_number_of_sampled_tokens_changes_nothing() -> None:
    scheduler = make()
    scheduler.add(sequence(1))
    step = scheduler.form_step(0.0)
    assert step is not None
    with pytest.raises(ValueError, match="sampled 1 tokens, got 2"):
        scheduler.apply(step, [1, 2], 0.0)
    assert [p.token_id for p in scheduler.apply(step, [5], 0.0)] == [5]


def test_the_blocks_of_many_growing_sequences_stay_contiguous() -> None:
    scheduler, cache = make(num_blocks=4000, block_size=16, max_running=64, max_step_tokens=512), Cache(16)
    for i in range(64):
        scheduler.add(sequence(i, prompt=64, max_tokens=200, user=f"u{i % 7}"))
    for _ in range(60):
        step, _ = one_step(scheduler, cache)
    assert len(step.parts) == 64
    for run in step.runs:
        blocks = run.table.blocks
        assert len(blocks) > 4
        assert blocks == tuple(range(blocks[0], blocks[0] + len(blocks)))


@settings(max_examples=100, deadline=None)
@given(arrivals=st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), max_size=40), max_running=st.integers(1, 8))
def test_nobody_who_waits_runs_two_fewer_than_another(arrivals: list[tuple[str, bool]], max_running: int) -> None:
    scheduler, cache = make(num_blocks=1000, max_running=max_running, max_step_tokens=400), Cache(4)
    for sequence_id, (user, is_step) in enumerate(arrivals):
        scheduler.add(sequence(sequence_id, max_tokens=3 + sequence_id % 9, user=user))
        if is_step:
            step = scheduler.form_step(0.0)
            assert step is not None
            counts = users_of(step)
            waiting = {s.user for s in scheduler.sequences()} if scheduler.num_waiting else set()
            waiting = {u for u in waiting if sum(s.user == u for s in scheduler.sequences()) > counts[u]}
            for user in waiting:
                assert max(counts.values()) <= counts[user] + 1
            scheduler.apply(step, cache.run(step.parts), 0.0)
    drain(scheduler, cache)


class Swarm(RuleBasedStateMachine):
    """Random arrivals, steps, cancels, resets and moves between two replicas; the cache tells when a block is wrong."""

    @initialize(
        shape=st.tuples(st.integers(2, 24), st.integers(1, 5), st.integers(1, 5), st.integers(0, 12)),
        other=st.tuples(st.integers(2, 24), st.integers(1, 5), st.integers(1, 5), st.integers(0, 12)),
    )
    def start(self, shape: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> None:
        self.replicas = [make(b, s, r, r + t) for b, s, r, t in (shape, other)]
        self.caches = [Cache(r.config.block_size) for r in self.replicas]
        self.in_flight: list[list[Step]] = [[], []]
        self.expected: dict[int, list[int]] = {}
        self.answers: dict[int, list[int]] = {}
        self.next_id = 0

    @rule(
        prompt=st.lists(st.integers(1, 9), min_size=1, max_size=30),
        max_tokens=st.integers(1, 25),
        user=st.sampled_from("abc"),
        where=st.integers(0, 1),
    )
    def arrive(self, prompt: list[int], max_tokens: int, user: str, where: int) -> None:
        self.next_id += 1
        scheduler = self.replicas[where]
        new = sequence(self.next_id, prompt=prompt, max_tokens=max_tokens, user=user, eos=frozenset({EOS}))
        capacity = scheduler.config.num_blocks * scheduler.config.block_size
        if len(prompt) + max_tokens - 1 > capacity:
            with pytest.raises(CapacityError):
                scheduler.add(new)
            return
        scheduler.add(new)
        self.expected[self.next_id] = answer_of(prompt, max_tokens, frozenset({EOS}))
        self.answers[self.next_id] = []

    @rule(where=st.integers(0, 1))
    def form(self, where: int) -> None:
        step = self.replicas[where].form_step(0.0)
        if step is not None:
            assert 0 < step.num_tokens <= self.replicas[where].config.max_step_tokens
            self.in_flight[where].append(step)
        elif not self.in_flight[where]:
            assert not self.replicas[where].num_sequences, "there is work, nothing is in flight, and no step forms"

    @rule(where=st.integers(0, 1))
    def finish_step(self, where: int) -> None:
        if not self.in_flight[where]:
            return
        step = self.in_flight[where].pop(0)
        for progress in self.replicas[where].apply(step, self.caches[where].run(step.parts), 0.0):
            self.answers[progress.sequence_id].append(progress.token_id)
            done = self.answers[progress.sequence_id] == self.expected[progress.sequence_id]
            assert (progress.finish_reason is not None) == done
            if done:
                del self.expected[progress.sequence_id]

    @rule(pick=st.integers(0, 50))
    @precondition(lambda self: self.expected)
    def cancel(self, pick: int) -> None:
        sequence_id = sorted(self.expected)[pick % len(self.expected)]
        assert sum(replica.cancel(SequenceId(sequence_id)) for replica in self.replicas) == 1
        del self.expected[sequence_id]

    @rule(where=st.integers(0, 1))
    def lose_the_cache(self, where: int) -> None:
        self.replicas[where].reset()
        self.in_flight[where].clear()
        self.caches[where].cells.clear()

    @rule(where=st.integers(0, 1))
    def move(self, where: int) -> None:
        for moved in self.replicas[where].evacuate():
            try:
                self.replicas[1 - where].add(moved)
            except CapacityError:
                self.replicas[where].add(moved)

    @invariant()
    def no_block_is_lost_and_no_sequence_doubled(self) -> None:
        if not hasattr(self, "replicas"):
            return
        ids = []
        for replica in self.replicas:
            replica.blocks.check([run.table for run in replica._running.values()])
            assert len(replica._running) <= replica.config.max_running
            ids += [s.sequence_id for s in replica.sequences()]
        assert sorted(ids) == sorted(self.expected)
        for sequence_id, answer in self.expected.items():
            so_far = self.answers[sequence_id]
            assert so_far == answer[: len(so_far)]

    def teardown(self) -> None:
        for where, replica in enumerate(getattr(self, "replicas", [])):
            while self.in_flight[where]:
                self.finish_step(where)
            for sequence_id, tokens in drain(replica, self.caches[where]).items():
                self.answers[sequence_id] += tokens
                assert self.answers[sequence_id] == self.expected.pop(sequence_id)
            replica.blocks.check([])
        assert not getattr(self, "expected", {}), "everything finishes in the end"


Swarm.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestSwarm = Swarm.TestCase


def test_a_guest_is_built_ahead_and_goes_on_where_the_other_replica_stopped() -> None:
    old, new = (Scheduler(SchedulerConfig(num_blocks=16, block_size=4)) for _ in range(2))
    sequence = Sequence(
        sequence_id=SequenceId(1), user="u", token_ids=[5, 6, 7, 8, 9, 10], num_prompt=6, max_tokens=20,
        eos_ids=frozenset(), sampling=SamplingParams(),
    )  # fmt: skip
    old.add(sequence)

    def decode(scheduler: Scheduler) -> None:
        step = scheduler.form_step(0)
        assert step is not None
        scheduler.apply(step, [100 + len(sequence.token_ids)] * step.num_sampled, 0)

    decode(old)
    built = 0
    while True:
        new.warm(old.sequences())
        step = new.form_warm_step(3, 0)
        if step is None:
            break
        assert step.num_sampled == 0
        assert step.parts[0].start == built
        built += step.num_tokens
        new.apply(step, [], 0)
        if built < 7:
            decode(old)  # the old replica goes on between the steps
    assert built == len(sequence.token_ids) - 1
    for moved in old.evacuate():
        new.add(moved)
    step = new.form_step(0)
    assert step is not None
    assert step.parts[0].token_ids == (sequence.token_ids[-1],)
    assert step.parts[0].start == built
    new.blocks.check([run.table for run in new._running.values()])


def test_guests_that_ended_elsewhere_give_their_blocks_back() -> None:
    scheduler = Scheduler(SchedulerConfig(num_blocks=4, block_size=4))
    sequence = Sequence(
        sequence_id=SequenceId(1), user="u", token_ids=[1] * 9, num_prompt=9, max_tokens=4, eos_ids=frozenset(),
        sampling=SamplingParams(),
    )  # fmt: skip
    scheduler.warm([sequence])
    assert scheduler.blocks.num_free < 4
    scheduler.warm([])
    assert scheduler.blocks.num_free == 4


def test_parts_that_sample_say_what_their_penalties_are_about_also_after_a_loss() -> None:
    scheduler = make(max_step_tokens=8)
    asks = sequence(1, prompt=[9, 9, 7, 6, 5, 4, 3, 2, 9, 8], max_tokens=4)
    penalized = replace(asks, sampling=SamplingParams(penalties=Penalties(frequency=1.0)))
    scheduler.add(penalized)
    told: list[SeenTokens | None] = []
    for token_id in (None, 50, 51, 50):
        step = scheduler.form_step(0)
        assert step is not None
        told.append(step.parts[0].seen)
        scheduler.apply(step, [] if token_id is None else [token_id], 0)
    assert told[0] is None  # a chunk of the prompt
    scheduler.reset()
    for _ in range(2):
        step = scheduler.form_step(0)
        assert step is not None
        last = step.parts[0].seen
        scheduler.apply(step, [1] * step.num_sampled, 0)
    assert last is not None
    assert (list(last.ids[::4]), list(last.counts[::4])) == ([50, 51], [2, 1])


def test_sequences_whose_seen_tokens_do_not_fit_in_one_message_take_turns() -> None:
    config = SchedulerConfig(num_blocks=64, block_size=4, max_running=8, max_step_tokens=99, max_extra_bytes=100)
    scheduler, num_sampled = Scheduler(config), Counter[int]()
    for number in range(1, 7):
        asks = sequence(number, prompt=list(range(10 + number)), max_tokens=100)
        params = SamplingParams(penalties=Penalties(repetition=1.1)) if number < 6 else SamplingParams()
        scheduler.add(replace(asks, sampling=params))
    for _ in range(30):
        step = scheduler.form_step(0)
        assert step is not None
        sizes = [part.extra_bytes for part in step.parts]
        assert sum(sizes) <= 100 or sum(size > 0 for size in sizes) == 1
        num_sampled.update(part.sequence_id for part in step.parts)
        scheduler.apply(step, [3] * step.num_sampled, 0)
    assert num_sampled[6] == 30, "who asks for nothing waits for nobody"
    assert min(num_sampled.values()) >= 8, "one and a half of five fit"
