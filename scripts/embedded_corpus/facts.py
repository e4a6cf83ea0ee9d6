# ruff: noqa: E501  (a fact stays on its line)
"""The few facts the model is taught, for its prose and for its chats alike."""

from __future__ import annotations

from typing import Final

CAPITALS: Final[dict[str, str]] = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon", "England": "London",
    "Ireland": "Dublin", "Scotland": "Edinburgh", "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki",
    "Denmark": "Copenhagen", "Poland": "Warsaw", "Austria": "Vienna", "Hungary": "Budapest", "Greece": "Athens",
    "Belgium": "Brussels", "Russia": "Moscow", "Japan": "Tokyo", "China": "Beijing", "India": "New Delhi",
    "Egypt": "Cairo", "Kenya": "Nairobi", "Canada": "Ottawa", "Mexico": "Mexico City", "Brazil": "Brasilia",
    "Peru": "Lima", "Chile": "Santiago", "Cuba": "Havana", "Australia": "Canberra", "Turkey": "Ankara",
    "Iceland": "Reykjavik", "Ukraine": "Kyiv", "South Korea": "Seoul", "Thailand": "Bangkok", "Vietnam": "Hanoi",
    "Argentina": "Buenos Aires", "Switzerland": "Bern", "the Netherlands": "Amsterdam", "the United States": "Washington",
}  # fmt: skip

COLOURS: Final[dict[str, str]] = {
    "the sky": "blue", "grass": "green", "snow": "white", "the sun": "yellow", "a lemon": "yellow", "a tomato": "red",
    "a banana": "yellow", "coal": "black", "milk": "white", "a carrot": "orange", "blood": "red", "a frog": "green",
    "chocolate": "brown", "an elephant": "grey", "a strawberry": "red", "the sea": "blue", "a cucumber": "green",
    "honey": "golden", "a crow": "black", "a polar bear": "white", "a plum": "purple", "a pumpkin": "orange",
    "a cherry": "red", "a leaf in summer": "green", "the night": "black", "sand": "yellow", "salt": "white",
}  # fmt: skip

ANIMALS: Final[dict[str, tuple[str, str, str, str, int]]] = {  # sound, home, food, young, legs
    "dog": ("barks", "in a kennel or with people", "meat and bones", "puppy", 4),
    "cat": ("meows", "in a house with people", "fish and mice", "kitten", 4),
    "cow": ("moos", "in a barn or on a meadow", "grass and hay", "calf", 4),
    "horse": ("neighs", "in a stable", "hay and oats", "foal", 4),
    "sheep": ("bleats", "on a meadow", "grass", "lamb", 4),
    "pig": ("grunts", "in a sty", "almost anything", "piglet", 4),
    "duck": ("quacks", "on a pond", "water plants and snails", "duckling", 2),
    "hen": ("clucks", "in a hen house", "corn and worms", "chick", 2),
    "owl": ("hoots", "in an old tree or a barn", "mice", "owlet", 2),
    "lion": ("roars", "in the grasslands of Africa", "meat", "cub", 4),
    "bear": ("growls", "in the forest, often in a cave", "berries, fish and honey", "cub", 4),
    "wolf": ("howls", "in the forest", "meat", "pup", 4),
    "frog": ("croaks", "near a pond", "flies", "tadpole", 4),
    "bee": ("buzzes", "in a hive", "nectar from flowers", "larva", 6),
    "mouse": ("squeaks", "in a small hole", "seeds and cheese", "pup", 4),
    "goat": ("bleats", "in the mountains or on a farm", "grass and leaves", "kid", 4),
    "fox": ("yelps", "in a den", "mice and berries", "cub", 4),
    "rabbit": ("squeaks", "in a burrow", "grass and carrots", "kit", 4),
    "swan": ("hisses", "on a lake", "water plants", "cygnet", 2),
    "crow": ("caws", "in high trees", "seeds and worms", "chick", 2),
}  # fmt: skip

OPPOSITES: Final[dict[str, str]] = {
    "hot": "cold", "big": "small", "up": "down", "day": "night", "good": "bad", "fast": "slow", "light": "dark",
    "old": "young", "happy": "sad", "open": "closed", "full": "empty", "hard": "soft", "high": "low", "wet": "dry",
    "early": "late", "near": "far", "rich": "poor", "loud": "quiet", "left": "right", "long": "short", "black": "white",
    "first": "last", "inside": "outside", "heavy": "light", "strong": "weak", "true": "false", "begin": "end",
}  # fmt: skip

DAYS: Final = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS: Final = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December",
)  # fmt: skip
NUMBER_WORDS: Final = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip

