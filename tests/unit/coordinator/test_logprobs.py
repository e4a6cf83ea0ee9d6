"""Logprobs reach the client beside their tokens, also when it comes back; a worker that leaves them out is at fault."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from skynet.client.swarm import Completion
from skynet.coordinator.replica import _has_logprobs_as_asked, _without_extras
from skynet.coordinator.requests import Request
from skynet.coordinator.scheduler import Sequence as Answer
from skynet.coordinator.text import TextModel
from skynet.models.embedded import EMBEDDED_DIR
from skynet.protocol.ids import PeerId, RequestId, SequenceId
from skynet.protocol.messages import Tokens
from skynet.protocol.plan import Epoch
from skynet.protocol.steps import Penalties, RunStep, SamplingParams, SeenTokens, SequencePart, StepDone, TokenLogprobs

TOLD = [TokenLogprobs(logprob=-float(i), top_ids=(i,), top_logprobs=(-0.5,)) for i in range(6)]


def request(received: tuple[int, ...]) -> Request:
    submit = Completion(prompt="x", logprobs=1).submit(RequestId("r"), received)
    sequence = Answer(
        sequence_id=SequenceId(1), user="u", token_ids=[7, *received], num_prompt=1, max_tokens=9,
        eos_ids=frozenset(), sampling=submit.sampling,
    )  # fmt: skip
    text = TextModel(EMBEDDED_DIR).answer()
    return Request(submit=submit, client=PeerId("n.c"), sequence=sequence, text=text, wait_until=0)


def drained(asked: Request) -> list[TokenLogprobs]:
    found: list[TokenLogprobs] = []
    while isinstance(message := asked.untold(), Tokens):
        assert len(message.logprobs) == len(message.token_ids)
        found += message.logprobs
        asked.told(message)
    return found


@pytest.mark.parametrize("received", [(), (301, 302)])
def test_logprobs_come_with_their_tokens_and_again_to_who_comes_back(received: tuple[int, ...]) -> None:
    asked = request(received)
    for i in range(4):
        asked.sequence.token_ids.append(400 + i)
        asked.take(400 + i, TOLD[i])
    assert drained(asked) == TOLD[:4]
    asked.rewind(len(received) + 1)
    assert drained(asked) == TOLD[1:4]
    assert asked.num_tokens == len(asked.sequence.token_ids) + 4 * 2, "what is remembered of them counts"


def parts(*wanted: int | None) -> tuple[SequencePart, ...]:
    return tuple(
        SequencePart(
            sequence_id=SequenceId(i), token_ids=(1,), start=0, block_table=(i,), sample=SamplingParams(logprobs=count)
        )
        for i, count in enumerate(wanted)
    )


@pytest.mark.parametrize(
    ("wanted", "found", "is_right"),
    [
        ((None, None), [], True),
        ((1, None), [TOLD[0], None], True),
        ((1, 1), [], False),
        ((1, None), [None, TOLD[0]], False),
        ((1, 1), [TOLD[0]], False),
        ((None, None), [TOLD[0], None], False),
        ((0, None), [TOLD[0], None], False),  # more than were asked for
    ],
)
def test_a_result_has_logprobs_where_they_were_asked_for(
    wanted: Sequence[int | None], found: Sequence[TokenLogprobs | None], is_right: bool
) -> None:
    done = StepDone(epoch=Epoch(1, 1), step=0, token_ids=(5, 6), logprobs=tuple(found))
    assert _has_logprobs_as_asked(done, parts(*wanted)) == is_right


def test_stages_that_do_not_sample_are_not_sent_what_sampling_needs() -> None:
    plain = RunStep(epoch=Epoch(1, 1), step=0, parts=parts(None, 2), timeout_s=1)
    assert _without_extras(plain) is plain
    penalized = SequencePart(
        sequence_id=SequenceId(9), token_ids=(1,), start=0, block_table=(3,), seen=SeenTokens(ids=bytes(4)),
        sample=SamplingParams(penalties=Penalties(repetition=2)),
    )  # fmt: skip
    step = RunStep(epoch=Epoch(1, 1), step=0, parts=(*plain.parts, penalized), timeout_s=1)
    assert all(part.seen is None and part.extra_bytes == 0 for part in _without_extras(step).parts)
    assert [part.token_ids for part in _without_extras(step).parts] == [part.token_ids for part in step.parts]
