"""What penalties are about depends on nothing but a sequence's token ids."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skynet.coordinator import seen
from skynet.coordinator.seen import Tally
from skynet.protocol.steps import Penalties, SeenTokens

BOTH = Penalties(repetition=1.5, presence=0.5)
token_ids = st.lists(st.integers(0, 40) | st.integers(0, 2**24 - 1), max_size=40)


def counts_of(found: SeenTokens) -> dict[int, int]:
    ids = np.frombuffer(found.ids, "<u4").tolist()
    assert ids == sorted(set(ids))
    return dict(zip(ids, np.frombuffer(found.counts, "<u4").tolist(), strict=bool(found.counts)))


@settings(max_examples=150, deadline=None)
@given(prompt=token_ids.filter(bool), answer=token_ids, asked_at=st.sets(st.integers(0, 40)))
def test_counts_are_those_of_the_ids_whenever_they_were_asked_for(
    prompt: list[int], answer: list[int], asked_at: set[int]
) -> None:
    tally = Tally(BOTH, len(prompt))
    for length in sorted(n for n in asked_at if n <= len(answer)):
        tally.after([*prompt, *answer[:length]])
    expected = dict.fromkeys(prompt, 0) | Counter(answer)
    assert counts_of(tally.after([*prompt, *answer])) == expected
    assert Tally(BOTH, len(prompt)).after([*prompt, *answer]) == tally.after([*prompt, *answer])


def test_only_what_the_penalties_need_is_sent() -> None:
    ids = [7, 5, 7, 9, 5, 9, 9]
    assert counts_of(Tally(Penalties(frequency=1), 3).after(ids)) == {5: 1, 9: 3}
    repetition = Tally(Penalties(repetition=2), 3).after(ids)
    assert np.frombuffer(repetition.ids, "<u4").tolist() == [5, 7, 9]
    assert not repetition.counts
    assert Tally(Penalties(presence=1), 7).after(ids) == SeenTokens(ids=b"")


def test_of_too_many_distinct_tokens_the_first_ones_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seen, "MAX_SEEN", 4)
    tally = Tally(BOTH, 6)
    assert counts_of(tally.after([9, 1, 9, 8, 2, 3])) == {9: 0, 1: 0, 8: 0, 2: 0}
    assert counts_of(tally.after([9, 1, 9, 8, 2, 3, 3, 8, 8])) == {9: 0, 1: 0, 8: 2, 2: 0}