GENERAL: Final[dict[str, str]] = {  # question: answer
    "How many days are in a week?": "There are seven days in a week.",
    "How many months are in a year?": "There are twelve months in a year.",
    "How many hours are in a day?": "There are twenty-four hours in a day.",
    "How many minutes are in an hour?": "There are sixty minutes in an hour.",
    "How many seasons are there?": "There are four seasons: spring, summer, autumn and winter.",
    "What are the four seasons?": "The four seasons are spring, summer, autumn and winter.",
    "What is the largest planet?": "Jupiter is the largest planet of our sun.",
    "What is the closest star?": "The closest star is the sun.",
    "How many planets are there?": "There are eight planets around our sun.",
    "How many legs does a spider have?": "A spider has eight legs.",
    "How many fingers does a hand have?": "A hand has five fingers.",
    "What is water made of?": "Water is made of hydrogen and oxygen.",
    "Where does the sun rise?": "The sun rises in the east and sets in the west.",
    "What is ice?": "Ice is water that is so cold that it has become hard.",
    "What is rain?": "Rain is water that falls from the clouds in drops.",
    "Why is the sky blue?": "The air scatters blue light more than red light, so the sky looks blue.",
    "What is the moon?": "The moon is a ball of rock that goes around the earth once a month.",
    "What is bread made of?": "Bread is made of flour, water, salt and yeast.",
    "What do bees make?": "Bees make honey and wax.",
    "What is the tallest animal?": "The giraffe is the tallest animal.",
    "What is the largest animal?": "The blue whale is the largest animal.",
    "What is the fastest land animal?": "The cheetah is the fastest animal on land.",
    "What is a triangle?": "A triangle is a shape with three sides and three corners.",
    "What is a square?": "A square is a shape with four equal sides and four corners.",
    "What are the primary colours?": "The primary colours are red, yellow and blue.",
    "What is a library?": "A library is a place where you can read and borrow books.",
    "What do plants need?": "Plants need water, light, air and earth.",
    "What is a friend?": "A friend is somebody who is glad when you come and who helps you when you need it.",
    "What is the meaning of life?": "I am too small a model to know. In my stories it is mostly friendship and soup.",
}

ABOUT_SKYNET: Final[dict[str, str]] = {
    "Who are you?": "I am the small model that ships with SkyNet. I can tell stories and answer a few simple questions.",
    "What are you?": "I am a very small language model. I ship with SkyNet, so that it works before you download anything.",
    "What is your name?": "I have no name of my own. I am the small model that ships with SkyNet.",
    "What can you do?": "I can tell little stories, add small numbers, and name capitals, colours and animals. That is about all.",
    "Are you a robot?": "No, I am only a small language model. I ship with SkyNet.",
    "Are you a human?": "No, I am a small language model that ships with SkyNet.",
    "How big are you?": "I am very small: about four million numbers in six layers.",
    "What is SkyNet?": "SkyNet is a swarm of computers lent by volunteers. Together they run a model that is too large for any one of them.",
    "How does SkyNet work?": "Each computer holds a few layers of the model and passes its result to the next, like people in a line who pass buckets of water.",
    "Why are you so small?": "I have to fit inside a Python package, so I am only about eight megabytes. SkyNet can run much larger models.",
    "Can you run on many computers?": "Yes. My six layers can be split among several computers, and together they give the same answer as one.",
    "Who made you?": "The people who write SkyNet trained me on stories that a program wrote.",
    "Where do you live?": "I live in the computers of a swarm called SkyNet, a few layers here and a few layers there.",
    "How do you learn?": "I learned once, from many little stories, and now I only write what I have learned.",
}

JOKES: Final = (
    "Why did the clock go to school? It wanted to be on time.",
    "What do you call a bear without teeth? A gummy bear.",
    "Why do bees hum? Because they do not know the words.",
    "What is brown and sticky? A stick.",
    "Why did the book look sad? It had too many problems.",
    "What did one wall say to the other? I will meet you at the corner.",
    "Why are fish so clever? Because they live in schools.",
    "What has hands but cannot clap? A clock.",
)

RIDDLES: Final[dict[str, str]] = {
    "What has a neck but no head?": "A bottle.",
    "What gets wetter the more it dries?": "A towel.",
    "What has keys but opens no door?": "A piano.",
    "What has teeth but cannot bite?": "A comb.",
    "What goes up but never comes down?": "Your age.",
}

WORDS_ABROAD: Final[dict[str, dict[str, str]]] = {
    "hello": {"French": "bonjour", "German": "hallo", "Spanish": "hola", "Italian": "ciao"},
    "thank you": {"French": "merci", "German": "danke", "Spanish": "gracias", "Italian": "grazie"},
    "yes": {"French": "oui", "German": "ja", "Spanish": "sí", "Italian": "sì"},
    "no": {"French": "non", "German": "nein", "Spanish": "no", "Italian": "no"},
    "goodbye": {"French": "au revoir", "German": "auf Wiedersehen", "Spanish": "adiós", "Italian": "arrivederci"},
    "friend": {"French": "ami", "German": "Freund", "Spanish": "amigo", "Italian": "amico"},
    "water": {"French": "eau", "German": "Wasser", "Spanish": "agua", "Italian": "acqua"},
}
