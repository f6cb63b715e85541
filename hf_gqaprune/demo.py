"""A seed goes in, small stories come out; beside them lies a Llama that was trained on such stories.

The stories carry names over sentences, agree in number, count, and ask later what was said before, so that pruning the
model hurts and recovery helps. Splits differ in their seed and in nothing else.
"""

from __future__ import annotations

import random
from pathlib import Path

from .errors import unknown

SPLITS = {"train": (11, 2_000_000), "calibration": (12, 500_000), "test": (13, 120_000)}

_PEOPLE = {
    "she": "Anna Mira Lena Ruth Clara Nora Sofia Greta Ida Vera Hanna Olga Paula Rosa Tilda Wanda Alma Edith Flora Jane",
    "he": "Ben Karl Otto Emil Hugo Paul Max Leo Oskar Felix Anton Bruno David Erik Frank Georg Henry Ivan Jonas Kurt",
}
_ADJECTIVES = (
    "old small red blue green heavy light broken new wooden silver golden round empty dusty clean bright dark wet dry soft "
    "rough cheap rare strange pretty tiny large narrow wide"
).split()
_THINGS = {
    "apple": "apples", "book": "books", "key": "keys", "coin": "coins", "letter": "letters", "lamp": "lamps",
    "shell": "shells", "brush": "brushes", "box": "boxes", "knife": "knives", "plum": "plums", "stone": "stones",
    "cup": "cups", "ring": "rings", "map": "maps", "rope": "ropes", "bottle": "bottles", "candle": "candles",
    "basket": "baskets", "glove": "gloves", "button": "buttons", "feather": "feathers", "hammer": "hammers",
    "pear": "pears", "loaf": "loaves", "berry": "berries", "toy": "toys", "clock": "clocks", "bell": "bells",
    "drum": "drums",
}  # fmt: skip
_PLACES = (
    "in the kitchen|in the garden|under the bridge|on the roof|behind the church|at the market|in the cellar|near the river|"
    "on the hill|in the library|beside the well|at the station|in the barn|on the shelf|under the bed|by the window|"
    "in the workshop|at the harbour|in the attic|on the old table"
).split("|")
_MOODS = "happy tired proud sad angry calm hungry late early careful quiet nervous sure curious lonely glad".split()
_JOBS = "baker teacher sailor farmer doctor painter miller tailor hunter singer clerk gardener fisher judge cook smith".split()
_WEATHER = "sun wind rain snow fog frost thunder heat".split()
_SKIES = {"sun": "shone", "wind": "blew", "rain": "fell", "snow": "fell", "fog": "rose", "frost": "bit", "thunder": "rolled"}
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_MONTHS = "January February March April May June July August September October November December".split()
_NUMBERS = (
    "no one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
_ANIMALS = {"dog": "barks", "cat": "sleeps", "horse": "waits", "goose": "hisses", "goat": "jumps", "hen": "scratches"}
_PLURALS = {"dog": "dogs", "cat": "cats", "horse": "horses", "goose": "geese", "goat": "goats", "hen": "hens"}


def model_path() -> Path:
    """Folder of the embedded checkpoint: a trained Llama with 32 query and 8 KV heads, and its tokenizer."""
    return Path(__file__).parent / "demo_model"


def text(split: str, chars: int | None = None) -> str:
    """Stories of a split, the same for everybody.

    Args:
        split: `train`, `calibration` or `test`.
        chars: how many characters, cut at the end of a story; by default 2,000,000, 500,000 and 120,000.

    Raises:
        UsageError: for any other split.
    """
    if split not in SPLITS:
        raise unknown("split of the demo text", split, SPLITS)
    seed, length = SPLITS[split]
    dice = _Dice(seed)
    stories: list[str] = []
    left = length if chars is None else chars
    while left > 0:
        stories.append(_story(dice))
        left -= len(stories[-1]) + 2
    return "\n\n".join(stories) + "\n"


class _Dice:
    """Choices from `random()` alone, whose sequence Python guarantees across versions."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def number(self, low: int, high: int) -> int:
        return low + int(self._random() * (high - low + 1))

    def one(self, options: list[str] | tuple[str, ...]) -> str:
        return options[self.number(0, len(options) - 1)]

    def some(self, options: list[str], count: int) -> list[str]:
        pool = list(options)
        return [pool.pop(self.number(0, len(pool) - 1)) for _ in range(count)]

    def person(self) -> tuple[str, str]:
        pronoun = self.one(("she", "he"))
        return self.one(_PEOPLE[pronoun].split()), pronoun

    def thing(self) -> str:
        return self.one(list(_THINGS))


def _count(number: int, thing: str) -> str:
    return f"{_NUMBERS[number]} {thing if number == 1 else _THINGS[thing]}"


def _article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _story(dice: _Dice) -> str:
    name, pronoun = dice.person()
    parts = [_opening(dice, name, pronoun)]
    scenes = [_counting, _moving, _talking, _listing, _animals, _giving, _dates]
    for _ in range(dice.number(2, 4)):
        scene = scenes[dice.number(0, len(scenes) - 1)]
        parts.append(scene(dice, name, pronoun))
    parts.append(_ending(dice, name, pronoun))
    return " ".join(parts)


def _opening(dice: _Dice, name: str, pronoun: str) -> str:
    job, place, mood = dice.one(_JOBS), dice.one(_PLACES), dice.one(_MOODS)
    weather = dice.one(list(_SKIES))
    return dice.one(
        (
            f"{name} was {_article(job)} and {pronoun} lived {place}.",
            f"One {dice.one(_DAYS)} the {weather} {_SKIES[weather]} all morning, and {name} the {job} was {mood}.",
            f"There once was {_article(job)} called {name}. Every day {pronoun} worked {place}.",
            f"{name} woke up early. The {weather} {_SKIES[weather]}, but {pronoun} was {mood}.",
        )
    )


def _counting(dice: _Dice, name: str, pronoun: str) -> str:
    thing, first, more = dice.thing(), dice.number(1, 9), dice.number(1, 9)
    begin = f"{name} had {_count(first, thing)}."
    if dice.number(0, 1):
        found = dice.one(("found", "bought", "got"))
        return f"{begin} Then {pronoun} {found} {_NUMBERS[more]} more, so {pronoun} had {_count(first + more, thing)}."
    less = dice.number(1, first)
    lost = dice.one(("lost", "sold", "gave away"))
    rest = _count(first - less, thing)
    return f"{begin} Then {pronoun} {lost} {_NUMBERS[less]} of them, so {pronoun} had {rest} left."


def _moving(dice: _Dice, name: str, pronoun: str) -> str:
    thing, adjective = dice.thing(), dice.one(_ADJECTIVES)
    first, second = dice.some(_PLACES, 2)
    item = f"{adjective} {thing}"
    return (
        f"{name} put the {item} {first}. Later {pronoun} carried it away and left it {second}. "
        f"Where was the {item}? The {item} was {second}, not {first}."
    )


def _talking(dice: _Dice, name: str, pronoun: str) -> str:
    other, other_pronoun = dice.person()
    thing, place, mood = dice.thing(), dice.one(_PLACES), dice.one(_MOODS)
    ask = f'"Have you seen my {thing}?" asked {other}.'
    answer = dice.one(
        (
            f'"Yes, it is {place}," said {name}. So {other} went to look {place}, and there it was.',
            f'"No, I have not," said {name}. So {other} went home without the {thing}, and {other_pronoun} was {mood}.',
        )
    )
    return f"{ask} {answer}"


def _listing(dice: _Dice, name: str, pronoun: str) -> str:
    a, b, c = dice.some(list(_THINGS), 3)
    numbers = [dice.number(2, 9) for _ in range(3)]
    listed = f"{_count(numbers[0], a)}, {_count(numbers[1], b)} and {_count(numbers[2], c)}"
    which = dice.number(0, 2)
    asked = (a, b, c)[which]
    return (
        f"In the bag of {name} there were {listed}. How many {_THINGS[asked]} did {name} have? "
        f"{pronoun.capitalize()} had {_count(numbers[which], asked)}."
    )


def _animals(dice: _Dice, name: str, pronoun: str) -> str:
    animal, place = dice.one(list(_ANIMALS)), dice.one(_PLACES)
    verb, mood = _ANIMALS[animal], dice.one(_MOODS)
    if dice.number(0, 1):
        return f"The {animal} of {name} {verb} {place} when it is {mood}."
    count, plural = _NUMBERS[dice.number(2, 9)], verb[:-2] if verb.endswith(("hes", "ses")) else verb[:-1]
    return f"The {count} {_PLURALS[animal]} of {name} {plural} {place} when they are {mood}."


def _giving(dice: _Dice, name: str, pronoun: str) -> str:
    other, other_pronoun = dice.person()
    thing, adjective, mood = dice.thing(), dice.one(_ADJECTIVES), dice.one(_MOODS)
    item = f"{adjective} {thing}"
    return (
        f"{name} gave {other} {_article(item)}. {other} thanked {name}, for {other_pronoun} had wanted {_article(item)} "
        f"for a long time. Now the {item} belongs to {other}, and {name} is {mood}."
    )


def _dates(dice: _Dice, name: str, pronoun: str) -> str:
    day = dice.number(0, 6)
    month, date, year = dice.one(_MONTHS), dice.number(1, 28), dice.number(1801, 1999)
    return (
        f"It was {_DAYS[day]}, {month} {date}, {year}. The next day, on {_DAYS[(day + 1) % 7]}, {month} {date + 1}, {year}, "
        f"{name} went {dice.one(('home', 'to town', 'to the sea', 'to work', 'to bed early'))}."
    )


def _ending(dice: _Dice, name: str, pronoun: str) -> str:
    mood, place = dice.one(_MOODS), dice.one(_PLACES)
    return dice.one(
        (
            f"In the evening {name} was {mood} and {pronoun} slept {place}.",
            f"That is all there is to say about {name}.",
            f"At last {name} sat down {place}, and {pronoun} was {mood}.",
            f"And so {name} went home, {mood} as ever.",
        )
    )
