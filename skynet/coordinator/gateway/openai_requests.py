"""What OpenAI's clients ask, as Submits. Pure: bodies and numbers in, values or ApiErrors out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from skynet.coordinator.gateway.bodies import Body, shown, submit_of, supported_part, validated
from skynet.coordinator.gateway.config import GatewayConfig
from skynet.coordinator.gateway.errors import ApiError
from skynet.coordinator.gateway.served_names import ServedName
from skynet.protocol.ids import RequestId
from skynet.protocol.messages import ChatMessage, Submit
from skynet.protocol.steps import MAX_BIAS, MAX_BIASES, MAX_ID, MAX_LOGPROBS, Penalties, SamplingParams

ZERO: Final = (0, 0.0)
HARMLESS: Final = frozenset(  # they change no answer
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",
    }
)
UNSUPPORTED: Final[dict[str, tuple[object, ...]]] = {  # with the values at which they ask for nothing
    "min_tokens": ZERO,
    "response_format": ({"type": "text"},),
}
UNSUPPORTED_CHAT: Final[dict[str, tuple[object, ...]]] = UNSUPPORTED | {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
}
UNSUPPORTED_COMPLETION: Final[dict[str, tuple[object, ...]]] = UNSUPPORTED | {"suffix": ("",)}
ROLES: Final[Mapping[str, Literal["system", "user", "assistant"]]] = {
    "system": "system",
    "developer": "system",  # the newer name
    "user": "user",
    "assistant": "assistant",
}


class StreamOptions(Body):
    """How a stream is told."""

    include_usage: bool = False
    include_obfuscation: bool = False  # padding against observers; over TLS' own


class _Sampled(Body):
    """What both kinds of requests have."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = 0  # not OpenAI's, but others have it; 0 and -1: no limit
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] = 1
    stop: Any = None
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: dict[str, Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]] = Field(default={}, max_length=MAX_BIASES)
    # These are others' than OpenAI's:
    ignore_eos: bool = False
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    stop_token_ids: list[Annotated[int, Field(ge=0, lt=MAX_ID)]] = Field(default=[], max_length=64)

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens to tell beside each sampled one; None: tell nothing."""
        raise NotImplementedError

    def sampling(self, index: int, default_seed: int) -> SamplingParams:
        """For one of several answers. Raises ApiError."""
        penalties = Penalties(
            repetition=self.repetition_penalty, presence=self.presence_penalty, frequency=self.frequency_penalty
        )
        seed = default_seed if self.seed is None else self.seed % 2**64
        top_k = max(0, self.top_k)
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=top_k,
            seed=seed,
            index=index,
            min_p=self.min_p,
            logprobs=self.num_logprobs,
            penalties=None if penalties == Penalties() else penalties,
            logit_bias=_biases(self.logit_bias),
        )


class _Chat(_Sampled):
    messages: list[Any]
    max_completion_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] = 0

    @property
    def num_logprobs(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise ApiError(
                400, "top_logprobs goes with logprobs: true only", param="top_logprobs", code="invalid_value"
            )
        return self.top_logprobs if self.logprobs else None


class _Completion(_Sampled):
    prompt: Any
    echo: bool = False
    best_of: int | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    def num_logprobs(self) -> int | None:
        if self.echo and self.logprobs is not None:
            raise ApiError(
                400, "logprobs isn't supported together with echo", param="logprobs", code="unsupported_parameter"
            )
        return self.logprobs


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, whichever of the two it is."""

    submits: tuple[Submit, ...]
    is_stream: bool
    includes_usage: bool
    num_per_prompt: int
    has_logprobs: bool = False
    echoes: tuple[str, ...] = ()  # what each answer begins with


def read_chat(body: Mapping[str, Any], config: GatewayConfig, served: ServedName, name: str, seed: int) -> Asked:
    """`/v1/chat/completions`. Raises ApiError."""
    chat = validated(_Chat, supported_part(body, HARMLESS, UNSUPPORTED_CHAT))
    served.check(chat.model)
    if not 0 < len(chat.messages) <= config.max_messages:
        found = len(chat.messages)
        raise ApiError(400, f"messages: 1 to {config.max_messages} are possible, {found} came", param="messages")
    messages = tuple(_message(f"messages.{i}", message) for i, message in enumerate(chat.messages))
    limit = chat.max_completion_tokens or chat.max_tokens or min(config.default_chat_tokens, served.max_positions)
    stop = stop_strings(chat.stop)
    submits = tuple(
        submit_of(
            request_id=RequestId(f"{name}-{index}"),
            messages=messages,
            sampling=chat.sampling(index, seed),
            max_tokens=limit,
            stop=stop,
            ignore_eos=chat.ignore_eos,
            stop_token_ids=tuple(chat.stop_token_ids),
            timeout_s=config.wait_s,
        )
        for index in range(_check_choices(chat.n, config))
    )
    return Asked(submits, chat.stream, _includes_usage(chat), chat.n, chat.logprobs)


