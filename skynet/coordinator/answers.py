"""Requests from Submit to Finished: admitted, handed to replicas, told to their clients, cancelled, given up."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from skynet.coordinator.engine_config import EngineConfig
from skynet.coordinator.fleet import Fleet
from skynet.coordinator.reading import PromptReader, Reading, is_long
from skynet.coordinator.replica import Replica, ReplicaFault
from skynet.coordinator.requests import FinishReason, Request, RequestTable, end_of_answer, node_of
from skynet.coordinator.scheduler import Sequence, SequenceProgress
from skynet.coordinator.served import ServedModel
from skynet.coordinator.text import AnswerText
from skynet.errors import (
    CapacityError,
    ConfigError,
    NotServed,
    PromptTooLong,
    QueueFull,
    RequestFailed,
    SkyNetError,
)
from skynet.protocol.ids import PeerId, RequestId, SequenceId
from skynet.protocol.messages import Failed, Finished, Notice, Submit, ToClient, Tokens
from skynet.protocol.steps import SequencePart

logger = logging.getLogger(__name__)
Tell = Callable[[PeerId, ToClient], bool]


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A Submit as tokens."""

    ids: list[int]
    max_tokens: int
    eos_ids: frozenset[int]
    text: AnswerText  # with what the client has received pushed into it


