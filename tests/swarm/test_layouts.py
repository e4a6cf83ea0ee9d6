"""Whatever the layout, a swarm of real processes says what one process of transformers says."""

from __future__ import annotations

import pytest

from skynet.client.swarm import Completion
from skynet.testing.local_swarm import LocalSwarm

from .conftest import Oracle, Serve

LAYOUTS = ("2x1", "1x1", "1x2", "2x2", "3x2")
PROMPT = "Once upon a time, in a house by the sea, there was an old lamp. Every evening"
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "top_k": 50}
NUM_TOKENS = 32


def answer(swarm: LocalSwarm, **settings: object) -> list[int]:
    completion = Completion(prompt=PROMPT, max_tokens=NUM_TOKENS, ignore_eos=True, **settings)  # type: ignore[arg-type]
    return swarm.complete(completion).token_ids


@pytest.fixture(scope="module")
def sampled(serve: Serve) -> list[int]:
    """What two ranks answer to a seed: the same again, and something else to another seed."""
    swarm = serve(layout="2x1")
    once = answer(swarm, seed=1, **SAMPLED)
    assert once == answer(swarm, seed=1, **SAMPLED)
    assert once != answer(swarm, seed=2, **SAMPLED)
    return once


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_answers_like_one_process(
    layout: str, serve: Serve, embedded_oracle: Oracle, sampled: list[int]
) -> None:
    swarm = serve(layout=layout)
    replicas = swarm.status()["replicas"]
    assert {replica["layout"] for replica in replicas} == {layout}
    expected = embedded_oracle.answer_ids(embedded_oracle.encode(PROMPT), NUM_TOKENS)
    stream = swarm.complete(Completion(prompt=PROMPT, max_tokens=NUM_TOKENS, ignore_eos=True))
    assert stream.token_ids == expected
    assert stream.text == embedded_oracle.decode(expected)
    assert answer(swarm, seed=1, **SAMPLED) == sampled


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_answers_in_readable_text(dtype: str, serve: Serve, embedded_oracle: Oracle) -> None:
    swarm = serve(layout="2x1", dtype=dtype)
    assert swarm.status()["model"]["dtype"] == dtype
    ids = answer(swarm)
    expected = embedded_oracle.answer_ids(embedded_oracle.encode(PROMPT), NUM_TOKENS)
    num_equal = next((i for i, (a, b) in enumerate(zip(ids, expected, strict=True)) if a != b), NUM_TOKENS)
    assert num_equal >= 4  # then rounding may choose another of two nearly equal tokens
    assert ids == answer(swarm)
