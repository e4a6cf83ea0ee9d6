"""Text Generation Inference's API: parameters, whole answers, streams and errors."""

from __future__ import annotations

import json
from typing import Any

import pytest

from skynet.protocol.messages import Failed, Finished, Submit, ToClient, Tokens
from skynet.protocol.steps import Penalties, TokenLogprobs

from .played import World, post

ONE = TokenLogprobs(logprob=-0.5)


def told(submit: Submit) -> list[ToClient]:
    """Three tokens, the last of them an end."""
    name = submit.request_id
    return [
        Tokens(request_id=name, position=0, token_ids=(7,), text="one ", logprobs=(ONE,)),
        Tokens(request_id=name, position=1, token_ids=(8, 0), text="two", logprobs=(ONE, ONE)),
        Finished(request_id=name, reason="eos", prompt_tokens=3, completion_tokens=3),
    ]


def sampling_of(**parameters: object) -> Any:
    world = World()
    assert post(world, "/generate", {"inputs": "hi", "parameters": parameters}).status == 200
    return world.submits[0][1].sampling


def test_a_whole_answer_has_tgis_form() -> None:
    answered = post(
        World(told), "/generate", {"inputs": "hi", "parameters": {"details": True, "return_full_text": True}}
    )
    found = answered.json
    assert found["generated_text"] == "hione two"
    assert [(t["id"], t["special"], t["logprob"]) for t in found["details"].pop("tokens")] == [
        (7, False, -0.5), (8, False, -0.5), (0, True, -0.5),
    ]  # fmt: skip
    assert found["details"] == {"finish_reason": "eos_token", "generated_tokens": 3, "seed": None, "prefill": []}
    assert post(World(told), "/generate", {"inputs": "hi"}).json == {"generated_text": "one two"}
    assert post(World(told), "/", {"inputs": "hi"}).json == [{"generated_text": "one two"}]


@pytest.mark.parametrize("parameters", [{}, {"stop": ["x"]}, {"max_new_tokens": 1}])
def test_a_stream_has_an_event_for_each_token_and_all_of_the_text_in_the_last(parameters: dict[str, object]) -> None:
    for path, more in (("/generate_stream", {}), ("/", {"stream": True})):
        answered = post(World(told), path, {"inputs": "hi", "parameters": parameters, **more})
        *events, last = map(json.loads, answered.events)
        assert [event["index"] for event in (*events, last)] == [1, 2, 3]
        shown = [event["token"]["text"] for event in (*events, last) if not event["token"]["special"]]
        assert "".join(shown) == last["generated_text"].removesuffix("<0>") == "one two"
        assert last["details"] == {"finish_reason": "eos_token", "generated_tokens": 3, "seed": None, "input_length": 3}
        assert all(event["generated_text"] is None for event in events)


def test_an_answer_is_greedy_unless_sampling_is_asked_for() -> None:
    assert sampling_of().temperature == sampling_of(temperature=1.0, top_p=1.0).temperature == 0
    assert sampling_of(do_sample=True).temperature == sampling_of(top_k=4).temperature == 1
    chosen = sampling_of(temperature=0.5, top_p=0.9, seed=7, repetition_penalty=1.2, frequency_penalty=0.5)
    assert (chosen.temperature, chosen.top_p, chosen.seed) == (0.5, 0.9, 7)
    assert chosen.penalties == Penalties(repetition=1.2, frequency=0.5)


@pytest.mark.parametrize(
    "body",
    [
        {}, {"inputs": 3}, {"inputs": "hi", "parameters": []}, {"inputs": "hi", "parameters": {"grammar": {}}},
        {"inputs": "hi", "parameters": {"temperature": 0}}, {"inputs": "hi", "parameters": {"x": 1}},
        {"inputs": "hi", "x": 1}, {"inputs": "hi", "parameters": {"stop": [""]}},
        {"inputs": "hi", "parameters": {"best_of": 2}}, [], "hi",
    ],
)  # fmt: skip
def test_what_cant_be_is_refused_in_tgis_form(body: object) -> None:
    answered = post(World(), "/generate", body)
    assert (answered.status, answered.json["error_type"]) == (400, "validation")


def test_errors_of_the_engine_have_tgis_form_in_streams_too() -> None:
    def full(submit: Submit) -> list[ToClient]:
        return [Failed(request_id=submit.request_id, error="QueueFull", text="later")]

    for path in ("/generate", "/generate_stream"):
        answered = post(World(full), path, {"inputs": "hi"})
        assert (answered.status, answered.json) == (429, {"error": "later", "error_type": "overloaded"})

    def breaks(submit: Submit) -> list[ToClient]:
        return [told(submit)[0], Failed(request_id=submit.request_id, error="RequestFailed", text="broken")]

    answered = post(World(breaks), "/generate_stream", {"inputs": "hi"})
    assert json.loads(answered.events[-1]) == {"error": "broken", "error_type": "generation"}
