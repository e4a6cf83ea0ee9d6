"""What OpenAI's clients get: chunks of a stream, or one object. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import msgspec

from skynet.coordinator.gateway.desk import Event
from skynet.coordinator.gateway.errors import ApiError, openai_body
from skynet.coordinator.gateway.openai_logprobs import CompletionLogprobs, Told, chat_logprobs
from skynet.coordinator.gateway.openai_requests import Asked
from skynet.coordinator.gateway.served_names import ServedName
from skynet.protocol.messages import Finished, Submit, Tokens

DONE: Final = b"data: [DONE]\n\n"
REASONS: Final[Mapping[str, str]] = {"eos": "stop", "stop": "stop", "length": "length", "cancelled": "stop"}
Kind = Literal["chat.completion", "text_completion"]


def sse(value: object) -> bytes:
    """One event of a stream. (JSON has no line ends.)"""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


@dataclass(slots=True)
class OpenAiAnswer:
    """Grows as events come; see `reply.Answer`."""

    name: str
    kind: Kind
    served: ServedName
    created: int  # seconds since 1970
    asked: Asked
    _texts: dict[int, list[str]] = field(default_factory=dict)  # of each choice that has begun
    _ends: dict[int, Finished] = field(default_factory=dict)
    _told: dict[int, list[Told]] = field(default_factory=dict)  # logprobs, if they are wanted
    _offsets: dict[int, CompletionLogprobs] = field(default_factory=dict)

    @property
    def submits(self) -> tuple[Submit, ...]:
        return self.asked.submits

    @property
    def is_stream(self) -> bool:
        return self.asked.is_stream

    @property
    def prompt_param(self) -> str:
        return "messages" if self.kind == "chat.completion" else "prompt"

    def take(self, event: Event) -> bytes:
        """See `reply.Answer`."""
        index, message = event
        is_first = index not in self._texts
        echo = self.asked.echoes[index] if self.asked.echoes else ""
        texts = self._texts.setdefault(index, [echo])
        told: list[Told] = []
        if isinstance(message, Finished):
            self._ends[index] = message
        else:
            told = self._shown(index, message)
            texts.append(message.text)
            self._told.setdefault(index, []).extend(told)
        return self._chunks(event, told, echo if is_first else None) if self.is_stream else b""

    def _shown(self, index: int, message: Tokens) -> list[Told]:
        """Logprobs of what is part of the answer; its end and other marks aren't."""
        hidden, stops = self.served.hidden_ids, self.submits[index].stop_token_ids
        pairs = zip(message.token_ids, message.logprobs, strict=False)  # none come unless they are wanted
        return [(token_id, one) for token_id, one in pairs if token_id not in hidden and token_id not in stops]

    def _chunks(self, event: Event, told: Sequence[Told], opening: str | None) -> bytes:
        """Of a stream, what this event adds; `opening` if nothing was said of this choice before."""
        index, message = event
        pieces = []
        if opening or (opening is not None and self.kind == "chat.completion"):
            pieces.append(self._delta(index, opening, is_first=True))
        if isinstance(message, Finished):
            pieces.append(self._delta(index, "", reason=REASONS[message.reason]))
        elif message.text or told:
            pieces.append(self._delta(index, message.text, told=told))
        return b"".join(map(sse, pieces))

    def last(self) -> bytes:
        """See `reply.Answer`."""
        if not self.is_stream:
            return msgspec.json.encode(self._whole())
        usage = sse(self._chunk([]) | {"usage": self.usage()}) if self.asked.includes_usage else b""
        return usage + DONE

    def failure(self, error: ApiError) -> bytes:
        """See `reply.Answer`."""
        return sse(openai_body(error))

    def refusal(self, error: ApiError) -> bytes:
        """See `reply.Answer`."""
        return msgspec.json.encode(openai_body(error))

    def usage(self) -> dict[str, int]:
        """A prompt counts once, however many answers it gets."""
        prompt = sum(self._ends[i].prompt_tokens for i in sorted(self._ends) if i % self.asked.num_per_prompt == 0)
        completion = sum(end.completion_tokens for end in self._ends.values())
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def _logprobs(self, index: int, told: Sequence[Told]) -> dict[str, Any] | None:
        if not self.asked.has_logprobs or not told:
            return None
        if self.kind == "chat.completion":
            return chat_logprobs(told, self.served.token_text)
        return self._offsets.setdefault(index, CompletionLogprobs()).take(told, self.served.token_text)

    def _delta(
        self, index: int, text: str, *, reason: str | None = None, is_first: bool = False, told: Sequence[Told] = ()
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "logprobs": self._logprobs(index, told), "finish_reason": reason}
        if self.kind == "text_completion":
            choice["text"] = text
        elif is_first:
            choice["delta"] = {"role": "assistant", "content": text}
        else:
            choice["delta"] = {"content": text} if text else {}
        return self._chunk([choice])

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.kind == "chat.completion" else self.kind
        chunk = {
            "id": self.name,
            "object": kind,
            "created": self.created,
            "model": self.served.model_id,
            "choices": choices,
        }
        return chunk | {"usage": None} if self.asked.includes_usage else chunk

    def _whole(self) -> dict[str, Any]:
        choices: list[dict[str, Any]] = []
        for index in sorted(self._texts):
            text, reason = "".join(self._texts[index]), REASONS[self._ends[index].reason]
            told = self._logprobs(index, self._told.get(index, ()))
            choice: dict[str, Any] = {"index": index, "logprobs": told, "finish_reason": reason}
            if self.kind == "chat.completion":
                choice["message"] = {"role": "assistant", "content": text, "refusal": None}
            else:
                choice["text"] = text
            choices.append(choice)
        return {
            "id": self.name,
            "object": self.kind,
            "created": self.created,
            "model": self.served.model_id,
            "choices": choices,
            "usage": self.usage(),
        }
