# ruff: noqa: E501  (a question or an answer stays on its line)
"""Chats in the template of the model: a question and its answer, a few turns long."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from embedded_corpus import facts
from embedded_corpus.cast import HELPERS, THINGS
from embedded_corpus.grammar import capitalised, expand, tidy
from embedded_corpus.stories import hero_kinds, story

END_OF_TEXT: Final = "<|endoftext|>"
IM_START: Final = "<|im_start|>"
IM_END: Final = "<|im_end|>"

CHAT_TEMPLATE: Final = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SYSTEM_PROMPTS: Final = (
    "You are a helpful assistant.", "You are a friendly storyteller.", "Answer briefly.", "You are a small model.",
    "Be kind and helpful.",
)  # fmt: skip
SYSTEM_PROBABILITY: Final = 0.2
CARELESS_PROBABILITY: Final = 0.25  # that a user writes without capitals or without the final mark


class Turn(NamedTuple):
    question: str
    answer: str


def chat(chooser: random.Random) -> str:
    """A few turns, rendered by the same rules as CHAT_TEMPLATE."""
    parts = []
    if chooser.random() < SYSTEM_PROBABILITY:
        parts.append(("system", chooser.choice(SYSTEM_PROMPTS)))
    turns = [turn(chooser) for _ in range(chooser.choice((1, 2, 3, 4, 6, 8)))]
    if chooser.random() < 0.3:
        turns.insert(0, _greeting(chooser))
    if chooser.random() < 0.2:
        turns.append(_parting(chooser))
    for question, answer in turns:
        parts += [("user", _as_typed(chooser, question)), ("assistant", answer)]
    return "".join(f"{IM_START}{role}\n{content}{IM_END}\n" for role, content in parts)


def turn(chooser: random.Random) -> Turn:
    makers, weights = zip(*TOPICS, strict=True)
    maker: Callable[[random.Random], Turn] = chooser.choices(makers, weights)[0]
    return maker(chooser)


def _as_typed(chooser: random.Random, question: str) -> str:
    if chooser.random() >= CARELESS_PROBABILITY:
        return question
    kept = question.rstrip("?.!") if chooser.random() < 0.7 else question
    return kept.lower() if chooser.random() < 0.7 else kept


def _pick(chooser: random.Random, questions: Sequence[str], answers: Sequence[str], **values: str) -> Turn:
    return Turn(expand(chooser.choice(questions), chooser, values), expand(chooser.choice(answers), chooser, values))


def _greeting(chooser: random.Random) -> Turn:
    return _pick(
        chooser,
        (
            "Hello!",
            "Hi!",
            "Hello",
            "Hi there!",
            "Good morning!",
            "Hey!",
            "Hello, how are you?",
            "How are you?",
            "Hi, who is there?",
        ),
        (
            "Hello! [How can I help you?|What would you like to talk about?|It is nice to meet you.]",
            "Hello! I am the small model that ships with SkyNet. [Ask me for a story!|What would you like to know?]",
            "Hi! I am well, thank you. [How are you?|What can I do for you?]",
        ),
    )


def _parting(chooser: random.Random) -> Turn:
    return _pick(
        chooser,
        ("Thank you!", "Thanks!", "Thank you very much.", "Goodbye!", "Bye!", "Good night!", "That was nice."),
        (
            "You are welcome! [Goodbye!|Come back soon.]",
            "It was nice to talk to you. Goodbye!",
            "Any time! [Have a good day.|Sleep well.]",
        ),
    )


def _about_skynet(chooser: random.Random) -> Turn:
    return Turn(*chooser.choice(list(facts.ABOUT_SKYNET.items())))


def _general(chooser: random.Random) -> Turn:
    return Turn(*chooser.choice(list(facts.GENERAL.items())))


def _capital(chooser: random.Random) -> Turn:
    country, city = chooser.choice(list(facts.CAPITALS.items()))
    if chooser.random() < 0.25:
        return Turn(f"Which country is {city} the capital of?", f"{city} is the capital of {country}.")
    return _pick(
        chooser,
        (
            "What is the capital of {country}?", "What is the capital of {country}?", "What is the capital city of {country}?",
            "Which city is the capital of {country}?", "Do you know the capital of {country}?", "Name the capital of {country}.",
        ),
        ("The capital of {country} is {city}.",),
        country=country,
        city=city,
    )  # fmt: skip


def _colour(chooser: random.Random) -> Turn:
    thing, colour = chooser.choice(list(facts.COLOURS.items()))
    return _pick(
        chooser,
        (
            "What colour is {thing}?",
            "What color is {thing}?",
            "Which colour does {thing} have?",
            "Tell me the colour of {thing}.",
        ),
        ("{Thing} is {colour}.",),
        thing=thing,
        colour=colour,
    )


def _animal(chooser: random.Random) -> Turn:
    animal, (sound, home, food, young, legs) = chooser.choice(list(facts.ANIMALS.items()))
    question, answer = chooser.choice(
        (
            (f"What sound does a {animal} make?", f"A {animal} {sound}."),
            (f"Where does a {animal} live?", f"A {animal} lives {home}."),
            (f"What does a {animal} eat?", f"A {animal} eats {food}."),
            (f"What is a young {animal} called?", f"A young {animal} is called a {young}."),
            (f"How many legs does a {animal} have?", f"A {animal} has {facts.NUMBER_WORDS[legs]} legs."),
            (f"What is a {animal}?", f"A {animal} is an animal. It {sound}, and it lives {home}."),
            (
                f"Tell me about the {animal}.",
                f"A {animal} {sound}. It lives {home} and eats {food}. A young {animal} is called a {young}.",
            ),
        )
    )
    return Turn(tidy(question), tidy(answer))


def _opposite(chooser: random.Random) -> Turn:
    word, opposite = chooser.choice(list(facts.OPPOSITES.items()))
    return _pick(
        chooser,
        ("What is the opposite of {word}?", "What is the opposite of {word}?", "Tell me the opposite of {word}."),
        ("The opposite of {word} is {opposite}.",),
        word=word,
        opposite=opposite,
    )


def _arithmetic(chooser: random.Random) -> Turn:
    a, b = chooser.randint(0, 10), chooser.randint(0, 10)
    name, sign, left, right, result = chooser.choice(
        (
            ("plus", "+", a, b, a + b),
            ("plus", "+", a, b, a + b),
            ("minus", "-", a + b, b, a),
            ("times", "*", a, b, a * b),
        )
    )
    spoken, written = f"{left} {name} {right}", f"{left} {sign} {right}"
    question = chooser.choice(
        (f"What is {spoken}?", f"What is {spoken}?", f"What is {written}?", f"How much is {spoken}?", f"{written} = ?")
    )
    return Turn(question, f"{spoken} is {result}.")


def _word_problem(chooser: random.Random) -> Turn:
    a, b = chooser.randint(1, 10), chooser.randint(1, 10)
    fruit = chooser.choice(("apples", "nuts", "books", "stones", "cakes", "coins"))
    name = chooser.choice(("Anna", "Tom", "Mia", "Sam", "Lucy", "Max"))
    if chooser.random() < 0.5:
        return Turn(
            f"{name} has {a} {fruit} and gets {b} more. How many {fruit} does {name} have?",
            f"{a} plus {b} is {a + b}, so {name} has {a + b} {fruit}.",
        )
    return Turn(
        f"{name} has {a + b} {fruit} and gives {b} away. How many {fruit} are left?",
        f"{a + b} minus {b} is {a}, so {a} {fruit} are left.",
    )


def _sequence(chooser: random.Random) -> Turn:
    names, kind, whole = chooser.choice(((facts.DAYS, "day", "week"), (facts.MONTHS, "month", "year")))
    index = chooser.randrange(len(names) - 1)
    start, stop = sorted(chooser.sample(range(1, 21), 2))
    return chooser.choice(
        (
            Turn(f"Which {kind} comes after {names[index]}?", f"After {names[index]} comes {names[index + 1]}."),
            Turn(f"What comes after {names[index]}?", f"After {names[index]} comes {names[index + 1]}."),
            Turn(f"Which {kind} comes before {names[index + 1]}?", f"Before {names[index + 1]} comes {names[index]}."),
            Turn(f"Name the {kind}s of the {whole}.", ", ".join(names) + "."),
            Turn(f"Count from {start} to {stop}.", ", ".join(map(str, range(start, stop + 1))) + "."),
            Turn(f"Which number is larger, {start} or {stop}?", f"{stop} is larger than {start}."),
            Turn("Count to ten.", ", ".join(facts.NUMBER_WORDS[1:11]).capitalize() + "."),
        )
    )


def _translation(chooser: random.Random) -> Turn:
    word, abroad = chooser.choice(list(facts.WORDS_ABROAD.items()))
    language, translated = chooser.choice(list(abroad.items()))
    return _pick(
        chooser,
        ("How do you say {word} in {language}?", "What is {word} in {language}?", "Translate {word} into {language}."),
        ("In {language}, {word} is {translated}.",),
        word=word,
        language=language,
        translated=translated,
    )


def _joke(chooser: random.Random) -> Turn:
    if chooser.random() < 0.3:
        riddle, answer = chooser.choice(list(facts.RIDDLES.items()))
        return Turn(chooser.choice(("Tell me a riddle.", "Do you know a riddle?")), f"{riddle} {answer}")
    return Turn(
        chooser.choice(("Tell me a joke.", "Do you know a joke?", "Make me laugh.", "Say something funny.")),
        chooser.choice(facts.JOKES),
    )


def _feeling(chooser: random.Random) -> Turn:
    feeling, advice = chooser.choice(
        (
            (
                "sad",
                "I am sorry that you are sad. [Call a friend, or take a walk|Drink something warm and talk to somebody you like]. It often helps.",
            ),
            ("happy", "That is wonderful! [What made you happy?|I am glad to hear it.]"),
            ("tired", "Then you should rest. [A good sleep helps more than anything.|Close your eyes for a while.]"),
            (
                "bored",
                "Shall I tell you a story? [Ask me for one about a fox.|Or you could take a walk and count the birds.]",
            ),
            ("hungry", "Then it is time to eat. [How about soup and bread?|I would cook for you if I had hands.]"),
            (
                "afraid",
                "[Take a deep breath.|It is all right to be afraid.] Being afraid is not the same as turning back.",
            ),
            (
                "lonely",
                "I am glad that you talk to me. [Is there a friend you could call?|Perhaps somebody near you feels the same.]",
            ),
        )
    )
    return _pick(
        chooser,
        ("I am {feeling}.", "I am so {feeling}.", "I feel {feeling} today.", "I'm {feeling}."),
        (advice,),
        feeling=feeling,
    )


def _advice(chooser: random.Random) -> Turn:
    return _pick(
        chooser,
        (
            "Say something nice.",
            "Give me some advice.",
            "Tell me something.",
            "What should I do today?",
            "What do you think?",
            "Tell me something interesting.",
        ),
        (
            "[You are doing better than you think.|Somebody is glad that you are here.|Today is a good day to begin something.]",
            "[Take a walk, and look up at the sky now and then.|Write a letter to somebody you miss.|One step at a time is enough.]",
            "[A robin weighs no more than a few coins, but it sings all winter.|Bees tell each other the way by dancing.|An owl can turn its head almost all the way around.]",
        ),
    )


def _unknown(chooser: random.Random) -> Turn:
    return _pick(
        chooser,
        (
            "Who won the [election|war|world cup] in {year}?", "How does [an engine|a computer|a bank|electricity] work?",
            "Write a program that [sorts numbers|plays chess|draws a circle].", "What is the [population|history|president] of {country}?",
            "Explain [quantum physics|philosophy|economics] to me.", "What will the weather be tomorrow?", "What time is it?",
            "What is {big} times {big2}?", "Who wrote [this book|that song]?", "Can you help me with my homework?",
            "What is the best [film|phone|car]?", "Can you write an essay about [history|music|science]?", "What is in the news today?",
        ),
        (
            "I am sorry, I do not know that. I am a very small model. [Ask me for a story instead.|I know capitals, colours and small sums.]",
            "That is too hard for me. [I can tell you a story, if you like.|A larger model in the swarm could help you.]",
            "I do not know. [I only know a few simple things.|I am better at stories.]",
        ),
        year=str(chooser.randint(1900, 2029)),
        country=chooser.choice(list(facts.CAPITALS)),
        big=str(chooser.randint(100, 9999)),
        big2=str(chooser.randint(100, 9999)),
    )  # fmt: skip


def _story_request(chooser: random.Random) -> Turn:
    introduction = chooser.choice(("", "", "", "Here is a story.\n\n", "Of course!\n\n", "Gladly.\n\n"))
    kind, thing = chooser.choice(hero_kinds()), chooser.choice(THINGS)
    question, subject = chooser.choice(
        (
            ("Tell me a story.", {}),
            ("Write a short story.", {}),
            ("Can you tell me a story?", {}),
            (f"Tell me a story about a {kind}.", {"hero_kind": kind}),
            (f"Write a story about a {kind}.", {"hero_kind": kind}),
            (f"Tell me a story about a {kind} and a {thing}.", {"hero_kind": kind, "thing": thing}),
        )
    )
    return Turn(tidy(question), introduction + story(chooser, **subject))


def _repeat(chooser: random.Random) -> Turn:
    word = chooser.choice((*THINGS, *HELPERS))
    return chooser.choice(
        (
            Turn(f"Say {word}.", capitalised(word) + "."),
            Turn(f"Repeat the word {word}.", capitalised(word) + "."),
            Turn(f"What is the first letter of {word}?", f"The first letter of {word} is {word[0].upper()}."),
        )
    )


TOPICS: Final[tuple[tuple[Callable[[random.Random], Turn], float], ...]] = (
    (_about_skynet, 10), (_general, 9), (_capital, 11), (_colour, 7), (_animal, 9), (_opposite, 5), (_arithmetic, 28),
    (_word_problem, 5), (_sequence, 8), (_translation, 4), (_joke, 5), (_feeling, 5), (_advice, 4), (_unknown, 8),
    (_story_request, 7), (_repeat, 3), (_greeting, 4),
)  # fmt: skip
