"""Logprobs as OpenAI writes them, which differs between its two kinds of answers. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

from skynet.protocol.steps import TokenLogprobs

REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
TokenText = Callable[[int], str]
Told = tuple[int, TokenLogprobs]  # a sampled token's id, and what was told of it


def chat_logprobs(told: Iterable[Told], text_of: TokenText) -> dict[str, Any]:
    """Of some tokens of a chat's answer."""
    content = []
    for token_id, one in told:
        top = [_entry(text_of(i), p) for i, p in zip(one.top_ids, one.top_logprobs, strict=True)]
        content.append(_entry(text_of(token_id), one.logprob) | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def _entry(text: str, logprob: float) -> dict[str, Any]:
    """A token that is only a part of a character has no bytes that we know."""
    return {"token": text, "logprob": logprob, "bytes": None if REPLACEMENT in text else list(text.encode())}


@dataclass(slots=True)
class CompletionLogprobs:
    """Of one completion's tokens as they come: `text_offset` goes on from chunk to chunk."""

    _offset: int = 0

    def take(self, told: Iterable[Told], text_of: TokenText) -> dict[str, Any]:
        """Of these tokens, which follow the last ones."""
        tokens, logprobs, tops, offsets = [], [], [], []
        for token_id, one in told:
            text = text_of(token_id)
            tokens.append(text)
            logprobs.append(one.logprob)
            top = {text_of(i): p for i, p in zip(one.top_ids, one.top_logprobs, strict=True)}
            tops.append(top | {text: one.logprob} if one.top_ids else None)
            offsets.append(self._offset)
            self._offset += len(text)
        return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}
