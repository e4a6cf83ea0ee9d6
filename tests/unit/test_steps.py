"""What a request may ask of sampling, and what a worker may say about it, is bounded before anyone acts on it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from skynet.client.swarm import Completion
from skynet.errors import ConfigError, MalformedMessage
from skynet.protocol.codec import Decoder, encode
from skynet.protocol.ids import RequestId, SequenceId
from skynet.protocol.messages import Submit, Tokens
from skynet.protocol.plan import Epoch
from skynet.protocol.steps import Penalties, RunStep, SamplingParams, SeenTokens, SequencePart, StepDone, TokenLogprobs

NAN, INF = float("nan"), float("inf")
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"min_p": 1.1}, "min_p must lie"),
    ({"min_p": NAN}, "min_p must lie"),
    ({"logprobs": 21}, r"logprobs must lie in \[0, 20\]"),
    ({"logprobs": -1}, "logprobs must lie"),
    ({"repetition_penalty": 0.0}, "repetition_penalty must lie"),
    ({"repetition_penalty": NAN}, "repetition_penalty must lie"),
    ({"presence_penalty": 2.5}, "presence_penalty must lie"),
    ({"frequency_penalty": -INF}, "frequency_penalty must lie"),
    ({"logit_bias": {1: 101.0}}, "logit_bias adds between -100 and 100"),
    ({"logit_bias": {1: NAN}}, "logit_bias adds"),
    ({"logit_bias": {-1: 1.0}}, "logit_bias adds"),
    ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "names 1025 tokens, at most 1024"),
    ({"stop_token_ids": tuple(range(65))}, "at most 64 stop token ids"),
    ({"stop_token_ids": (2**24,)}, "stop token ids in"),
]


@pytest.mark.parametrize(("fields", "reason"), WRONG)
def test_what_is_out_of_range_is_named(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        Completion(prompt="hello", **fields)


def test_a_bias_on_one_token_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="names a token twice"):
        SamplingParams(logit_bias=((1, 1.0), (1, 2.0)))


@pytest.mark.parametrize(
    "fields",
    [
        {"logprob": NAN},
        {"logprob": 0.1},
        {"logprob": -INF},
        {"logprob": -1.0, "top_ids": [1]},
        {"logprob": -1.0, "top_ids": [1], "top_logprobs": [NAN]},
        {"logprob": -1.0, "top_ids": list(range(21)), "top_logprobs": [-1.0] * 21},
    ],
)
def test_logprobs_that_are_none_are_malformed(fields: dict[str, Any]) -> None:
    header = msgspec.msgpack.encode(
        (1, "step_done", {"epoch": {"start": 1, "n": 1}, "step": 0, "token_ids": [1], "logprobs": [fields]}, [])
    )
    with pytest.raises(MalformedMessage):
        Decoder(StepDone).decode([header])


@pytest.mark.parametrize(("ids", "counts"), [(b"abc", b""), (bytes(8), bytes(4)), (bytes(4 * (65536 + 1)), b"")])
def test_seen_tokens_that_are_none_are_refused(ids: bytes, counts: bytes) -> None:
    with pytest.raises(ValueError, match="seen tokens"):
        SeenTokens(ids=ids, counts=counts)


def test_everything_survives_the_wire() -> None:
    sampling = SamplingParams(
        min_p=0.1, logprobs=3, penalties=Penalties(repetition=1.5, presence=1.0), logit_bias=((5, -100.0), (7, 1.5))
    )
    part = SequencePart(
        sequence_id=SequenceId(1), token_ids=(1,), start=0, block_table=(0,), sample=sampling,
        seen=SeenTokens(ids=bytes(8), counts=bytes(8)),
    )  # fmt: skip
    told = TokenLogprobs(logprob=-0.5, top_ids=(3, 4), top_logprobs=(-0.5, -9999.0))
    messages = (
        RunStep(epoch=Epoch(1, 1), step=1, parts=(part,), timeout_s=1),
        StepDone(epoch=Epoch(1, 1), step=1, token_ids=(3, 4), logprobs=(told, None)),
        Tokens(request_id=RequestId("r"), position=0, token_ids=(3,), text="x", logprobs=(told,)),
        Completion(
            prompt="x", repetition_penalty=1.5, logit_bias={3: 1}, logprobs=0, stop_token_ids=(9,), index=2
        ).submit(RequestId("r"), ()),
    )
    for message in messages:
        assert Decoder(type(message)).decode(encode(message))[0] == message


def test_a_plain_request_asks_for_nothing_more() -> None:
    submit = Completion(prompt="x").submit(RequestId("r"), ())
    assert isinstance(submit, Submit)
    assert submit.sampling == SamplingParams()
