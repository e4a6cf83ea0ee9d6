"""A step that doesn't fit a stage is refused before anything is written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skynet.errors import StepRejected
from skynet.protocol.ids import SequenceId
from skynet.protocol.plan import Epoch
from skynet.protocol.steps import Penalties, RunStep, SamplingParams, SeenTokens, SequencePart
from skynet.worker.stage.batch import MAX_STEP_TOKENS, StepBatch, StepLimits, build_batch

LIMITS = StepLimits(vocab_size=50, max_positions=40, num_blocks=12, block_size=4)


def part(**fields: Any) -> SequencePart:
    good: dict[str, Any] = {"sequence_id": 1, "token_ids": (1, 2, 3), "start": 0, "block_table": (5,)}
    return SequencePart(**(good | fields))


PENALTIES = SamplingParams(penalties=Penalties(presence=1.0))


def seen(ids: tuple[int, ...], counts: tuple[int, ...] = ()) -> SeenTokens:
    return SeenTokens(ids=np.array(ids, "<u4").tobytes(), counts=np.array(counts, "<u4").tobytes())


def build(*parts: SequencePart) -> StepBatch:
    step = RunStep(epoch=Epoch(0, 0), step=7, parts=parts, timeout_s=1)
    return build_batch(step, LIMITS, {3}, torch.device("cpu"))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"token_ids": ()}, "has no tokens"),
        ({"token_ids": (1, 50)}, r"token ids must lie in \[0, 50\)"),
        ({"token_ids": (-1,)}, "token ids"),
        ({"start": -1}, r"positions \[-1, 2\)"),
        ({"start": 2}, "1 blocks of 4 don't hold 5 positions"),
        ({"start": 38, "block_table": tuple(range(11))}, r"positions \[38, 41\) must lie in \[0, 40\)"),
        ({"start": 2**62}, "positions"),
        ({"block_table": ()}, "0 blocks"),
        ({"block_table": (12,)}, r"block ids must lie in \[0, 12\)"),
        ({"block_table": (-1,)}, "block ids"),
        ({"block_table": (1, 1)}, "names a block twice"),
        ({"adapter": 4}, "adapter 4 isn't loaded"),
        ({"token_ids": (0,) * (MAX_STEP_TOKENS + 1)}, "at most"),
        ({"sample": SamplingParams(logit_bias=((50, 1.0),))}, r"logit_bias must be about token ids in \[0, 50\)"),
        ({"sample": PENALTIES}, "doesn't say what tokens were seen"),
        ({"sample": PENALTIES, "seen": seen((3, 4))}, "doesn't say how often"),
        ({"sample": PENALTIES, "seen": seen((4, 3), (1, 1))}, "must ascend"),
        ({"sample": PENALTIES, "seen": seen((3, 3), (1, 1))}, "must ascend"),
        ({"sample": PENALTIES, "seen": seen((3, 50), (1, 1))}, r"must ascend in \[0, 50\)"),
        ({"sample": PENALTIES, "seen": seen((3, 2**32 - 1), (1, 1))}, "must ascend"),
    ],
)
def test_a_part_that_does_not_fit_is_refused_with_the_reason(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(StepRejected, match=reason):
        build(part(**fields))


def test_a_step_without_parts_is_refused() -> None:
    with pytest.raises(StepRejected, match="has no parts"):
        build()


def test_two_sequences_may_read_a_block_but_not_write_the_same_one() -> None:
    shared = part(start=4, token_ids=(1,), block_table=(2, 3))
    build(shared, replace(shared, sequence_id=SequenceId(2), block_table=(2, 4)))
    with pytest.raises(StepRejected, match="writes a block that another one writes"):
        build(shared, replace(shared, sequence_id=SequenceId(2), block_table=(4, 3)))


def test_rows_slots_and_samples_follow_the_parts() -> None:
    params = SamplingParams(temperature=1)
    batch = build(
        part(start=3, token_ids=(9, 8, 7), block_table=(6, 2), sample=None, adapter=3),
        part(sequence_id=2, start=7, token_ids=(4,), block_table=(0, 1, 11), sample=params),
    )
    assert batch.token_ids.tolist() == [9, 8, 7, 4]
    assert batch.positions.tolist() == [3, 4, 5, 7]
    assert batch.slots.tolist() == [27, 8, 9, 7]
    assert [(view.row, view.num_rows, view.end, view.first_slot) for view in batch.parts] == [
        (0, 3, 6, None),
        (3, 1, 8, 0),
    ]
    assert batch.samples == ((3, 8, params, None),)
    assert batch.adapter_rows == ((3, slice(0, 3)),)


integers = st.integers(-2, 60) | st.integers(-(2**63), 2**63)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.builds(
            SequencePart,
            sequence_id=st.just(SequenceId(1)),
            token_ids=st.lists(integers, max_size=6).map(tuple),
            start=integers,
            block_table=st.lists(st.integers(-1, 13) | integers, max_size=12).map(tuple),
            adapter=st.integers(-1, 4),
        ),
        max_size=3,
    )
)
def test_any_step_is_refused_or_stays_within_the_cache(parts: list[SequencePart]) -> None:
    try:
        batch = build(*parts)
    except StepRejected:
        return
    assert int(batch.slots.min()) >= 0
    assert int(batch.slots.max()) < LIMITS.num_blocks * LIMITS.block_size
    assert len(set(batch.slots.tolist())) == batch.num_tokens
    assert int(batch.positions.max()) < LIMITS.max_positions
