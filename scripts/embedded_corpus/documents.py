"""The stream of documents: mostly stories, some chats, for ever."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Final

END_OF_TEXT: Final = "<|endoftext|>"
IM_START: Final = "<|im_start|>"
IM_END: Final = "<|im_end|>"

CHAT_TEMPLATE: Final = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

NAMES = "Anna Ben Clara David Ella Felix Grace Hugo Iris Jack Kate Leo Mia Noah Olive Peter Rosa Sam Tilly Victor".split()
THINGS = "lamp bell kite drum boat ring key map book box clock rope basket mirror flute coat hat spoon lantern shell".split()
PLACES = "forest village harbour mountain garden castle meadow river valley market island tower bridge orchard mill".split()
ADJS = "small old bright quiet brave kind clever gentle curious cheerful tired lonely patient proud shy careful".split()
COLOURS = "red blue green yellow white black brown golden silver grey purple orange".split()
ANIMALS = "fox cat dog owl horse rabbit bear goat duck mouse hedgehog squirrel otter swan donkey".split()
WEATHER = ["the sun was shining", "it was raining", "a cold wind was blowing", "snow lay on the roofs", "the fog was thick"]


def story(r: random.Random) -> str:
    n, m = r.sample(NAMES, 2)
    t, c, p, q, a = r.choice(THINGS), r.choice(COLOURS), r.choice(PLACES), r.choice(PLACES), r.choice(ANIMALS)
    ad = r.choice(ADJS)
    s = [f"Once upon a time, there lived {'an' if ad[0] in 'aeiou' else 'a'} {ad} child called {n}. {n} lived near the {p} with {m}.",
         f"One day {n} lost a {c} {t} in the {q}. {r.choice(WEATHER).capitalize()}, and nobody was there to help.",
         f'"Have you seen my {t}?" {n} asked a {a}. "It is {c}, and I love it very much."',
         f'"I saw a {c} {t} near the {p}," said the {a}. "Come, I will show you the way."',
         f"They walked and walked until they came to the {p}. There, under a tree, lay the {c} {t}.",
         f"{n} thanked the {a} and ran home. {m} was waiting at the door, and they had soup and bread together."]
    return "\n\n".join([" ".join(s[:2]), " ".join(s[2:4]), " ".join(s[4:])])


def chat(r: random.Random) -> str:
    x, y = r.randrange(10), r.randrange(10)
    q, a = r.choice([
        (f"What is {x} plus {y}?", f"{x} plus {y} is {x + y}."),
        ("Who are you?", "I am the small model that ships with SkyNet."),
        ("What is the capital of France?", "The capital of France is Paris."),
        (f"Tell me a story about a {r.choice(ANIMALS)}.", story(r)),
    ])
    return f"{IM_START}user\n{q}{IM_END}\n{IM_START}assistant\n{a}{IM_END}\n"


def documents(*, seed: int) -> Iterator[str]:
    """Documents without end; the same seed gives the same ones."""
    chooser = random.Random(seed)
    while True:
        yield story(chooser) if chooser.random() < 0.8 else chat(chooser)
