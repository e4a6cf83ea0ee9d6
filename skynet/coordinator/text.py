"""Between text and token ids: a model's tokenizer, and answers streamed as text. Needs no torch and no transformers.

What a client has seen after n token ids is a pure function of those ids and of the request, so an answer's text can be
rebuilt anywhere by pushing its ids again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer

from skynet.coordinator.chat_template import ChatTemplate, special_tokens
from skynet.errors import ConfigError, ModelError

REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"  # how decoders show bytes that aren't a whole character
MAX_HELD_TOKENS: Final = 64  # that end in the middle of a character; more of them are garbage, and shown as such
NUM_CONTEXT_TOKENS: Final = 8  # of the prompt, so that an answer's first word keeps its leading space


class IncrementalDetokenizer:
    """Token ids to text as they come, without half characters.

    Together it is what `decode(context + ids)` shows behind the context. That holds for whatever encoding a text can
    give; of ids that no text gives (characters cut short) at most MAX_HELD_TOKENS are held back for a while.
    """

    def __init__(self, tokenizer: Tokenizer, hidden_ids: frozenset[int], context_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._hidden_ids = hidden_ids
        # Decoders treat the first token of a text specially, so the last clean tokens are decoded along with new ones.
        self._window = self._tail([i for i in context_ids if self._is_visible(i)])
        self._num_clean = len(self._window)  # tokens of the window whose text is all shown
        self._num_shown = len(self._decode(self._window))  # characters of the window's text

    def push(self, token_id: int) -> str:
        """The text this token completes; empty in the middle of a character and for special tokens."""
        if not self._is_visible(token_id):
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        if len(self._window) - self._num_clean >= MAX_HELD_TOKENS:
            return self._show(text, moves=True)
        whole = text.rstrip(REPLACEMENT)
        return self._show(whole, moves=self._num_shown < len(whole) == len(text))

    def close(self) -> str:
        """The rest: a character that was never completed."""
        return self._show(self._decode(self._window), moves=True)

    def _show(self, text: str, *, moves: bool) -> str:
        """`moves`: all of the window is shown, so only its newest part need be kept."""
        shown = text[self._num_shown :]
        self._num_shown = max(self._num_shown, len(text))
        if moves:
            del self._window[: self._num_clean]
            self._num_clean = len(self._window)
            self._num_shown = len(self._decode(self._window))
        return shown

    def _tail(self, ids: list[int]) -> list[int]:
        """The last few tokens; a few more where that avoids beginning in the middle of a character."""
        tails = [ids[-count:] for count in range(NUM_CONTEXT_TOKENS, 2 * NUM_CONTEXT_TOKENS)]
        return min(tails, key=lambda tail: self._decode(tail).count(REPLACEMENT))

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _is_visible(self, token_id: int) -> bool:
        return token_id not in self._hidden_ids and self._tokenizer.id_to_token(token_id) is not None


class StopMatcher:
    """Cuts a text before the first stop string to be completed, however the text is cut into pieces.

    Holds back only what might be the start of a stop string. Of those that end at one place the longest counts.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.is_stopped = False

    def push(self, text: str) -> str:
        """What of the text so far can be shown now."""
        if self.is_stopped or not self._stop:
            return "" if self.is_stopped else text
        self._held += text
        ends = [(start + len(s), start) for s in self._stop if (start := self._held.find(s)) >= 0]
        if ends:
            self.is_stopped = True
            return self._release(min(ends)[1])
        return self._release(len(self._held) - self._num_suspect())

    def close(self) -> str:
        """The text ended: what was held back isn't a stop string."""
        return self._release(len(self._held))

    def _release(self, end: int) -> str:
        text, self._held = self._held[:end], "" if self.is_stopped else self._held[end:]
        return text

    def _num_suspect(self) -> int:
        """Length of the longest ending that begins a stop string."""
        longest = min(max(map(len, self._stop)) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if any(s.startswith(self._held[-n:]) for s in self._stop)), 0)


class AnswerText:
    """The text of one answer, from its token ids."""

    def __init__(
        self, detokenizer: IncrementalDetokenizer, stop: Sequence[str] = (), stop_ids: Sequence[int] = ()
    ) -> None:
        self._detokenizer = detokenizer
        self._stop = StopMatcher(stop)
        self._stop_ids = frozenset(stop_ids)
        self._has_stop_id = False

    @property
    def is_stopped(self) -> bool:
        """A stop string or token was found: what is pushed from now on isn't part of the answer."""
        return self._has_stop_id or self._stop.is_stopped

    def push(self, token_id: int) -> str:
        """The text that can be shown now that this token is known; may be empty. A stop token's own text isn't."""
        self._has_stop_id = self._has_stop_id or token_id in self._stop_ids
        if self._has_stop_id:
            return ""
        return self._stop.push(self._detokenizer.push(token_id))

    def close(self) -> str:
        """The rest of the text: no more tokens come. Twice in a row is harmless."""
        return self._stop.push(self._detokenizer.close()) + self._stop.close()


