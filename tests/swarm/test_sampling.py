"""Sampling as a client asks for it, on real workers."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from skynet.client.swarm import Completion
from skynet.testing.local_swarm import LocalSwarm

from .conftest import Oracle, User


def test_a_client_gets_what_it_asks_of_sampling(swarm: LocalSwarm, user: User, embedded_oracle: Oracle) -> None:
    plain = swarm.complete(Completion(prompt="One day", max_tokens=24, ignore_eos=True))
    asked = Completion(
        prompt="One day", max_tokens=24, ignore_eos=True, repetition_penalty=100, presence_penalty=0.5,
        frequency_penalty=0.5, logit_bias={plain.token_ids[0]: -100.0}, logprobs=3,
    )  # fmt: skip
    other = swarm.complete(asked)
    assert plain.token_ids[0] not in other.token_ids
    assert len(set(other.token_ids)) == 24 > len(set(plain.token_ids))
    assert not set(other.token_ids) & set(embedded_oracle.encode("One day"))
    assert not plain.logprobs
    shortfalls = embedded_oracle.shortfalls(embedded_oracle.encode("One day"), other.token_ids)
    for told, shortfall in zip(other.logprobs, shortfalls, strict=True):
        assert len(told.top_ids) == 3
        assert told.top_logprobs[0] - told.logprob == pytest.approx(shortfall, abs=1e-3)

    stop = other.token_ids[5]
    stopped = swarm.complete(replace(asked, stop_token_ids=(stop,)))
    length = other.token_ids.index(stop) + 1
    assert stopped.token_ids == other.token_ids[:length]
    assert stopped.text == embedded_oracle.decode(other.token_ids[: length - 1])
    assert stopped.finished is not None
    assert stopped.finished.reason == "stop"

    run = user.run(
        "infer", "One day", "--max-tokens", "8", "--json", "--logprobs", "1", "--repetition-penalty", "1.3",
        "--temperature", "1", "--min-p", "1", "--stop-token-id", "0",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    figures = json.loads(run.stdout)
    assert len(figures["logprobs"]) == len(figures["token_ids"])