class Answers:
    """See the module. A fault anywhere ends an epoch, never a request: its sequence goes on with the ids it has.

    `tell` sends a message to a client and never waits. False: it isn't connected or doesn't read; it is told later.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: ServedModel,
        fleet: Fleet,
        tell: Tell,
        on_change: Callable[[], None],
        clock: Callable[[], float],
        why_waiting: Callable[[], str | None],
    ) -> None:
        self._why_waiting = why_waiting
        self.requests = RequestTable()
        self.behind: dict[tuple[str, RequestId], Request] = {}  # whose clients don't read as fast as they are told
        self._config = config
        self._model = model
        self._fleet = fleet
        self._tell = tell
        self._on_change = on_change
        self._clock = clock
        self._sequence_ids = itertools.count(1)
        self.reader: PromptReader[_Prompt] = PromptReader(self._read, self._has_read, self._refuse)

    # -- from clients

    def submit(self, submit: Submit, client: PeerId) -> None:
        """Start a request, or go on with one that was begun. Refusals are told to the client."""
        try:
            key = (node_of(client), submit.request_id)
            if (known := self.requests.find(*key)) is not None:
                self._resume(known, submit, client)
            elif (reading := self.reader.waiting.get(key)) is not None:
                reading.client, reading.orphaned_at = client, None
            else:
                self._check_room(client)
                self._model.check_length(submit)
                if is_long(submit):
                    self.reader.add(key, Reading(submit, client))
                else:
                    self._begin(submit, client, self._read(submit))
        except (SkyNetError, ValueError) as exc:
            self._refuse(Reading(submit, client), exc)

    def _refuse(self, reading: Reading, exc: Exception) -> None:
        request_id = reading.submit.request_id
        self._tell(reading.client, Failed(request_id=request_id, error=type(exc).__name__, text=str(exc)))

    def _has_read(self, reading: Reading, prompt: _Prompt) -> None:
        request = self._begin(reading.submit, reading.client, prompt)
        if request is not None:
            request.orphaned_at = reading.orphaned_at

    def _begin(self, submit: Submit, client: PeerId, prompt: _Prompt) -> Request | None:
        """None: the client has all of its answer already."""
        if reason := end_of_answer(submit.received, prompt.text, prompt.eos_ids, prompt.max_tokens):
            self._tell_end(submit, client, len(prompt.ids), reason, prompt.text)
            return None
        sequence = Sequence(
            sequence_id=SequenceId(next(self._sequence_ids)),
            user=node_of(client),
            token_ids=[*prompt.ids, *submit.received],
            num_prompt=len(prompt.ids),
            max_tokens=prompt.max_tokens,
            eos_ids=prompt.eos_ids,
            sampling=submit.sampling,
        )
        wait_until = self._clock() + submit.timeout_s
        request = Request(submit=submit, client=client, sequence=sequence, text=prompt.text, wait_until=wait_until)
        self.requests.add(request)
        self._on_change()
        self.dispatch([sequence])
        return request

    def _check_room(self, client: PeerId) -> None:
        if self.num_requests >= self._config.max_requests:
            raise QueueFull(f"{self.num_requests} requests are in progress, at most that many run; try again later")
        node = node_of(client)
        if (num_own := self.requests.num_of(node) + self.reader.num_of(node)) >= self._config.max_node_requests:
            raise QueueFull(f"{num_own} of your requests are in progress, no node may have more; wait for some")

    @property
    def num_requests(self) -> int:
        """In progress, those included whose prompt is still being read."""
        return len(self.requests.by_id) + len(self.reader.waiting)

    def _read(self, submit: Submit) -> _Prompt:
        """Runs in a thread where this takes long: it reads what doesn't change."""
        spec = self._model.spec
        if any(not 0 <= token_id < spec.vocab_size for token_id in submit.received):
            raise ConfigError(f"received token ids must lie in [0, {spec.vocab_size}), some don't")
        if (most := max((token_id for token_id, _ in submit.sampling.logit_bias), default=0)) >= spec.vocab_size:
            raise ConfigError(f"logit_bias names token {most}, this model's ids lie in [0, {spec.vocab_size})")
        ids = self._model.prompt_ids(submit)
        limit = spec.max_positions
        if len(ids) + 1 > limit:
            raise PromptTooLong(f"the prompt has {len(ids)} tokens, the model takes at most {limit - 1}")
        text = self._model.answer_text(submit, ids)
        for token_id in submit.received:
            text.push(token_id)
        eos_ids = frozenset() if submit.ignore_eos else self._model.eos_ids
        return _Prompt(ids, min(submit.max_tokens, limit - len(ids)), eos_ids, text)

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

    def cancel(self, client: PeerId, request_id: RequestId) -> None:
        """Free everything of a client's request at once; unknown ones are fine."""
        key = (node_of(client), request_id)
        if (reading := self.reader.drop(key)) is not None:
            num_received = len(reading.submit.received)
            self._tell(
                client,
                Finished(request_id=request_id, reason="cancelled", prompt_tokens=0, completion_tokens=num_received),
            )
        request = self.requests.find(*key)
        if request is not None and request.end is None:
            request.client = client
            self._finish(request, "cancelled")

    def client_gone(self, client: PeerId) -> None:
        """Keep its answers for a while: it may come back."""
        for request in [*self.requests.of_client(client), *(r for r in self.behind.values() if r.client == client)]:
            request.orphaned_at = self._clock()
            self.behind.pop(request.key, None)
        for reading in self.reader.waiting.values():
            if reading.client == client:
                reading.orphaned_at = self._clock()

    # -- to replicas

    def dispatch(self, sequences: Iterable[Sequence] = ()) -> None:
        """Hand these and the queue to replicas. Without any they wait; so does what has begun and fits in none now.

        What has never begun and fits in none is refused.
        """
        self._fleet.queue.extend(sequences)
        serving = self._fleet.serving
        for sequence in self._fleet.take_queue():
            request = self.requests.by_sequence.get(sequence.sequence_id)
            if request is None:
                continue
            request.shortage = self._place(sequence, serving)
            if not serving or (request.shortage is not None and (request.is_begun or request.num_before)):
                self._fleet.queue.append(sequence)  # the client knows its beginning: it waits for a larger cache
            elif request.shortage is not None:
                self._fail(request, request.shortage)
            else:
                request.is_begun, request.notice = True, None
        self._notify_waiting()

    def _place(self, sequence: Sequence, serving: list[Replica]) -> CapacityError | None:
        """Hand a sequence to the least loaded replica whose cache can ever hold it; else, what the largest lacks."""
        shortages: list[CapacityError] = []
        for replica in sorted(serving, key=lambda r: r.scheduler.num_sequences):
            try:
                replica.scheduler.add(sequence)
            except CapacityError as exc:
                shortages.append(exc)
            else:
                replica.wake.set()
                return None
        return min(shortages, key=lambda exc: exc.missing_bytes, default=None)

    def needed_positions(self) -> int:
        """The KV cache that the longest of the answers which have begun needs to come to its end; 0 without any."""
        return max((r.sequence.max_positions for r in self.requests.by_id.values() if r.is_begun), default=0)

    def _notify_waiting(self) -> None:
        """Tell clients in the queue why, whenever that changes."""
        why = self._why_waiting() if self._fleet.queue else None
        for sequence in self._fleet.queue:
            request = self.requests.by_sequence.get(sequence.sequence_id)
            if request is None or (reason := request.shortage or why) is None:
                continue
            text = f"waiting for workers: {reason}"
            if request.notice != text and self._tell(request.client, Notice(request_id=request.request_id, text=text)):
                request.notice = text

    # -- from replicas

    def take(self, progress: SequenceProgress) -> None:
        """A sequence got its next token."""
        request = self.requests.by_sequence.get(progress.sequence_id)
        if request is None:
            return
        try:
            self._take(request, progress)
        except Exception as exc:  # a bug of ours: it ends this answer and no other
            logger.exception("answer not told request=%s", request.request_id)
            self._fail(request, RequestFailed(f"the coordinator couldn't go on with this answer: {exc!r}"))

    def _take(self, request: Request, progress: SequenceProgress) -> None:
        reason: FinishReason | None = progress.finish_reason
        request.num_faults = 0
        request.take(progress.token_id, progress.logprobs)
        if request.text.is_stopped:
            reason = "stop"
        if reason is None:
            self._flush(request)
        else:
            self._finish(request, reason)

    def blame(self, parts: Iterable[SequencePart], fault: ReplicaFault) -> None:
        """No worker was lost, yet the step failed: a request that keeps failing ends, so that others go on."""
        for part in parts:
            request = self.requests.by_sequence.get(part.sequence_id)
            if request is None:
                continue
            request.num_faults += 1
            if request.num_faults >= self._config.max_faults:
                self._fail(
                    request, RequestFailed(f"its steps failed {request.num_faults} times in a row; the last: {fault}")
                )

    # -- to clients

    def _flush(self, request: Request) -> None:
        """Tell the client what it hasn't been told, in order; `look_after` goes on where it didn't read."""
        while request.orphaned_at is None and (message := request.untold()) is not None:
            if not self._tell(request.client, message):
                self.behind[request.key] = request
                return
            request.told(message)
        self.behind.pop(request.key, None)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        request.finish(reason)
        self._close(request)

    def _fail(self, request: Request, error: SkyNetError) -> None:
        request.end = Failed(request_id=request.request_id, error=type(error).__name__, text=str(error))
        self._close(request)

    def _close(self, request: Request) -> None:
        self._fleet.drop(request.sequence.sequence_id)
        self.requests.close(request)
        self._on_change()
        self._flush(request)

    # -- the passing of time

    def look_after(self, now: float) -> None:
        """Clients that fell behind, answers whose client is gone, requests that have waited long enough."""
        self._notify_waiting()
        queued = {s.sequence_id for s in self._fleet.queue}
        for request in list(self.behind.values()):
            self._guarded(request, self._flush)
        for request in list(self.requests.by_id.values()):
            self._guarded(request, lambda running: self._look_at(running, now, running.sequence.sequence_id in queued))

    def _guarded(self, request: Request, look: Callable[[Request], None]) -> None:
        """A bug of ours that one request shows ends that one, and no other."""
        try:
            look(request)
        except Exception as exc:
            logger.exception("request not looked after request=%s", request.request_id)
            self.behind.pop(request.key, None)
            self._fail(request, RequestFailed(f"the coordinator couldn't go on with this answer: {exc!r}"))

    def _look_at(self, request: Request, now: float, is_queued: bool) -> None:
        if request.orphaned_at is not None and now - request.orphaned_at > self._config.orphan_s:
            self._finish(request, "cancelled")
        elif not is_queued:
            request.wait_until = now + request.submit.timeout_s
        elif now > request.wait_until:
            reason = request.shortage or self._fleet.shortage or "no replica became ready"
            self._fail(request, NotServed(f"waited {request.submit.timeout_s:.0f} s for workers: {reason}"))