class TextModel:
    """A model's tokenizer, chat template and end-of-text tokens, read from a directory in Hugging Face layout."""

    def __init__(self, directory: Path) -> None:
        """Raises ModelError naming the file that is missing or unreadable."""
        self._directory = directory
        self._tokenizer = _read_tokenizer(directory / "tokenizer.json")
        self._config = _read_json(directory / "tokenizer_config.json")
        self.eos_ids = self._read_eos_ids()
        added = self._tokenizer.get_added_tokens_decoder()
        _ = self.max_token_chars  # now, and not while somebody waits: a large vocabulary takes a tenth of a second
        self.hidden_ids = self.eos_ids | {token_id for token_id, token in added.items() if token.special}

    @property
    def vocab_size(self) -> int:
        """How many ids the tokenizer knows; a model's own vocabulary may be larger."""
        return self._tokenizer.get_vocab_size()

    @cached_property
    def max_token_chars(self) -> int:
        """How much text one token can stand for: as its vocabulary shows it, with some room where texts are normalized.

        (A run of characters that a tokenizer doesn't know may be one token whatever its length: that isn't counted.)
        """
        longest = max(map(len, self._tokenizer.get_vocab(with_added_tokens=True)), default=1)
        return longest if self._tokenizer.normalizer is None else 4 * longest

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with what the tokenizer adds around it (often a begin-of-text token)."""
        return self._tokenizer.encode(text).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """All of the text at once, without special tokens."""
        return self._tokenizer.decode([i for i in token_ids if i not in self.hidden_ids], skip_special_tokens=False)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """Raises ModelError if the model has none, or one that doesn't compile."""
        return ChatTemplate.read(self._directory, self._config)

    def render_chat(self, messages: Sequence[Mapping[str, object]], *, add_generation_prompt: bool = True) -> str:
        """A conversation as the text the model was trained on. Raises ConfigError if its template refuses it."""
        if not messages:
            raise ConfigError("the conversation is empty; give it at least one message")
        variables = special_tokens(self._directory, self._config)
        return self.chat_template.render(messages, variables, add_generation_prompt=add_generation_prompt)

    def encode_chat(self, messages: Sequence[Mapping[str, object]]) -> list[int]:
        """Token ids of a conversation, up to where the model's answer begins. Raises ConfigError."""
        return self._tokenizer.encode(self.render_chat(messages), add_special_tokens=False).ids

    def token_text(self, token_id: int) -> str:
        """One token by itself, as logprobs show it; of a cut character a replacement, of an unknown id nothing."""
        return self._tokenizer.decode([token_id], skip_special_tokens=False)

    def answer(
        self, stop: Sequence[str] = (), prompt_ids: Sequence[int] = (), stop_ids: Sequence[int] = ()
    ) -> AnswerText:
        """A fresh text of an answer to that prompt."""
        context = prompt_ids[-8 * NUM_CONTEXT_TOKENS :]  # more than enough, also where many are special tokens
        return AnswerText(IncrementalDetokenizer(self._tokenizer, self.hidden_ids, context), stop, stop_ids)

    def _read_eos_ids(self) -> frozenset[int]:
        for name in ("generation_config.json", "config.json"):
            value = _read_json(self._directory / name).get("eos_token_id")
            ids = value if isinstance(value, list) else [value] if value is not None else []
            if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
                raise ModelError(f"{self._directory / name}: eos_token_id is {value!r}, expected token ids")
            if ids:
                return frozenset(ids)
        token = special_tokens(self._directory, self._config).get("eos_token")
        token_id = self._tokenizer.token_to_id(token) if token is not None else None
        return frozenset() if token_id is None else frozenset({token_id})


def _read_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise ModelError(f"{path}: there is no such file; SkyNet reads the fast form of a tokenizer (tokenizer.json)")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as exc:  # the library raises plain Exception
        raise ModelError(f"{path}: isn't a tokenizer ({exc}); fetch it again") from exc
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_json(path: Path) -> dict[str, object]:
    """An optional file that holds an object. Raises ModelError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as exc:
        raise ModelError(f"{path}: unreadable ({exc}); fetch it again") from exc
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds {type(value).__name__}, expected an object")
    return value
