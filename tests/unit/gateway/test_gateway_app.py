"""The application as HTTP clients see it: statuses, forms of errors, bounds, and what happens when a client goes."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skynet.coordinator.gateway.config import GatewayConfig
from skynet.coordinator.gateway.desk import MAX_INBOX, Ask, ClientGone, Room
from skynet.coordinator.gateway.openai_requests import _Chat, _Completion
from skynet.protocol.ids import PeerId, RequestId
from skynet.protocol.messages import Failed, Notice, Submit, ToClient, Tokens
from skynet.protocol.steps import SamplingParams, TokenLogprobs

from .played import OWN, Exchange, World, post, whole_answer

BODY = {"prompt": "hi", "max_tokens": 2}
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
TURN = {"messages": [{"role": "user", "content": "hi"}]}


def silence(_: Submit) -> Sequence[ToClient]:
    return ()


def failing(error: str, text: str = "it is so") -> World:
    return World(lambda submit: [Failed(request_id=submit.request_id, error=error, text=text)])


# -- answers


def test_a_whole_completion_has_openais_form() -> None:
    answered = post(World(), COMPLETIONS, BODY | {"n": 2, "echo": True})
    assert answered.status == 200
    assert answered.answer_headers["content-type"] == "application/json"
    found = answered.json
    assert (found["object"], found["model"]) == ("text_completion", "tiny")
    assert found["choices"] == [
        {"index": i, "text": "hione two", "logprobs": None, "finish_reason": "length"} for i in range(2)
    ]
    assert found["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}


def test_a_streamed_chat_has_openais_chunks() -> None:
    answered = post(World(), CHAT, TURN | {"stream": True, "stream_options": {"include_usage": True}})
    assert answered.answer_headers["content-type"].startswith("text/event-stream")
    assert "content-length" not in answered.answer_headers
    *chunks, done = answered.events
    assert done == "[DONE]"
    *chunks, usage = map(json.loads, chunks)
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "one "},
        {"content": "two"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "length"]
    assert all(chunk["usage"] is None and chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert (usage["choices"], usage["usage"]["total_tokens"]) == ([], 5)


def with_logprobs(submit: Submit) -> list[ToClient]:
    one = TokenLogprobs(logprob=-0.5, top_ids=(7, 9), top_logprobs=(-0.5, -1.5))
    *_, end = whole_answer(submit)
    told = Tokens(request_id=submit.request_id, position=0, token_ids=(7, 8, 0), text="ab", logprobs=(one, one, one))
    return [told, end]


@pytest.mark.parametrize("is_stream", [False, True])
def test_logprobs_have_openais_forms_and_leave_out_the_end_token(is_stream: bool) -> None:
    def choice(path: str, body: dict[str, Any]) -> Any:
        answered = post(World(with_logprobs), path, body | {"stream": is_stream})
        found = [json.loads(e) for e in answered.events[:-1]] if is_stream else [answered.json]
        return next(c["choices"][0]["logprobs"] for c in found if c["choices"][0]["logprobs"])

    found = choice(CHAT, TURN | {"logprobs": True, "top_logprobs": 2})
    assert [entry["token"] for entry in found["content"]] == ["<7>", "<8>"]
    assert found["content"][0]["top_logprobs"][1] == {"token": "<9>", "logprob": -1.5, "bytes": list(b"<9>")}
    assert choice(COMPLETIONS, BODY | {"logprobs": 2}) == {
        "tokens": ["<7>", "<8>"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"<7>": -0.5, "<9>": -1.5}, {"<7>": -0.5, "<9>": -1.5, "<8>": -0.5}],
        "text_offset": [0, 3],
    }


def test_an_error_in_a_stream_that_has_begun_is_its_last_event() -> None:
    def breaks(submit: Submit) -> list[ToClient]:
        return [whole_answer(submit)[0], Failed(request_id=submit.request_id, error="RequestFailed", text="broken")]

    answered = post(World(breaks), COMPLETIONS, BODY | {"stream": True})
    assert answered.status == 200
    assert json.loads(answered.events[-1])["error"]["message"] == "broken"


def test_one_failed_answer_ends_the_others() -> None:
    def says(submit: Submit) -> list[ToClient]:
        is_first = submit.sampling.index == 0
        return [Failed(request_id=submit.request_id, error="RequestFailed", text="broken")] if is_first else []

    world = World(says)
    assert post(world, COMPLETIONS, BODY | {"n": 3}).status == 500
    assert sorted(world.cancelled) == [submit.request_id for _, submit in world.submits[1:]]


# -- refusals


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        ("PromptTooLong", 400, "context_length_exceeded"),
        ("CapacityError", 400, "context_length_exceeded"),
        ("ConfigError", 400, None),
        ("QueueFull", 429, "queue_full"),
        ("NotServed", 503, "no_workers"),
        ("RequestFailed", 500, None),
        ("Unheard", 500, None),
    ],
)
def test_what_the_engine_refuses_has_a_status_in_streams_too(error: str, status: int, code: str | None) -> None:
    for is_stream in (False, True):
        answered = post(failing(error), COMPLETIONS, BODY | {"stream": is_stream})
        assert (answered.status, answered.json["error"]["code"]) == (status, code)
        assert answered.json["error"]["message"] == "it is so"
        assert ("retry-after" in answered.answer_headers) == (status in (429, 503))


def test_a_full_queue_is_429_before_anything_is_submitted() -> None:
    for world in (World(room=Room(4, 9)), World(room=Room(9, 4))):
        world.num_requests = 3
        assert post(world, COMPLETIONS, BODY | {"n": 5}).status == 400  # never possible
        if world.room.total == 4:
            answered = post(world, COMPLETIONS, BODY | {"n": 2})
            assert (answered.status, answered.answer_headers["retry-after"]) == (429, "2")
            assert world.submits == []
        assert post(world, COMPLETIONS, BODY).status == 200


def test_routes_and_methods_that_arent_there_are_openais_errors_too() -> None:
    for method, path, status in (("GET", "/nowhere", 404), ("GET", COMPLETIONS, 405), ("POST", "/v1/models", 405)):
        answered = asyncio.run(Exchange(World(), method, path).run())
        assert answered.status == status
        assert answered.json["error"]["message"].startswith(f"{method} {path}")


def test_a_body_is_bounded_before_it_is_read() -> None:
    small = GatewayConfig(max_body_bytes=100)
    said = Exchange(World(config=small), headers=(*OWN, ("content-length", "101")), body=[b"never read"])
    assert asyncio.run(said.run()).status == 413
    assert said.answer_headers["connection"] == "close"  # what comes of it after all is nobody's
    unsaid = Exchange(World(config=small), body=[b"x" * 60, b"x" * 60])
    assert asyncio.run(unsaid.run()).status == 413
    for length in ("-1", "x", "9" * 50):
        odd = Exchange(World(config=small), headers=(*OWN, ("content-length", length)), body=[b"{}"])
        assert asyncio.run(odd.run()).status == 413


def test_the_guard_stands_before_every_route() -> None:
    for method, path in (("POST", COMPLETIONS), ("GET", "/v1/models"), ("GET", "/health"), ("GET", "/nowhere")):
        answered = asyncio.run(Exchange(World(), method, path, headers=(("host", "evil.example"),)).run())
        assert (answered.status, answered.json["error"]["code"]) == (403, "host_not_allowed")
    answered = asyncio.run(Exchange(World(), headers=OWN[:1], body=[json.dumps(BODY).encode()]).run())
    assert answered.status == 415


def test_ready_says_why_not() -> None:
    world = World()
    assert asyncio.run(Exchange(world, "GET", "/ready").run()).status == 200
    world.why_not_ready = "no worker has joined yet"
    answered = asyncio.run(Exchange(world, "GET", "/ready").run())
    assert (answered.status, answered.json) == (503, {"status": "no worker has joined yet"})
    assert asyncio.run(Exchange(world, "GET", "/health").run()).status == 200


# -- clients that go, don't read, or wait too long


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_goes_has_everything_cancelled(is_stream: bool) -> None:
    async def scenario() -> World:
        world = World(lambda submit: whole_answer(submit)[:1])
        exchange = Exchange(world, body=[json.dumps(BODY | {"n": 2, "stream": is_stream}).encode()])
        task = asyncio.create_task(exchange.run())
        await world.asked.wait()
        exchange.gone.set()
        async with asyncio.timeout(5):
            await task
        return world

    world = asyncio.run(scenario())
    assert sorted(world.cancelled) == [submit.request_id for _, submit in world.submits]
    client = world.submits[0][0]
    assert world.desk.owns(client)
    assert world.desk.tell(client, whole_answer(world.submits[0][1])[1])  # nobody wants it: not to be told again


def test_an_answer_that_takes_too_long_is_cancelled() -> None:
    world = World(silence, config=GatewayConfig(deadline_s=0.01))
    answered = post(world, COMPLETIONS, BODY)
    assert (answered.status, answered.json["error"]["code"]) == (504, "deadline_exceeded")
    assert world.cancelled == [world.submits[0][1].request_id]


def test_a_stopping_coordinator_ends_answers_with_a_503() -> None:
    async def scenario() -> Exchange:
        world = World(silence)
        task = asyncio.create_task(Exchange(world, body=[json.dumps(BODY).encode()]).run())
        await world.asked.wait()
        world.desk.stop()
        return await task

    assert asyncio.run(scenario()).status == 503


def test_who_doesnt_read_is_told_later_and_a_gone_client_never() -> None:
    async def scenario() -> None:
        world = World(silence)
        submit = Submit(request_id=RequestId("r"), prompt="hi", sampling=SamplingParams())
        gone = asyncio.Event()

        async def receive() -> dict[str, Any]:
            await gone.wait()
            return {"type": "http.disconnect"}

        token, _, end = whole_answer(submit)
        async with world.desk.asking([submit], receive, "prompt") as ask:
            assert all(ask.take(token) for _ in range(MAX_INBOX))
            assert not ask.take(token)
            assert ask.take(Notice(request_id=submit.request_id, text="waiting"))
            assert (await anext(ask)).message == token
            assert ask.take(end)
            gone.set()
            with pytest.raises(ClientGone):
                await until_the_end(ask)
        assert world.cancelled == []  # it had ended

    asyncio.run(scenario())


async def until_the_end(ask: Ask) -> None:
    async for _ in ask:
        await asyncio.sleep(0)


def test_users_of_the_gateway_have_names_that_no_node_has() -> None:
    world = World()
    post(world, COMPLETIONS, BODY)
    (client, _), desk = world.submits[0], world.desk
    assert client.partition(".")[0] == "http/anyone"
    assert desk.owns(client)
    assert not desk.owns(PeerId("a" * 26 + ".http/anyone"))


def test_the_log_has_figures_and_no_words(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        post(World(), COMPLETIONS, {"prompt": "secret words", "max_tokens": 2})
    assert "prompt_tokens=3 completion_tokens=2" in caplog.text
    assert "secret" not in caplog.text
    assert "one " not in caplog.text


# -- anything at all

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    sorted({*_Chat.model_fields, *_Completion.model_fields, "tools", "user", "suffix", "x", "inputs", "parameters"})
)
BODIES = st.dictionaries(FIELDS, JSON, max_size=5).map(json.dumps).map(str.encode)
HEADER = st.tuples(
    st.sampled_from(["host", "origin", "content-type", "content-length", "sec-fetch-site"]),
    st.text(st.characters(max_codepoint=255), max_size=12),
)


@functools.cache
def one_world() -> World:
    """Making routes takes longer than asking."""
    return World()


FEW = settings(max_examples=300, deadline=None, database=None, derandomize=True)


@FEW
@given(
    BODIES
    | st.binary(max_size=60)
    | st.sampled_from(
        [b"[" * 50_000, b'{"prompt":' * 2000, b'{"prompt": "\\ud800"}', b'{"seed": ' + b"1" * 5000 + b"}", b""]
    ),
    st.sampled_from([COMPLETIONS, CHAT, "/generate", "/generate_stream", "/"]),
)
def test_whatever_comes_is_an_answer_or_a_4xx(body: bytes, path: str) -> None:
    answered = asyncio.run(Exchange(one_world(), path=path, body=[body]).run())
    assert answered.status == 200 or 400 <= answered.status < 500
    assert answered.status != 422
    if answered.status != 200 and path.startswith("/v1"):
        assert set(answered.json["error"]) == {"message", "type", "param", "code"}


@FEW
@given(
    st.lists(HEADER, max_size=4),
    st.sampled_from(["GET", "POST", "OPTIONS", "PUT", "BREW"]),
    st.sampled_from([COMPLETIONS, "/v1/models/", "/v1/models/../x", "/health", "//", "/\x00"]),
)  # fmt: skip
def test_whatever_headers_come_nothing_breaks(headers: list[tuple[str, str]], method: str, path: str) -> None:
    for given_headers in (headers, [*OWN, *headers]):
        answered = asyncio.run(Exchange(one_world(), method, path, headers=given_headers, body=[b"{}"]).run())
        assert answered.status == 200 or 400 <= answered.status < 500