def read_completion(body: Mapping[str, Any], config: GatewayConfig, served: ServedName, name: str, seed: int) -> Asked:
    """`/v1/completions`. Raises ApiError."""
    asked = validated(_Completion, supported_part(body, HARMLESS, UNSUPPORTED_COMPLETION))
    served.check(asked.model)
    if asked.best_of is not None and asked.best_of != asked.n:
        raise ApiError(
            400, "best_of isn't supported, unless it equals n", param="best_of", code="unsupported_parameter"
        )
    prompts = _prompts(asked.prompt, config)
    _check_choices(asked.n * len(prompts), config)
    limit, stop = asked.max_tokens or config.default_completion_tokens, stop_strings(asked.stop)
    submits = tuple(
        submit_of(
            request_id=RequestId(f"{name}-{number * asked.n + index}"),
            prompt=prompt,
            sampling=asked.sampling(index, seed),
            max_tokens=limit,
            stop=stop,
            ignore_eos=asked.ignore_eos,
            stop_token_ids=tuple(asked.stop_token_ids),
            timeout_s=config.wait_s,
        )
        for number, prompt in enumerate(prompts)
        for index in range(asked.n)
    )
    echoes = tuple(prompt if asked.echo else "" for prompt in prompts for _ in range(asked.n))
    return Asked(submits, asked.stream, _includes_usage(asked), asked.n, asked.logprobs is not None, echoes)


def stop_strings(stop: object) -> tuple[str, ...]:
    """`stop`: one string or several. Raises ApiError."""
    found = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise ApiError(400, "stop: a string or an array of strings is expected", param="stop", code="invalid_value")
    if len(found) > 16 or any(not 0 < len(text) <= 256 for text in found):
        raise ApiError(400, "stop: at most 16 strings of 1 to 256 characters", param="stop", code="invalid_value")
    return tuple(found)


def _includes_usage(asked: _Sampled) -> bool:
    if asked.stream_options is not None and not asked.stream:
        raise ApiError(400, "stream_options goes with stream: true only", param="stream_options", code="invalid_value")
    return asked.stream_options is not None and asked.stream_options.include_usage


def _check_choices(count: int, config: GatewayConfig) -> int:
    if count > config.max_choices:
        raise ApiError(400, f"n: {count} answers at once, {config.max_choices} at most are possible", param="n")
    return count


def _biases(given: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    """`logit_bias`: token ids, which JSON must write as text. Raises ApiError."""
    if any(not key.isascii() or not key.isdecimal() or len(key) > 9 or int(key) >= MAX_ID for key in given):
        raise ApiError(400, "logit_bias: its keys must be token ids", param="logit_bias", code="invalid_value")
    biases = {int(key): bias for key, bias in given.items()}  # 7 and 07 are one
    return tuple(sorted(biases.items()))


def _prompts(prompt: object, config: GatewayConfig) -> Sequence[str]:
    found = [prompt] if isinstance(prompt, str) else prompt
    if isinstance(found, list) and 0 < len(found) <= config.max_prompts and all(isinstance(p, str) for p in found):
        return found
    if isinstance(found, list) and found and all(isinstance(p, int | list) for p in found):
        raise ApiError(
            400, "prompt: token ids aren't supported, send text", param="prompt", code="unsupported_parameter"
        )
    raise ApiError(
        400,
        f"prompt: a string or an array of 1 to {config.max_prompts} strings is expected",
        param="prompt",
        code="invalid_value",
    )


def _message(place: str, raw: object) -> ChatMessage:
    """One turn. Raises ApiError naming what is wrong with it, by its place."""
    if not isinstance(raw, dict):
        raise ApiError(400, f"{place}: an object is expected", param=place, code="invalid_value")
    message = {key: value for key, value in raw.items() if value is not None and value != []}
    if further := sorted(shown(key) for key in message.keys() - {"role", "content"}):
        param = f"{place}.{further[0]}"
        raise ApiError(400, f"{param} isn't supported here; leave it out", param=param, code="unsupported_parameter")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        expected = ", ".join(ROLES)
        raise ApiError(400, f"{place}.role: one of {expected} is expected", param=f"{place}.role", code="invalid_value")
    return ChatMessage(role=ROLES[role], content=_content(f"{place}.content", message.get("content")))


def _content(place: str, content: object) -> str:
    """Text, or parts of text."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not parts:
        raise ApiError(400, f"{place}: text is expected", param=place, code="invalid_value")
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise ApiError(
                400, f"{place}: parts other than text aren't supported", param=place, code="unsupported_parameter"
            )
        texts.append(text)
    return "".join(texts)
