"""Stories: a cast, an opening, the beats of one plot, an ending."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Final, TypeAlias

from embedded_corpus.cast import ANIMAL_KINDS, bind_cast
from embedded_corpus.grammar import expand, read_sections

Beat: TypeAlias = Sequence[str]  # paragraphs to choose from, or a single "@name" that points to a shared beat

PAIRED: Final = " (paired)"  # marks a plot whose beats are all told in their first or all in their second way
SHARED: Final = ("opening", "ending", "walk", "rest", "night", "talk")
SHARED_BEAT_PROBABILITY: Final = 0.6  # that a story takes a beat which it may skip
TITLE_PROBABILITY: Final = 0.1
TITLES: Final = (
    "[{Hero} and the {Thing}|{Hero} and {friend}|The {Colour} {Thing}|The story of {hero}|{Hero}, the {trait} {kind}]"
)


@cache
def _plots() -> Mapping[str, Sequence[Beat]]:
    """plots.txt: each name with its beats."""
    return {
        name: [[paragraph.strip() for paragraph in beat.split("\n\n")] for beat in body.split("\n\n--\n\n")]
        for name, body in read_sections("plots.txt").items()
    }


def story(chooser: random.Random, *, hero_kind: str | None = None, thing: str | None = None) -> str:
    """A story of several paragraphs; `hero_kind` and `thing` fix what it is about."""
    plots = _plots()
    values = bind_cast(chooser, hero_kind=hero_kind, thing=thing)
    plot = chooser.choice([name for name in plots if name not in SHARED])
    way = chooser.randrange(2)
    paragraphs = [expand(chooser.choice(plots["opening"][0]), chooser, values)]
    for beat in plots[plot]:
        if beat[0].startswith("@"):
            if chooser.random() > SHARED_BEAT_PROBABILITY:
                continue
            beat = plots[beat[0][1:]][0]
        elif plot.endswith(PAIRED):
            beat = [beat[min(way, len(beat) - 1)]]
        paragraphs.append(expand(chooser.choice(beat), chooser, values))
    paragraphs.append(expand(_ending(chooser, values, " ".join(paragraphs)), chooser, values))
    if chooser.random() < TITLE_PROBABILITY and hero_kind is None:
        paragraphs.insert(0, expand(TITLES, chooser, values))
    return "\n\n".join(paragraphs)


def _ending(chooser: random.Random, values: Mapping[str, str | Sequence[str]], told: str) -> str:
    """An ending that mentions nobody and nothing which the story has not."""
    endings = _plots()["ending"][0]
    known = [e for e in endings if all(str(values[f]) in told for f in ("elder", "thing") if f"{{{f}}}" in e.lower())]
    return chooser.choice(known)


def hero_kinds() -> Sequence[str]:
    """The animals a story can be asked for."""
    return ANIMAL_KINDS
