"""Requests in flight: what a client asked, what it has got, and the text in between."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from skynet.coordinator import scheduler
from skynet.coordinator.text import AnswerText
from skynet.protocol.ids import PeerId, RequestId, SequenceId
from skynet.protocol.messages import Failed, Finished, Submit, Tokens

FinishReason = Literal["eos", "stop", "length", "cancelled"]
MAX_FINISHED = 1024  # answers remembered for clients that come back for their end


@dataclass(slots=True, eq=False)
class Request:
    """One completion. `sequence.token_ids` is the single truth of what was said; text is a pure function of it."""

    submit: Submit
    client: PeerId
    sequence: scheduler.Sequence
    text: AnswerText
    wait_until: float  # while no replica can run it
    orphaned_at: float | None = None  # since when its client is gone
    notice: str | None = None  # the last one sent
    num_faults: int = 0  # steps in a row that failed without a worker being lost
    sent: list[Tokens] = field(default_factory=list)
    end: Finished | Failed | None = None

    @property
    def request_id(self) -> RequestId:
        return self.submit.request_id

    @property
    def key(self) -> tuple[str, RequestId]:
        return node_of(self.client), self.submit.request_id

    @property
    def output_ids(self) -> list[int]:
        return self.sequence.token_ids[self.sequence.num_prompt :]

    def take(self, token_id: int) -> Tokens:
        """A new token was sampled: what the client is told. Its text may be empty (held back as a possible stop)."""
        position = len(self.output_ids) - 1
        tokens = Tokens(
            request_id=self.request_id, position=position, token_ids=(token_id,), text=self.text.push(token_id)
        )
        self.sent.append(tokens)
        return tokens

    def finish(self, reason: FinishReason) -> list[Tokens | Finished]:
        """The rest of the text and the end."""
        rest = self.text.close()
        num_output = len(self.output_ids)
        end = Finished(
            request_id=self.request_id,
            reason=reason,
            prompt_tokens=self.sequence.num_prompt,
            completion_tokens=num_output,
        )
        self.end = end
        if not rest:
            return [end]
        self.sent.append(Tokens(request_id=self.request_id, position=num_output, token_ids=(), text=rest))
        return [self.sent[-1], end]

    def replay(self, num_received: int) -> Iterator[Tokens | Finished | Failed]:
        """What a client that has the first `num_received` token ids hasn't got."""
        yield from (t for t in self.sent if t.position >= num_received)
        if self.end is not None:
            yield self.end


def end_of_answer(
    output_ids: Sequence[int], text: AnswerText, eos_ids: frozenset[int], max_tokens: int
) -> FinishReason | None:
    """Why an answer of these ids is complete; None if it isn't."""
    if text.is_stopped:
        return "stop"
    if output_ids and output_ids[-1] in eos_ids:
        return "eos"
    return "length" if len(output_ids) >= max_tokens else None


def node_of(peer: PeerId) -> str:
    """The node (a user on a machine) that a process belongs to: whoever asked may come back as another process."""
    return peer.partition(".")[0]


@dataclass(slots=True)
class RequestTable:
    """Requests by node and the client's id, and by the scheduler's; finished ones are kept for a while, bounded."""

    by_id: dict[tuple[str, RequestId], Request] = field(default_factory=dict)
    by_sequence: dict[SequenceId, Request] = field(default_factory=dict)
    done: OrderedDict[tuple[str, RequestId], Request] = field(default_factory=OrderedDict)

    def find(self, node: str, request_id: RequestId) -> Request | None:
        """A node's own request, running or finished; nobody else's."""
        key = (node, request_id)
        return self.by_id.get(key) or self.done.get(key)

    def add(self, request: Request) -> None:
        self.by_id[request.key] = request
        self.by_sequence[request.sequence.sequence_id] = request

    def close(self, request: Request) -> None:
        """It is over, one way or another."""
        self.by_id.pop(request.key, None)
        self.by_sequence.pop(request.sequence.sequence_id, None)
        self.done[request.key] = request
        while len(self.done) > MAX_FINISHED:
            self.done.popitem(last=False)

    def of_client(self, client: PeerId) -> list[Request]:
        return [r for r in self.by_id.values() if r.client == client]
