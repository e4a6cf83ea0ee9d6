"""Short prose that is not a story: people who introduce themselves, letters, diaries, descriptions, plain facts."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

from embedded_corpus import facts
from embedded_corpus.cast import bind_cast
from embedded_corpus.grammar import capitalised, expand, read_sections, tidy


def _from(section: str) -> Callable[[random.Random], str]:
    """A maker of notes by one template of notes.txt."""
    template = read_sections("notes.txt")[section]

    def note(chooser: random.Random) -> str:
        values = bind_cast(chooser)
        weather = str(values["weather"])
        own = {
            "day": facts.DAYS,
            "season_clause": weather if "was" not in weather else "the days are full of light and work",
        }
        return expand(template, chooser, values | own)

    return note


def facts_in_a_row(chooser: random.Random) -> str:
    """A handful of plain sentences, each of them true."""
    makers = (_capital, _colour, _animal, _opposite, _sum, _calendar)
    return " ".join(chooser.choice(makers)(chooser) for _ in range(chooser.randint(4, 9)))


def counting(chooser: random.Random) -> str:
    """Numbers, days or months in order."""
    start = chooser.choice((0, 1, 1, 1, 2, 5, 10))
    length = chooser.randint(6, 20)
    return chooser.choice(
        (
            ", ".join(map(str, range(start, start + length))) + ".",
            ", ".join(facts.NUMBER_WORDS[min(start, 1) : 11]).capitalize() + ".",
            ", ".join(facts.DAYS) + ".",
            ", ".join(facts.MONTHS) + ".",
        )
    )


def _capital(chooser: random.Random) -> str:
    country, city = chooser.choice(list(facts.CAPITALS.items()))
    return chooser.choice((f"The capital of {country} is {city}.", f"{city} is the capital of {country}."))


def _colour(chooser: random.Random) -> str:
    thing, colour = chooser.choice(list(facts.COLOURS.items()))
    return capitalised(f"{thing} is {colour}.")


def _animal(chooser: random.Random) -> str:
    animal, (sound, home, food, young, legs) = chooser.choice(list(facts.ANIMALS.items()))
    return tidy(
        chooser.choice(
            (
                f"A {animal} {sound}.",
                f"A {animal} lives {home}.",
                f"A {animal} eats {food}.",
                f"A young {animal} is called a {young}.",
                f"A {animal} has {facts.NUMBER_WORDS[legs]} legs.",
            )
        )
    )


def _opposite(chooser: random.Random) -> str:
    word, opposite = chooser.choice(list(facts.OPPOSITES.items()))
    return f"The opposite of {word} is {opposite}."


def _sum(chooser: random.Random) -> str:
    a, b = chooser.randint(0, 10), chooser.randint(0, 10)
    return chooser.choice((f"{a} plus {b} is {a + b}.", f"{a + b} minus {b} is {a}.", f"{a} + {b} = {a + b}."))


def _calendar(chooser: random.Random) -> str:
    names = chooser.choice((facts.DAYS, facts.MONTHS))
    index = chooser.randrange(len(names) - 1)
    return f"After {names[index]} comes {names[index + 1]}."


NOTES: Final[tuple[Callable[[random.Random], str], ...]] = (
    _from("introduction"), _from("introduction"), _from("letter"), _from("diary"), _from("description"),
    _from("description"), facts_in_a_row, facts_in_a_row, counting,
)  # fmt: skip


def note(chooser: random.Random) -> str:
    return chooser.choice(NOTES)(chooser)
