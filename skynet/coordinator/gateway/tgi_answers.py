"""What clients of Text Generation Inference get: an event for each token, or one object. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from skynet.coordinator.gateway.desk import Event
from skynet.coordinator.gateway.errors import ApiError
from skynet.coordinator.gateway.served_names import ServedName
from skynet.coordinator.gateway.tgi_requests import Asked
from skynet.protocol.messages import Finished, Submit, Tokens

REASONS: Final[Mapping[str, str]] = {
    "eos": "eos_token",
    "stop": "stop_sequence",
    "length": "length",
    "cancelled": "stop_sequence",
}
KINDS: Final[Mapping[int, str]] = {429: "overloaded", 503: "overloaded", 500: "generation", 504: "generation"}


def tgi_body(error: ApiError) -> dict[str, object]:
    """TGI's form of errors."""
    return {"error": error.message, "error_type": KINDS.get(error.status, "validation")}


@dataclass(slots=True)
class TgiAnswer:
    """Grows as events come; see `reply.Answer`.

    The last event of a stream carries the whole text, so a token that may be the last is held back until that is known.
    """

    name: str
    served: ServedName
    asked: Asked
    is_list: bool = False  # as the route without a name has it
    _text: str = ""
    _tokens: list[dict[str, Any]] = field(default_factory=list)
    _num_sent: int = 0
    _end: Finished | None = None

    @property
    def submits(self) -> tuple[Submit, ...]:
        return (self.asked.submit,)

    @property
    def is_stream(self) -> bool:
        return self.asked.is_stream

    @property
    def prompt_param(self) -> str:
        return "inputs"

    def take(self, event: Event) -> bytes:
        """See `reply.Answer`."""
        if isinstance(event.message, Finished):
            self._end = event.message
            return b""
        self._text += event.message.text
        self._tokens += self._described(event.message)
        if not self.is_stream:
            return b""
        num_sure = len(self._tokens) - self._may_be_last()
        sure, self._num_sent = self._tokens[self._num_sent : num_sure], max(num_sure, self._num_sent)
        first = self._num_sent - len(sure)
        return b"".join(_sse(self._event(first + number, token)) for number, token in enumerate(sure, 1))

    def _described(self, message: Tokens) -> list[dict[str, Any]]:
        """Tokens, with the text they add together at the last of them that isn't a mark. What no token can take joins
        one that was held back, or is a token of its own."""
        described = []
        for place, token_id in enumerate(message.token_ids):
            is_special = token_id in self.served.hidden_ids
            text = self.served.token_text(token_id) if is_special else ""
            logprob = message.logprobs[place].logprob if place < len(message.logprobs) else 0.0
            described.append({"id": token_id, "text": text, "logprob": logprob, "special": is_special})
        takers = [token for token in (*self._tokens[self._num_sent :], *described) if not token["special"]]
        if takers:
            takers[-1]["text"] += message.text
        elif message.text:
            described.insert(0, {"id": 0, "text": message.text, "logprob": 0.0, "special": False})
        return described

    def _may_be_last(self) -> bool:
        submit = self.asked.submit
        return (
            bool(submit.stop)
            or len(self._tokens) >= submit.max_tokens
            or (bool(self._tokens[-1:]) and self._tokens[-1]["special"])
        )

    def last(self) -> bytes:
        """See `reply.Answer`."""
        assert self._end is not None
        if not self.is_stream:
            whole: dict[str, Any] = {"generated_text": self.asked.opening + self._text}
            if self.asked.has_details:
                whole["details"] = self._details(self._end) | {"prefill": [], "tokens": self._tokens}
            return msgspec.json.encode([whole] if self.is_list else whole)
        rest = self._tokens[self._num_sent :] or [{"id": 0, "text": "", "logprob": 0.0, "special": True}]
        events = [self._event(self._num_sent + number, token) for number, token in enumerate(rest, 1)]
        events[-1]["generated_text"] = self.asked.opening + self._text
        events[-1]["details"] = self._details(self._end) | {"input_length": self._end.prompt_tokens}
        return b"".join(map(_sse, events))

    def _details(self, end: Finished) -> dict[str, Any]:
        reason, count = REASONS[end.reason], end.completion_tokens
        return {"finish_reason": reason, "generated_tokens": count, "seed": self.asked.seed}

    def _event(self, index: int, token: Mapping[str, Any]) -> dict[str, Any]:
        return {"index": index, "token": token, "generated_text": None, "details": None}

    def failure(self, error: ApiError) -> bytes:
        """See `reply.Answer`."""
        return _sse(tgi_body(error))

    def refusal(self, error: ApiError) -> bytes:
        """See `reply.Answer`."""
        return msgspec.json.encode(tgi_body(error))


def _sse(value: object) -> bytes:
    return b"data:" + msgspec.json.encode(value) + b"\n\n"
