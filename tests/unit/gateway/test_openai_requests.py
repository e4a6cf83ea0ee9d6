"""What OpenAI's clients may ask, and how it is refused."""

from __future__ import annotations

from typing import Any

import pytest

from skynet.coordinator.gateway.config import GatewayConfig
from skynet.coordinator.gateway.errors import ApiError
from skynet.coordinator.gateway.openai_requests import Asked, read_chat, read_completion
from skynet.protocol.messages import ChatMessage
from skynet.protocol.steps import Penalties

from .played import SERVED

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
CONFIG = GatewayConfig()


def chat(**fields: object) -> Asked:
    return read_chat(CHAT | fields, CONFIG, SERVED, "c", 5)


def completion(**fields: object) -> Asked:
    return read_completion({"prompt": "hi"} | fields, CONFIG, SERVED, "c", 5)


def refused(read: Any, **fields: object) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read(**fields)
    assert 400 <= caught.value.status < 500
    return caught.value


def test_every_parameter_reaches_the_submit() -> None:
    asked = completion(
        model="some/tiny", temperature=0.5, top_p=0.9, top_k=4, seed=-1, n=2, stop="x", max_tokens=9, ignore_eos=True,
        min_p=0.1, presence_penalty=1, frequency_penalty=-1, repetition_penalty=1.5, logit_bias={"7": 2, "3": -1},
        stop_token_ids=[4], logprobs=2, stream=True, stream_options={"include_usage": True},
    )  # fmt: skip
    assert (asked.is_stream, asked.includes_usage, asked.has_logprobs, asked.num_per_prompt) == (True, True, True, 2)
    first, second = asked.submits
    assert (first.prompt, first.max_tokens, first.stop, first.ignore_eos) == ("hi", 9, ("x",), True)
    assert first.stop_token_ids == (4,)
    assert first.request_id != second.request_id
    sampling = first.sampling
    assert (sampling.index, second.sampling.index) == (0, 1)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.5, 0.9, 4, 2**64 - 1)
    assert (sampling.min_p, sampling.logprobs, sampling.logit_bias) == (0.1, 2, ((3, -1.0), (7, 2.0)))
    assert sampling.penalties == Penalties(repetition=1.5, presence=1, frequency=-1)


def test_defaults_are_openais() -> None:
    (submit,) = chat().submits
    sampling = submit.sampling
    assert (sampling.temperature, sampling.top_p, sampling.penalties, sampling.logprobs) == (1, 1, None, None)
    assert sampling.seed == 5  # drawn for this request
    assert submit.max_tokens == SERVED.max_positions  # of a model that takes so few
    assert completion().submits[0].max_tokens == 16


def test_a_conversation_may_come_in_parts_and_with_the_newer_role() -> None:
    turns = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": None},
        {"role": "assistant", "content": "c", "tool_calls": [], "refusal": None},
    ]
    (submit,) = chat(messages=turns).submits
    assert submit.messages == (
        ChatMessage(role="system", content="be brief"),
        ChatMessage(role="user", content="ab"),
        ChatMessage(role="assistant", content="c"),
    )


def test_several_prompts_get_as_many_answers_each() -> None:
    asked = completion(prompt=["a", "b"], n=2, echo=True)
    assert [(s.prompt, s.sampling.index) for s in asked.submits] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert asked.echoes == ("a", "a", "b", "b")


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"},
        {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}},
        {"presence_penalty": 0, "logit_bias": {}, "modalities": ["text"]},
        {"temperature": None, "stop": None, "tools": None, "audio": None, "n": None},
    ],
)
def test_what_asks_for_nothing_changes_nothing(fields: dict[str, object]) -> None:
    assert chat(**fields) == chat()


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("tools", [{"type": "function"}]), ("response_format", {"type": "json_object"}), ("audio", {}),
        ("functions", [{}]), ("reasoning_effort", "high"), ("min_tokens", 3), ("min_tokens", False),
    ],
)  # fmt: skip
def test_an_unsupported_parameter_is_refused_by_name(param: str, value: object) -> None:
    error = refused(chat, **{param: value})
    assert (error.status, error.param, error.code) == (400, param, "unsupported_parameter")


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("temperature", 3), ("temperature", "1"), ("temperature", True), ("top_p", 0), ("top_p", 1.1), ("n", 0),
        ("n", 129), ("n", 1.5), ("seed", 2**64), ("max_tokens", 0), ("max_tokens", -1), ("stop", 3), ("stop", [3]),
        ("stop", [""]), ("stop", ["a"] * 17), ("stream", "yes"), ("stream_options", {"include_usage": True}),
        ("model", 3), ("logit_bias", {"x": 1}), ("logit_bias", {"-1": 1}), ("min_p", 2), ("repetition_penalty", 0),
        ("presence_penalty", 3), ("top_k", -2), ("stop_token_ids", "7"),
    ],
)  # fmt: skip
def test_a_value_that_cant_be_is_refused_by_its_parameters_name(param: str, value: object) -> None:
    for read in (chat, completion):
        error = refused(read, **{param: value})
        assert error.status == 400
        assert (error.param or "").split(".")[0] == param


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"), ("hi", "messages"), (["hi"], "messages.0"), ([{"content": "hi"}], "messages.0.role"),
        ([{"role": "robot", "content": "hi"}], "messages.0.role"), ([{"role": "user"}], "messages.0.content"),
        ([{"role": []}], "messages.0.role"), ([{"role": "user", "content": []}], "messages.0.content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages.0.content"),
        ([{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}], "messages.1.role"),
        ([{"role": "user", "content": "a", "name": "bob"}], "messages.0.name"),
    ],
)  # fmt: skip
def test_a_wrong_turn_is_named_by_its_place(messages: object, param: str) -> None:
    assert refused(chat, messages=messages).param == param


def test_what_doesnt_go_together_is_refused() -> None:
    assert refused(chat, top_logprobs=2).param == "top_logprobs"
    assert refused(completion, echo=True, logprobs=1).param == "logprobs"
    assert refused(completion, n=2, best_of=3).param == "best_of"
    assert completion(n=2, best_of=2) == completion(n=2)
    assert refused(completion, prompt=[1, 2, 3]).code == "unsupported_parameter"
    assert refused(completion, prompt=["a"] * 65).param == "prompt"
    assert refused(completion, prompt=["a"] * 64, n=3).param == "n"
    assert refused(completion, prompt={}).param == "prompt"


def test_an_unknown_parameter_and_an_unknown_model_are_named() -> None:
    assert (refused(chat, temprature=1).param, refused(chat, temprature=1).code) == ("temprature", "unknown_parameter")
    error = refused(chat, model="gpt-4")
    assert (error.status, error.param, error.code) == (404, "model", "model_not_found")
    assert "'tiny'" in str(error)
