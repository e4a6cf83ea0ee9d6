"""The HTTP gateway over a real swarm, as OpenAI's own client and curl see it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest
from huggingface_hub import InferenceClient

from skynet.client.swarm import Completion, Swarm
from skynet.testing.local_swarm import LocalSwarm
from tests.swarm.conftest import Oracle, User

PROMPT = "Once upon a time"
CHAT: Any = [{"role": "user", "content": "Tell me a story."}]


@pytest.fixture
def client(swarm: LocalSwarm) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{swarm.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


async def nothing_is_in_progress(client: Swarm) -> None:
    facts = await client.status()
    while facts["num_requests"]:
        facts = await client.status(newer_than=facts["revision"])


def test_the_model_that_is_served_is_listed(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object) == ("embedded", "model")
    assert client.models.retrieve("embedded").id == "embedded"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4")
    assert caught.value.code == "model_not_found"


def test_a_completion_is_what_the_swarm_answers(
    swarm: LocalSwarm, client: openai.OpenAI, embedded_oracle: Oracle
) -> None:
    done = client.completions.create(model="embedded", prompt=PROMPT, max_tokens=12, temperature=0, echo=True)
    assert done.choices[0].text == PROMPT + swarm.complete(Completion(prompt=PROMPT, max_tokens=12)).text
    assert done.choices[0].finish_reason == "length"
    assert done.usage is not None
    num_prompt = len(embedded_oracle.encode(PROMPT))
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (num_prompt, 12)
    assert done.usage.total_tokens == num_prompt + 12


def test_a_streamed_chat_is_the_same_as_a_whole_one(client: openai.OpenAI) -> None:
    options: Any = {"model": "embedded", "messages": CHAT, "max_tokens": 16, "temperature": 0.8, "seed": 7}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    *pieces, last = chunks
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole.choices[0].message.content
    assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert all(piece.usage is None for piece in pieces)
    assert (last.choices, last.usage) == ([], whole.usage)
    assert len({chunk.id for chunk in chunks}) == 1


def test_several_answers_to_one_prompt_differ_and_follow_the_seed(client: openai.OpenAI) -> None:
    def texts(**options: Any) -> list[str]:
        done = client.completions.create(
            model="embedded", prompt=[PROMPT, "The dog"], max_tokens=8, temperature=1, seed=3, **options
        )
        assert [choice.index for choice in done.choices] == list(range(len(done.choices)))
        assert done.usage is not None
        assert done.usage.completion_tokens <= 8 * len(done.choices)
        return [choice.text for choice in done.choices]

    one, other, third, fourth = texts(n=2)
    assert one != other
    assert texts(n=1) == [one, third]
    streamed = client.completions.create(
        model="embedded", prompt=[PROMPT, "The dog"], max_tokens=8, temperature=1, seed=3, n=2, stream=True
    )
    grown = ["", "", "", ""]
    for chunk in streamed:
        grown[chunk.choices[0].index] += chunk.choices[0].text
    assert grown == [one, other, third, fourth]


def test_a_stop_string_ends_the_answer_and_never_shows(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="embedded", prompt=PROMPT, max_tokens=40, temperature=0).choices[0].text
    stop = whole[20:26]
    done = client.completions.create(model="embedded", prompt=PROMPT, max_tokens=40, temperature=0, stop=[stop])
    assert (done.choices[0].text, done.choices[0].finish_reason) == (whole[: whole.index(stop)], "stop")


def test_errors_are_openais_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="this swarm runs 'embedded'"):
        client.completions.create(model="gpt-4", prompt=PROMPT)
    with pytest.raises(openai.BadRequestError, match="at most 2047") as long:
        client.completions.create(model="embedded", prompt="dog " * 3000)
    assert (long.value.param, long.value.code) == ("prompt", "context_length_exceeded")
    with pytest.raises(openai.BadRequestError) as unsupported:
        client.chat.completions.create(model="embedded", messages=CHAT, modalities=["audio"])
    assert (unsupported.value.param, unsupported.value.code) == ("modalities", "unsupported_parameter")
    with pytest.raises(openai.BadRequestError) as unknown:
        client.chat.completions.create(model="embedded", messages=CHAT, extra_body={"temprature": 1})
    assert (unknown.value.param, unknown.value.code) == ("temprature", "unknown_parameter")


def test_a_client_that_goes_mid_stream_frees_everything_at_once(swarm: LocalSwarm, client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="embedded",
        prompt=PROMPT,
        max_tokens=1500,
        temperature=1,
        n=2,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    assert swarm.status()["num_requests"] == 2
    stream.close()
    swarm.run(nothing_is_in_progress, timeout_s=4)
    assert all(replica["num_sequences"] == 0 for replica in swarm.status()["replicas"])


def test_a_client_that_goes_before_its_whole_answer_frees_everything_at_once(swarm: LocalSwarm) -> None:
    body = {"prompt": PROMPT, "max_tokens": 1500, "temperature": 1, "ignore_eos": True}
    with pytest.raises(httpx2.TimeoutException):
        httpx2.post(f"{swarm.url}/v1/completions", json=body, timeout=1)
    swarm.run(nothing_is_in_progress, timeout_s=4)


def curl(*arguments: str) -> tuple[int, str]:
    """Status and body, as plain curl gets them."""
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    done = subprocess.run(
        ["curl", "-sS", "--max-time", "30", "-w", "\n%{http_code}", *arguments],
        capture_output=True, text=True, timeout=40, check=True,
    )  # fmt: skip
    body, _, status = done.stdout.rpartition("\n")
    return int(status), body


def test_plain_curl_gets_an_answer_and_a_stream(swarm: LocalSwarm) -> None:
    body = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0}
    url, json_type = f"{swarm.url}/v1/completions", ("-H", "Content-Type: application/json")
    status, whole = curl(url, *json_type, "-d", json.dumps(body))
    text = json.loads(whole)["choices"][0]["text"]
    assert status == 200
    status, stream = curl(url, *json_type, "-N", "-d", json.dumps(body | {"stream": True}))
    *events, done = [line.removeprefix("data: ") for line in stream.split("\n\n") if line]
    assert (status, done) == (200, "[DONE]")
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == text


def test_what_another_sites_page_could_send_is_refused(swarm: LocalSwarm) -> None:
    url, json_type = f"{swarm.url}/v1/completions", ("-H", "Content-Type: application/json")
    body = ("-d", json.dumps({"prompt": PROMPT, "max_tokens": 1}))
    assert curl(url, *json_type, *body)[0] == 200
    assert curl(url, *json_type, *body, "-H", "Host: evil.example")[0] == 403
    assert curl(url, *json_type, *body, "-H", "Origin: http://evil.example")[0] == 403
    assert curl(url, *json_type, *body, "-H", f"Origin: {swarm.url}")[0] == 200
    assert curl(url, *body)[0] == 415
    assert curl(url, "-X", "OPTIONS", "-H", f"Origin: {swarm.url}")[0] == 405
    assert curl(f"{swarm.url}/health") == (200, '{"status":"ok"}')
    assert curl(f"{swarm.url}/ready") == (200, '{"status":"ok"}')


def test_hugging_faces_client_gets_an_answer_and_a_stream(swarm: LocalSwarm) -> None:
    client = InferenceClient(model=swarm.url, timeout=30)
    expected = swarm.complete(Completion(prompt=PROMPT, max_tokens=12)).text
    assert client.text_generation(PROMPT, max_new_tokens=12) == expected
    assert "".join(client.text_generation(PROMPT, max_new_tokens=12, stream=True)) == expected
    whole = client.text_generation(PROMPT, max_new_tokens=12, details=True)
    assert whole.details is not None
    assert (whole.generated_text, whole.details.finish_reason, len(whole.details.tokens)) == (expected, "length", 12)


def test_logprobs_are_of_the_tokens_that_the_answer_has(client: openai.OpenAI) -> None:
    options: Any = {"model": "embedded", "messages": CHAT, "max_tokens": 12, "temperature": 0}
    plain = client.chat.completions.create(**options, logprobs=True, top_logprobs=2).choices[0]
    assert plain.logprobs is not None
    assert plain.logprobs.content is not None
    assert "".join(entry.token for entry in plain.logprobs.content) == plain.message.content
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in plain.logprobs.content)


def test_biases_and_penalties_reach_who_samples(swarm: LocalSwarm, client: openai.OpenAI) -> None:
    plain = swarm.complete(Completion(prompt=PROMPT, max_tokens=60, ignore_eos=True))

    def text(**options: Any) -> str:
        more = {"ignore_eos": True}
        return client.completions.create(
            model="embedded", prompt=PROMPT, max_tokens=60, temperature=0, extra_body=more, **options
        ).choices[0].text  # fmt: skip

    assert text() == plain.text
    assert text(logit_bias={str(plain.token_ids[0]): -100})[:6] != plain.text[:6]
    assert text(frequency_penalty=2) != plain.text


def test_prometheus_is_told_what_was_answered_and_what_the_swarm_is_at(
    swarm: LocalSwarm, client: openai.OpenAI
) -> None:
    def figures() -> dict[str, float]:
        lines = httpx2.get(f"{swarm.url}/metrics").text.splitlines()
        pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in pairs}

    before = figures()
    client.completions.create(model="embedded", prompt=PROMPT, max_tokens=5, temperature=0)
    after = figures()
    assert after["skynet_completion_tokens_total"] - before.get("skynet_completion_tokens_total", 0) == 5
    assert after['skynet_http_requests_total{path="/v1/completions",status="200"}'] >= 1
    assert after["skynet_requests"] == 0
    (blocks,) = [value for name, value in after.items() if name.startswith("skynet_kv_blocks{")]
    assert blocks > 0


def test_listening_where_others_reach_is_refused_with_the_reason(user: User) -> None:
    done = user.run("coordinator", "--http", "0.0.0.0:8000")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --http 0.0.0.0:8000: there are no API keys yet")
