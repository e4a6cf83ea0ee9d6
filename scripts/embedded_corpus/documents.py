"""The stream of documents: mostly stories, some chats and notes, for ever."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Final

from embedded_corpus.chats import chat
from embedded_corpus.notes import note
from embedded_corpus.stories import story

STORY_SHARE: Final = 0.42  # of the documents; a story is longer than a chat, so the share of the tokens is higher
CHAT_SHARE: Final = 0.48


def documents(*, seed: int) -> Iterator[str]:
    """Documents without end; the same seed gives the same ones."""
    chooser = random.Random(seed)
    while True:
        share = chooser.random()
        if share < STORY_SHARE:
            yield story(chooser)
        elif share < STORY_SHARE + CHAT_SHARE:
            yield chat(chooser)
        else:
            yield note(chooser)
