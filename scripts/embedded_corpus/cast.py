"""Who and where: the characters, settings, seasons and things of a story, bound to the fields of the templates."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

GIRLS: Final = (
    "Anna", "Alice", "Clara", "Ella", "Emma", "Eva", "Grace", "Hannah", "Iris", "Ivy", "Julia", "Kate", "Lena",
    "Lily", "Lucy", "Maria", "Mia", "Mina", "Nora", "Olive", "Rosa", "Ruby", "Sara", "Sofia", "Tilly", "Vera",
    "Zoe", "Amina", "Priya", "Mei", "Yuki", "Leila",
)  # fmt: skip
BOYS: Final = (
    "Adam", "Ben", "Carl", "Daniel", "David", "Emil", "Felix", "Finn", "George", "Hugo", "Jack", "James", "Jonas",
    "Karim", "Leo", "Luca", "Mark", "Max", "Milo", "Noah", "Omar", "Oscar", "Paul", "Peter", "Ravi", "Sam", "Simon",
    "Theo", "Thomas", "Tom", "Victor", "Will",
)  # fmt: skip
SURNAMES: Final = (
    "Hall", "Brown", "Green", "Wood", "Hill", "Fisher", "Miller", "Stone", "Field", "Brook", "Marsh", "Reed",
    "Cole", "Lane", "Park", "Bell",
)  # fmt: skip

CHILD_KINDS: Final = ("child", "[GENDER]")
ADULT_KINDS: Final = (
    "baker", "painter", "gardener", "teacher", "tailor", "carpenter", "fiddler", "clockmaker", "beekeeper", "potter",
)  # fmt: skip
ANIMAL_KINDS: Final = (
    "fox", "hedgehog", "rabbit", "otter", "squirrel", "bear", "badger", "mouse", "owl", "deer", "hare", "frog",
)  # fmt: skip
HELPERS: Final = (
    "cat", "dog", "goat", "crow", "donkey", "goose", "horse", "robin", "toad", "swan", "duck", "pigeon",
)  # fmt: skip
TRAITS: Final = (
    "brave", "kind", "clever", "curious", "cheerful", "patient", "gentle", "quiet", "shy", "careful", "honest",
    "stubborn",
)  # fmt: skip

COLOURS: Final = (
    "red", "blue", "green", "yellow", "white", "black", "brown", "golden", "silver", "grey", "purple", "orange",
)  # fmt: skip
THINGS: Final = (
    "lamp", "bell", "kite", "drum", "ring", "key", "book", "box", "clock", "basket", "mirror", "flute", "coat", "hat",
    "spoon", "lantern", "shell", "scarf", "bowl", "cup", "feather", "button", "whistle", "umbrella", "bag", "pencil",
)  # fmt: skip
THING_STORIES: Final = (
    "a present from {his} grandmother", "a present from {his} grandfather", "the oldest thing in the house",
    "the first thing {he} had ever made with {his} own hands", "a gift from a friend who had moved far away",
    "the thing {he} loved best in the world",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Setting:
    """A kind of country, so that the places of one story fit together."""

    homes: Sequence[tuple[str, str]]  # (with its article and words around it, as it is named afterwards)
    spots: Sequence[str]  # where things happen
    ways: Sequence[str]  # what one walks along
    sights: Sequence[str]  # full sentences of what one sees on the way
    foods: Sequence[str]
    folk: Sequence[str]  # who lives there


COAST = Setting(
    homes=(
        ("a small village by the sea", "the village"),
        ("a white house near the harbour", "the white house"),
        ("a fishing town at the end of a long bay", "the town"),
        ("a cottage above the beach", "the cottage"),
        ("a lighthouse on a little island", "the lighthouse"),
    ),
    spots=(
        "the old lighthouse",
        "the harbour",
        "the cave under the cliff",
        "the long beach",
        "the broken pier",
        "the island",
    ),
    ways=("the sandy path", "the harbour wall", "the beach", "the cliff path", "the narrow street down to the water"),
    sights=(
        "Gulls cried above the water.",
        "Small waves ran up the sand and slid back again.",
        "Fishing boats rocked at the end of their ropes.",
        "The air smelled of salt and wet wood.",
        "Far out, a ship with white sails moved slowly past.",
        "Nets were drying in the wind.",
    ),
    foods=("fish soup", "warm bread and fish", "a bowl of soup", "apple pie", "hot potatoes with butter"),
    folk=("fishermen", "sailors", "neighbours", "people of the harbour"),
)
FOREST = Setting(
    homes=(
        ("a little house at the edge of the forest", "the little house"),
        ("a village between two woods", "the village"),
        ("a cottage under the tall pine trees", "the cottage"),
        ("a hut beside a stream in the forest", "the hut"),
        ("a wooden house deep in the forest", "the wooden house"),
    ),
    spots=(
        "the old oak tree",
        "the stone bridge",
        "the hidden pond",
        "the ruined tower",
        "the clearing",
        "the hollow hill",
    ),
    ways=(
        "the narrow path",
        "the stream",
        "the mossy track",
        "the old road through the trees",
        "the line of white stones",
    ),
    sights=(
        "Sunlight fell through the leaves in small bright spots.",
        "A woodpecker knocked somewhere high above.",
        "The moss was soft and deep under every step.",
        "The trees stood close together, like people at a fair.",
        "Mushrooms grew in a ring beside the path.",
        "A squirrel watched from a branch and did not move.",
    ),
    foods=("mushroom soup", "bread and honey", "nuts and berries", "blackberry pie", "a bowl of warm porridge"),
    folk=("woodcutters", "neighbours", "people of the forest", "families along the stream"),
)
MOUNTAIN = Setting(
    homes=(
        ("a village high in the mountains", "the village"),
        ("a stone house below the snowy peak", "the stone house"),
        ("a farm at the end of a steep valley", "the farm"),
        ("a small inn beside the mountain road", "the inn"),
    ),
    spots=(
        "the high meadow",
        "the frozen lake",
        "the shepherd's hut",
        "the waterfall",
        "the rocky pass",
        "the deep cave",
    ),
    ways=("the steep path", "the stony road", "the edge of the cliff", "the winding track", "the rushing river"),
    sights=(
        "An eagle turned slow circles over the rocks.",
        "Goats with small bells climbed from stone to stone.",
        "The peaks shone white against the sky.",
        "Far below, the valley looked as small as a toy.",
        "Cold clear water ran down beside the path.",
        "The wind sang between the rocks.",
    ),
    foods=("bread and cheese", "potato soup", "hot milk and bread", "a bowl of stew", "roasted chestnuts"),
    folk=("shepherds", "farmers", "neighbours", "people of the valley"),
)
TOWN = Setting(
    homes=(
        ("a narrow house in the old town", "the narrow house"),
        ("a big city full of bridges", "the city"),
        ("a small flat above a bakery", "the flat"),
        ("a busy town beside a wide river", "the town"),
        ("a quiet street behind the market", "the street"),
    ),
    spots=(
        "the clock tower",
        "the market square",
        "the library",
        "the old station",
        "the park",
        "the museum",
        "the theatre",
    ),
    ways=(
        "the long street",
        "the river bank",
        "the row of little shops",
        "the stairs behind the church",
        "the crooked lane",
    ),
    sights=(
        "Bicycles rattled over the stones.",
        "A tram rang its bell at the corner.",
        "The windows of the bakery were warm and yellow.",
        "Pigeons walked about as if they owned the square.",
        "Somebody was playing the piano behind an open window.",
        "People hurried past with bags and umbrellas.",
    ),
    foods=("noodles", "fresh rolls", "tomato soup", "rice and beans", "pancakes with jam", "hot chocolate and cake"),
    folk=("shopkeepers", "neighbours", "people of the town", "families on the street"),
)
FARM = Setting(
    homes=(
        ("a farm among green hills", "the farm"),
        ("a red house beside a wheat field", "the red house"),
        ("a village in the middle of the plain", "the village"),
        ("an old mill by the river", "the mill"),
    ),
    spots=("the barn", "the apple orchard", "the old well", "the mill pond", "the far field", "the hill with one tree"),
    ways=("the dusty road", "the edge of the field", "the river", "the hedge", "the cart track"),
    sights=(
        "The wheat moved in the wind like a golden sea.",
        "Hens scratched in the dust by the gate.",
        "A cart full of hay rolled by.",
        "Swallows flew low over the grass.",
        "Cows looked up, and then went on eating.",
        "The smell of cut grass was everywhere.",
    ),
    foods=("eggs and toast", "vegetable soup", "apple cake", "corn bread", "bread and butter", "plum pie"),
    folk=("farmers", "neighbours", "people of the village", "families from the farms"),
)
SETTINGS: Final = (COAST, FOREST, MOUNTAIN, TOWN, FARM)

SEASONS: Final[dict[str, tuple[Sequence[str], Sequence[str]]]] = {  # (the weather as a clause, a change of it)
    "spring": (
        ("the sun was shining", "a soft rain was falling", "the first flowers were out", "a fresh wind was blowing"),
        (
            "The clouds parted, and the whole sky turned blue.",
            "A rainbow stood over the hills.",
            "A short shower passed.",
        ),
    ),
    "summer": (
        ("the sun was hot", "the sky was blue and clear", "the air was warm and still", "the days were long"),
        (
            "Thunder rolled, and big warm drops began to fall.",
            "A cool breeze came at last.",
            "The evening sky turned pink.",
        ),
    ),
    "autumn": (
        ("the leaves were turning red", "fog lay over everything", "a strong wind was blowing", "it was raining"),
        (
            "The fog slowly lifted.",
            "The wind grew stronger and shook the branches.",
            "Brown leaves came spinning down.",
        ),
    ),
    "winter": (
        ("snow lay on the roofs", "it was bitterly cold", "frost covered the windows", "it was snowing"),
        (
            "Large soft flakes began to fall.",
            "The clouds went away, and the snow began to shine.",
            "It grew dark very early.",
        ),
    ),
}


@dataclass(frozen=True, slots=True)
class Character:
    name: str
    is_female: bool
    kind: str

    def pronouns(self, suffix: str = "") -> dict[str, str]:
        he, him, his = ("she", "her", "her") if self.is_female else ("he", "him", "his")
        return {f"he{suffix}": he, f"him{suffix}": him, f"his{suffix}": his}


def _character(chooser: random.Random, kinds: Sequence[str], taken: set[str]) -> Character:
    is_female = chooser.random() < 0.5
    name = chooser.choice([n for n in (GIRLS if is_female else BOYS) if n not in taken])
    taken.add(name)
    kind = chooser.choice(kinds).replace("[GENDER]", "girl" if is_female else "boy")
    return Character(name, is_female, kind)


def bind_cast(
    chooser: random.Random, *, hero_kind: str | None = None, thing: str | None = None
) -> dict[str, str | Sequence[str]]:
    """Every field a story template may use, chosen once, so that the story keeps to it.

    Plain fields are the hero's (he, him, his); those ending in 2 are the friend's, in 3 the elder's.
    """
    taken: set[str] = set()
    is_animal = hero_kind in ANIMAL_KINDS or (hero_kind is None and chooser.random() < 0.3)
    kinds = ANIMAL_KINDS if is_animal else (*CHILD_KINDS * 4, *ADULT_KINDS)
    hero = _character(chooser, [hero_kind] if hero_kind else kinds, taken)
    friend_kinds = (
        [k for k in ANIMAL_KINDS if k != hero.kind]
        if is_animal
        else CHILD_KINDS * 2
        if hero.kind in ("child", "girl", "boy")
        else ADULT_KINDS
    )
    friend = _character(chooser, [k for k in friend_kinds if is_animal or k != hero.kind] or friend_kinds, taken)
    elder = _elder(chooser, is_animal, hero, friend)
    setting = FOREST if is_animal and chooser.random() < 0.6 else chooser.choice(SETTINGS)
    home, the_home = chooser.choice(setting.homes)
    spot, far = chooser.sample(setting.spots, 2)
    season = chooser.choice(list(SEASONS))
    weather, changes = SEASONS[season]
    trait, trait2 = chooser.sample(TRAITS, 2)
    colour, other_colour = chooser.sample(COLOURS, 2)
    thing = thing or chooser.choice(THINGS)
    values: dict[str, str | Sequence[str]] = {
        "hero": hero.name, "kind": hero.kind, "trait": trait,
        "friend": friend.name, "kind2": friend.kind, "trait2": trait2,
        "elder": elder.name, "job": elder.kind,
        "helper": chooser.choice([h for h in HELPERS if h != hero_kind]),
        "home": home, "the_home": the_home, "spot": spot, "far": far, "way": chooser.choice(setting.ways),
        "sight": setting.sights, "food": setting.foods, "folk": chooser.choice(setting.folk),
        "season": season, "weather": chooser.choice(weather), "change": changes,
        "colour": colour, "colour2": other_colour, "thing": thing,
        "other_thing": chooser.choice([t for t in THINGS if t != thing]),
        "number": ("two", "three", "four", "five", "six", "seven"),
    }  # fmt: skip
    values |= hero.pronouns() | friend.pronouns("2") | elder.pronouns("3")
    story = chooser.choice(THING_STORIES)
    values["thing_story"] = story.replace("{his}", str(values["his"])).replace("{he}", str(values["he"]))
    return values


def _elder(chooser: random.Random, is_animal: bool, hero: Character, friend: Character) -> Character:
    is_female = chooser.random() < 0.5
    if is_animal:
        kinds = [k for k in ("owl", "badger", "bear", "deer", "tortoise", "heron") if k not in (hero.kind, friend.kind)]
        title = "Mother" if is_female else "Father"
        name = chooser.choice(("Willow", "Oak", "Maple", "Birch", "Thorn", "Ash"))
        return Character(f"{title} {name}", is_female, f"old {chooser.choice(kinds)}")
    kinds = [
        k
        for k in (*ADULT_KINDS, "postman" if not is_female else "doctor", "lighthouse keeper", "librarian")
        if k not in (hero.kind, friend.kind)
    ]
    return Character(f"{'Mrs' if is_female else 'Mr'} {chooser.choice(SURNAMES)}", is_female, chooser.choice(kinds))
