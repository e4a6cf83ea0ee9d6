"""Which tokens of which sequences the next step of one replica runs: continuous batching, fair between users.

Pure: no torch, sockets or clocks. A step holds one token of each sequence that is decoding, then chunks of prompts
within a token budget. A `Sequence` is the truth about what was said and is all that moves between replicas; KV cache
that is lost (preemption, a new epoch) is computed again from its token ids.

Why everything ends: the oldest running sequence is never preempted, so it finishes; sequences keep their age (their id)
through every preemption and move; and the sequence whose turn it is waits at the head until it fits.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from skynet.coordinator.blocks import BlockManager, BlockTable
from skynet.coordinator.seen import Tally
from skynet.errors import CapacityError
from skynet.protocol.ids import SequenceId
from skynet.protocol.steps import MAX_BIASES, MAX_SEEN, SamplingParams, SeenTokens, SequencePart, TokenLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """The size of a replica's cache and of its steps."""

    num_blocks: int  # KV blocks of every rank
    block_size: int  # positions per KV block
    max_running: int = 64  # sequences in one step
    max_step_tokens: int = 512  # of all sequences in one step; long prompts enter in chunks of what decoding leaves
    block_bytes: int = 0  # of one block over all layers and ranks, to say how much memory is missing; 0: unknown
    max_extra_bytes: int = (
        8 * MAX_SEEN + 16 * MAX_BIASES
    )  # of seen tokens and biases in one step: its message has a limit of 1 MiB

    def __post_init__(self) -> None:
        if not 1 <= self.max_running <= self.max_step_tokens:
            raise ValueError(f"a step of {self.max_step_tokens} tokens can't hold {self.max_running} running sequences")


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """One prompt and its continuation. The scheduler appends to `token_ids`; nothing is ever taken away from them."""

    sequence_id: SequenceId  # grows with arrival: the lower, the older
    user: str  # whom fairness is about
    token_ids: list[int]  # prompt, then answer
    num_prompt: int
    max_tokens: int  # of the answer
    eos_ids: frozenset[int]
    sampling: SamplingParams
    adapter: int = 0
    _tally: Tally | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.sampling.penalties is not None:
            self._tally = Tally(self.sampling.penalties, self.num_prompt)
        if not 1 <= self.num_prompt <= len(self.token_ids):
            raise ValueError(f"a sequence of {len(self.token_ids)} tokens can't have a prompt of {self.num_prompt}")
        if self.num_answered >= self.max_tokens:
            raise ValueError(f"an answer with {self.num_answered} of its {self.max_tokens} tokens is complete already")

    @property
    def num_answered(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def max_positions(self) -> int:
        """Positions whose keys and values may be needed; those of the last token never are."""
        return self.num_prompt + self.max_tokens - 1

    def seen(self) -> SeenTokens | None:
        """What its penalties are about now."""
        return None if self._tally is None else self._tally.after(self.token_ids)


@dataclass(slots=True, eq=False)
class _Running:
    """A sequence that holds KV blocks. Each admission makes a new one, so that late results of an old one are known."""

    sequence: Sequence
    table: BlockTable
    num_computed: int = 0  # positions whose keys and values are in the cache
    is_in_flight: bool = False  # in a step that hasn't come back
    num_passed_over: int = 0  # steps since it last sampled that had no room for what its sampling needs

    @property
    def num_pending(self) -> int:
        return len(self.sequence.token_ids) - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """One token at a time now; before that its prompt, or what was computed once and lost, is being computed."""
        return self.num_pending == 1 and self.num_computed > 0


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """A batch to run. `parts` travels; the rest is for `Scheduler.apply`."""

    parts: tuple[SequencePart, ...]
    runs: tuple[_Running, ...]  # of each part
    formed_at: float

    @property
    def num_tokens(self) -> int:
        return sum(len(part.token_ids) for part in self.parts)

    @property
    def num_sampled(self) -> int:
        """How many token ids the step brings back."""
        return sum(part.sample is not None for part in self.parts)


@dataclass(frozen=True, slots=True)
class SequenceProgress:
    """One sequence got its next token. With a finish reason it is gone from the scheduler."""

    sequence_id: SequenceId
    token_id: int
    finish_reason: Literal["eos", "length"] | None
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """What is going on; counters grow over the scheduler's life."""

    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_preemptions: int
    num_computed_tokens: int  # prompt chunks, decoding and what was computed again


class Scheduler:
    """Schedules one replica. Several steps may be in flight; a sequence is in at most one of them."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.blocks = BlockManager(config.num_blocks, config.block_size)
        self._running: dict[SequenceId, _Running] = {}
        self._guests: dict[SequenceId, _Running] = {}  # decoded elsewhere, soon here: their KV is built ahead
        self._waiting: defaultdict[str, list[Sequence]] = defaultdict(list)  # by user, oldest first, never empty
        self._served: dict[str, int] = {}  # user -> turn of its last admission, while it has sequences here
        self._known: set[SequenceId] = set()
        self._turn = 0
        self._num_preemptions = 0
        self._num_computed_tokens = 0

    # -- what is here

    @property
    def num_sequences(self) -> int:
        return len(self._running) + self.num_waiting

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    def sequences(self) -> list[Sequence]:
        """All of them, oldest first."""
        waiting = (sequence for queue in self._waiting.values() for sequence in queue)
        return sorted((*(run.sequence for run in self._running.values()), *waiting), key=_age)

    def stats(self) -> SchedulerStats:
        return SchedulerStats(
            len(self._running),
            self.num_waiting,
            self.blocks.num_free,
            self._num_preemptions,
            self._num_computed_tokens,
        )

    # -- coming and going

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence, new or from another replica. Raises CapacityError if the cache can never hold it."""
        if sequence.sequence_id in self._known:
            raise ValueError(f"sequence {sequence.sequence_id} is here already")
        self.check_fits(sequence)
        self._known.add(sequence.sequence_id)
        guest = self._guests.pop(sequence.sequence_id, None)
        if guest is None:
            self._enqueue(sequence)
        else:
            self._running[sequence.sequence_id] = guest

    def check_fits(self, sequence: Sequence) -> None:
        """Raise CapacityError if this replica's cache can't hold the sequence at its longest, even alone."""
        missing = self.blocks.blocks_for(sequence.max_positions) - self.blocks.num_blocks
        if missing <= 0:
            return
        limit = self.blocks.num_blocks * self.blocks.block_size + 1
        missing_bytes = missing * self.config.block_bytes
        short = f", {missing_bytes / 2**20:.1f} MiB of it are missing" if missing_bytes else ""
        raise CapacityError(
            f"prompt of {sequence.num_prompt} tokens and answer of up to {sequence.max_tokens}: the swarm's KV cache "
            f"holds {limit} tokens of one request{short}; shorten the prompt, lower max_tokens or add larger workers",
            missing_bytes,
        )

    def warm(self, sequences: Iterable[Sequence]) -> None:
        """Build KV ahead for exactly these sequences, which another replica still runs and `add` will bring here.

        Those that can't have blocks now are left out: they are computed when they come.
        """
        wanted = {sequence.sequence_id: sequence for sequence in sequences}
        for sequence_id in [i for i in self._guests if i not in wanted]:
            self.blocks.free(self._guests.pop(sequence_id).table)
        for sequence_id, sequence in wanted.items():
            guest = self._guests.get(sequence_id)
            if guest is None:
                count = self.blocks.blocks_for(min(len(sequence.token_ids) + 1, sequence.max_positions))
                table = self.blocks.allocate(count, self.blocks.blocks_for(sequence.max_positions))
                if table is not None:
                    self._guests[sequence_id] = _Running(sequence, table)
            else:
                while not self._has_room(guest) and self.blocks.extend(guest.table):
                    pass

    def form_warm_step(self, max_tokens: int, now: float) -> Step | None:
        """The next batch of guests' tokens, all but each one's last; None when they are all built. Samples nothing."""
        chunks: list[tuple[_Running, int]] = []
        for guest in self._guests.values():
            room = len(guest.table.blocks) * self.blocks.block_size - guest.num_computed
            count = min(guest.num_pending - 1, max_tokens, room)
            if count > 0 and not guest.is_in_flight:
                chunks.append((guest, count))
                max_tokens -= count
        if not chunks:
            return None
        for guest, _ in chunks:
            guest.is_in_flight = True
        return Step(tuple(_part(guest, count) for guest, count in chunks), tuple(guest for guest, _ in chunks), now)

    def cancel(self, sequence_id: SequenceId) -> bool:
        """Forget a sequence and free its blocks at once, also while a step with it runs; False if it isn't here."""
        guest = self._guests.pop(sequence_id, None)
        if guest is not None:
            self.blocks.free(guest.table)
            return True
        if sequence_id not in self._known:
            return False
        self._known.remove(sequence_id)
        run = self._running.pop(sequence_id, None)
        if run is not None:
            self.blocks.free(run.table)
            sequence = run.sequence
        else:
            sequence = next(s for queue in self._waiting.values() for s in queue if s.sequence_id == sequence_id)
            self._dequeue(sequence)
        if sequence.user not in self._waiting and not self._counts()[sequence.user]:
            self._served.pop(sequence.user, None)
        return True

    finish = cancel  # for those who end an answer outside: a stop string was found

    def reset(self) -> None:
        """The cache is lost: whatever ran waits again, and results of steps in flight no longer count."""
        for run in list(self._running.values()):
            self._requeue(run)

    def evacuate(self) -> list[Sequence]:
        """Hand out every sequence, oldest first, for another replica's `add`; this scheduler is empty then."""
        sequences = self.sequences()
        self.warm(())
        self.reset()
        self._waiting.clear()
        self._served.clear()
        self._known.clear()
        return sequences

    # -- steps

    def form_step(self, now: float) -> Step | None:
        """The next batch; None when there is nothing to run until something is added or applied."""
        self._make_room_to_decode()
        self._admit()
        # A run without room for its next token (all that could make some is in flight) sits this step out.
        decoding = [run for run in self._ready() if run.is_decoding and self._has_room(run)]
        chunks = [(run, 1) for run in decoding]
        chunks += self._share_budget(self.config.max_step_tokens - len(chunks))
        if not chunks:
            return None
        parts = self._within_limits([(run, _part(run, count)) for run, count in chunks])
        for run, _ in parts:
            run.is_in_flight = True
        return Step(tuple(part for _, part in parts), tuple(run for run, _ in parts), now)

    def _within_limits(self, parts: list[tuple[_Running, SequencePart]]) -> list[tuple[_Running, SequencePart]]:
        """Without those whose seen tokens and biases the step's message has no room for: they come first next time."""
        extras = [(run, part.extra_bytes) for run, part in parts if part.sample is not None]
        if sum(size for _, size in extras) <= self.config.max_extra_bytes:
            return parts
        left, is_first = self.config.max_extra_bytes, True
        passed_over: set[int] = set()
        for run, size in sorted(extras, key=lambda extra: (-extra[0].num_passed_over, _run_age(extra[0]))):
            if not size:
                continue
            if size <= left or is_first:
                left, is_first, run.num_passed_over = left - size, False, 0
            else:
                passed_over.add(run.sequence.sequence_id)
                run.num_passed_over += 1
        return [(run, part) for run, part in parts if run.sequence.sequence_id not in passed_over]

    def apply(
        self,
        step: Step,
        token_ids: Iterable[int],
        now: float,
        logprobs: Iterable[TokenLogprobs | None] = (),
    ) -> list[SequenceProgress]:
        """Take a step's sampled tokens, one for each part that asked, in order of parts; logprobs as many or none.

        Parts of sequences that were cancelled, preempted or moved meanwhile are ignored.
        """
        sampled = list(token_ids)
        if len(sampled) != step.num_sampled:
            raise ValueError(f"step sampled {step.num_sampled} tokens, got {len(sampled)}")
        known = list(logprobs) or [None] * len(sampled)
        tokens = iter(zip(sampled, known, strict=True))
        progress = []
        for part, run in zip(step.parts, step.runs, strict=True):
            token = next(tokens) if part.sample is not None else None
            if not self._is_here(run):
                continue
            run.is_in_flight = False
            run.num_computed += len(part.token_ids)
            self._num_computed_tokens += len(part.token_ids)
            if token is not None:
                progress.append(self._append(run.sequence, *token))
        return progress

    def _append(self, sequence: Sequence, token_id: int, logprobs: TokenLogprobs | None) -> SequenceProgress:
        sequence.token_ids.append(token_id)
        reason: Literal["eos", "length"] | None = None
        if token_id in sequence.eos_ids:
            reason = "eos"
        elif sequence.num_answered >= sequence.max_tokens:
            reason = "length"
        if reason is not None:
            self.cancel(sequence.sequence_id)
        return SequenceProgress(sequence.sequence_id, token_id, reason, logprobs)

    def _ready(self) -> list[_Running]:
        """Those no step in flight has, oldest first."""
        return sorted((run for run in self._running.values() if not run.is_in_flight), key=_run_age)

    # -- blocks

    def _has_room(self, run: _Running) -> bool:
        return self.blocks.blocks_for(len(run.sequence.token_ids)) <= len(run.table.blocks)

    def _make_room_to_decode(self) -> None:
        """Give each decoding sequence the block of its next token, oldest first, preempting others if need be."""
        for run in self._ready():
            while run.is_decoding and self._is_here(run) and not self._has_room(run):
                if not self.blocks.extend(run.table) and not self._preempt_one():
                    break

    def _preempt_one(self) -> bool:
        """Send the youngest sequence of the user who runs most back to wait; False if none can be."""
        counts = self._counts()
        movable = self._movable()
        if not movable:
            return False
        self._requeue(max(movable, key=lambda run: (counts[run.sequence.user], _run_age(run))))
        self._num_preemptions += 1
        return True

    def _movable(self) -> list[_Running]:
        """Those that may be preempted, youngest first: not the oldest of all, and none in a step in flight."""
        oldest = min(self._running, default=None)
        return [run for run in reversed(self._ready()) if run.sequence.sequence_id != oldest]

    def _is_here(self, run: _Running) -> bool:
        sequence_id = run.sequence.sequence_id
        return run in (self._running.get(sequence_id), self._guests.get(sequence_id))

    def _requeue(self, run: _Running) -> None:
        del self._running[run.sequence.sequence_id]
        self.blocks.free(run.table)
        self._enqueue(run.sequence)

    # -- fairness

    def _counts(self) -> Counter[str]:
        return Counter(run.sequence.user for run in self._running.values())

    def _enqueue(self, sequence: Sequence) -> None:
        insort(self._waiting[sequence.user], sequence, key=_age)

    def _dequeue(self, sequence: Sequence) -> None:
        queue = self._waiting[sequence.user]
        queue.remove(sequence)
        if not queue:
            del self._waiting[sequence.user]

    def _admit(self) -> None:
        """Start waiting sequences: of the user who runs fewest, then of the one served longest ago.

        Whose turn it is isn't overtaken when it doesn't fit: else small sequences would keep a large one out for ever.
        A user with at least two fewer running than another doesn't wait for that one to finish, it takes its place.
        """
        budget = self.config.max_step_tokens - sum(run.num_pending for run in self._ready())
        while self._waiting:
            counts = self._counts()
            user = min(self._waiting, key=lambda name: (counts[name], self._served.get(name, 0)))
            sequence = self._waiting[user][0]
            if budget <= 0 and counts[user] > 0:
                return
            needed = self.blocks.blocks_for(min(len(sequence.token_ids) + 1, sequence.max_positions))
            if not self._make_way(counts, user, needed):
                return
            self._start(sequence, needed)
            budget -= len(sequence.token_ids)

    def _make_way(self, counts: Counter[str], user: str, needed: int) -> bool:
        """Room for one more sequence of `needed` blocks, by preempting those who run more; no one if that won't do."""
        counts = counts.copy()
        victims: list[_Running] = []
        free = self.blocks.num_free
        movable = self._movable()
        while free < needed or len(self._running) - len(victims) >= self.config.max_running:
            candidates = [r for r in movable if counts[r.sequence.user] >= counts[user] + 2]
            if not candidates:
                return False
            victim = max(candidates, key=lambda r: (counts[r.sequence.user], _run_age(r)))
            victims.append(victim)
            movable.remove(victim)
            counts[victim.sequence.user] -= 1
            free += len(victim.table.blocks)
        for victim in victims:
            self._requeue(victim)
            self._num_preemptions += 1
        return True

    def _start(self, sequence: Sequence, needed: int) -> None:
        self._dequeue(sequence)
        table = self.blocks.allocate(needed, self.blocks.blocks_for(sequence.max_positions))
        assert table is not None
        self._running[sequence.sequence_id] = _Running(sequence, table)
        self._turn += 1
        self._served[sequence.user] = self._turn

    def _share_budget(self, budget: int) -> list[tuple[_Running, int]]:
        """Prompt chunks: each user's prompts get an equal part of the budget, oldest first; the rest goes by age."""
        prompts = [run for run in self._ready() if not run.is_decoding]
        users = dict.fromkeys(run.sequence.user for run in prompts)
        share = max(1, budget // len(users)) if users else 0
        granted: Counter[SequenceId] = Counter()
        for user in (*users, None):
            allowance = budget if user is None else min(budget, share)
            for run in prompts:
                if user in (None, run.sequence.user):
                    more = min(allowance, run.num_pending - granted[run.sequence.sequence_id])
                    granted[run.sequence.sequence_id] += more
                    allowance, budget = allowance - more, budget - more
        return [(run, granted[run.sequence.sequence_id]) for run in prompts if granted[run.sequence.sequence_id]]


def _age(sequence: Sequence) -> int:
    return sequence.sequence_id


def _run_age(run: _Running) -> int:
    return run.sequence.sequence_id


def _part(run: _Running, count: int) -> SequencePart:
    start, end = run.num_computed, run.num_computed + count
    sequence = run.sequence
    samples = end == len(sequence.token_ids)
    return SequencePart(
        sequence_id=sequence.sequence_id,
        token_ids=tuple(sequence.token_ids[start:end]),
        start=start,
        block_table=run.table.blocks,
        sample=sequence.sampling if samples else None,
        adapter=sequence.adapter,
        seen=sequence.seen() if samples else None,
    )
