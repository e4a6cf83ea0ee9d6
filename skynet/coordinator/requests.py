"""Requests in flight: what a client asked, what it has got, and the text in between."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from skynet.coordinator import scheduler
from skynet.coordinator.text import AnswerText
from skynet.errors import CapacityError
from skynet.protocol.ids import PeerId, RequestId, SequenceId
from skynet.protocol.messages import Failed, Finished, Submit, Tokens
from skynet.protocol.steps import TokenLogprobs

FinishReason = Literal["eos", "stop", "length", "cancelled"]
MAX_FINISHED = 1024  # answers remembered for clients that come back for their end
MAX_FINISHED_TOKENS = 1 << 18  # of all of them together, prompts included
MAX_TOLD_AT_ONCE = 256  # tokens in one message to a client that has some to catch up with


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
    is_begun: bool = False  # a replica has taken it: from then on it isn't refused, and plans leave room for it
    shortage: CapacityError | None = None  # why it waits although replicas serve: none has cache enough for it
    num_faults: int = 0  # steps in a row that failed without a worker being lost
    texts: list[str] = field(default_factory=list)  # what each token that was sampled here added
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of each of them, if the client wants that
    tail: str = ""  # what came out of the text when it ended
    end: Finished | Failed | None = None
    num_told: int = 0  # of the answer's tokens, how many the client was sent: a prefix, never with a gap
    is_tail_told: bool = False
    is_end_told: bool = False

    def __post_init__(self) -> None:
        self.num_told = self.num_before

    @property
    def num_before(self) -> int:
        """Tokens of the answer that the client brought along: they were sampled in a coordinator's earlier life."""
        return len(self.submit.received)

    @property
    def num_known(self) -> int:
        """Tokens of the answer so far."""
        return self.num_before + len(self.texts)

    @property
    def request_id(self) -> RequestId:
        return self.submit.request_id

    @property
    def key(self) -> tuple[str, RequestId]:
        return node_of(self.client), self.submit.request_id

    @property
    def num_tokens(self) -> int:
        """Of prompt and answer, those that logprobs name included: what remembering this costs."""
        return len(self.sequence.token_ids) + len(self.logprobs) * (1 + (self.submit.sampling.logprobs or 0))

    def take(self, token_id: int, logprobs: TokenLogprobs | None = None) -> None:
        """A new token was sampled. The text it adds may be empty (held back as a possible stop)."""
        self.texts.append(self.text.push(token_id))
        if logprobs is not None:
            self.logprobs.append(logprobs)

    def finish(self, reason: FinishReason) -> None:
        """The answer is complete: there is a rest of the text, perhaps, and an end."""
        self.tail = self.text.close()
        self.end = Finished(
            request_id=self.request_id,
            reason=reason,
            prompt_tokens=self.sequence.num_prompt,
            completion_tokens=self.num_known,
        )

    def untold(self) -> Tokens | Finished | Failed | None:
        """The next thing that the client hasn't been sent; None if it has everything."""
        if self.num_told < self.num_known:
            return self._tokens(min(self.num_known, self.num_told + MAX_TOLD_AT_ONCE))
        if self.tail and not self.is_tail_told:
            return Tokens(request_id=self.request_id, position=self.num_known, token_ids=(), text=self.tail)
        return None if self.is_end_told else self.end

    def _tokens(self, end: int) -> Tokens:
        start, num_prompt = self.num_told, self.sequence.num_prompt
        return Tokens(
            request_id=self.request_id,
            position=start,
            token_ids=tuple(self.sequence.token_ids[num_prompt + start : num_prompt + end]),
            text="".join(self.texts[start - self.num_before : end - self.num_before]),
            logprobs=tuple(self.logprobs[start - self.num_before : end - self.num_before]),
        )

    def told(self, message: Tokens | Finished | Failed) -> None:
        """What `untold` gave is on its way."""
        if not isinstance(message, Tokens):
            self.is_end_told = True
        elif message.token_ids:
            self.num_told = message.position + len(message.token_ids)
        else:
            self.is_tail_told = True

    def rewind(self, num_received: int) -> None:
        """The client came back with this many tokens: what is behind them is told again."""
        self.num_told = max(self.num_before, min(num_received, self.num_known))
        self.is_tail_told = self.is_end_told = False


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
    _done_tokens: int = 0

    def find(self, node: str, request_id: RequestId) -> Request | None:
        """A node's own request, running or finished; nobody else's."""
        key = (node, request_id)
        return self.by_id.get(key) or self.done.get(key)

    def add(self, request: Request) -> None:
        self.by_id[request.key] = request
        self.by_sequence[request.sequence.sequence_id] = request

    def close(self, request: Request) -> None:
        """It is over, one way or another."""
        if self.by_id.pop(request.key, None) is None:
            return
        self.by_sequence.pop(request.sequence.sequence_id, None)
        self.done[request.key] = request
        self._done_tokens += request.num_tokens
        while len(self.done) > MAX_FINISHED or (self._done_tokens > MAX_FINISHED_TOKENS and len(self.done) > 1):
            _, forgotten = self.done.popitem(last=False)
            self._done_tokens -= forgotten.num_tokens

    def num_of(self, node: str) -> int:
        """How many of this node's requests are in progress."""
        return sum(owner == node for owner, _ in self.by_id)

    def of_client(self, client: PeerId) -> list[Request]:
        return [r for r in self.by_id.values() if r.client == client]
