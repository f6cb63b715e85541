"""Generate small stories from a seed, and locate the embedded Llama that was trained on such stories.

The stories carry names over sentences, agree in number, count, and ask later what was said before, so that pruning the
model hurts and recovery helps. Splits differ in their seed and in nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from ..errors import UsageError, unknown

DEMO_SPLITS = {"train": (11, 2_000_000), "calibration": (12, 500_000), "test": (13, 120_000)}
"""Seed and default number of characters of each split."""
NUMBERS = (
    "no one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
"""Number words, each at the index it stands for."""
_T = TypeVar("_T")
_WOMEN = (
    "Anna Mira Lena Ruth Clara Nora Sofia Greta Ida Vera Hanna Olga Paula Rosa Tilda Wanda Alma Edith Flora Jane Agnes "
    "Berta Dora Emma Helen Julia Karin Laura Maria Nina Petra Sarah"
).split()
_MEN = (
    "Ben Karl Otto Emil Hugo Paul Max Leo Oskar Felix Anton Bruno David Erik Frank Georg Henry Ivan Jonas Kurt Adam Boris "
    "Daniel Edgar Fritz Gustav Jakob Lukas Martin Peter Robert Simon"
).split()
_ADJECTIVES = (
    "old small red blue green heavy light broken new wooden silver golden round empty dusty clean bright dark wet dry soft "
    "rough cheap rare strange pretty tiny large narrow wide white black yellow brown grey warm cold smooth sharp thin thick "
    "plain fine simple lovely useful"
).split()
_THINGS = {
    "apple": "apples", "book": "books", "key": "keys", "coin": "coins", "letter": "letters", "lamp": "lamps",
    "shell": "shells", "brush": "brushes", "box": "boxes", "knife": "knives", "plum": "plums", "stone": "stones",
    "cup": "cups", "ring": "rings", "map": "maps", "rope": "ropes", "bottle": "bottles", "candle": "candles",
    "basket": "baskets", "glove": "gloves", "button": "buttons", "feather": "feathers", "hammer": "hammers",
    "pear": "pears", "loaf": "loaves", "berry": "berries", "toy": "toys", "clock": "clocks", "bell": "bells",
    "drum": "drums", "plate": "plates", "spoon": "spoons", "chair": "chairs", "hat": "hats", "coat": "coats",
    "shoe": "shoes", "leaf": "leaves", "egg": "eggs", "nail": "nails", "pen": "pens", "picture": "pictures",
    "mirror": "mirrors", "flower": "flowers", "onion": "onions", "cherry": "cherries", "watch": "watches",
    "scarf": "scarves", "blanket": "blankets", "ladder": "ladders", "bucket": "buckets", "needle": "needles",
    "ticket": "tickets", "stamp": "stamps", "violin": "violins", "orange": "oranges", "potato": "potatoes",
}  # fmt: skip
_PLACES = (
    "in the kitchen|in the garden|under the bridge|on the roof|behind the church|at the market|in the cellar|near the river|"
    "on the hill|in the library|beside the well|at the station|in the barn|on the shelf|under the bed|by the window|"
    "in the workshop|at the harbour|in the attic|on the table|behind the door|near the oven|under the stairs|in the drawer|"
    "at the inn|on the bench|beside the road|in the forest|by the lake|near the tower|in the stable|at the mill|"
    "behind the wall|under the oak|on the island|in the castle"
).split("|")
_MOODS = (
    "happy tired proud sad angry calm hungry late early careful quiet nervous sure curious lonely glad brave busy thirsty "
    "sleepy cheerful worried patient bored pleased afraid polite clever rude grateful"
).split()
_JOBS = (
    "baker teacher sailor farmer doctor painter miller tailor hunter singer clerk gardener fisher judge cook smith weaver "
    "soldier lawyer printer carpenter driver merchant poet dancer nurse"
).split()
_SKIES = {
    "sun": "shone", "wind": "blew", "rain": "fell", "snow": "fell", "fog": "rose", "frost": "bit", "thunder": "rolled",
    "moon": "hid", "storm": "raged", "hail": "fell",
}  # fmt: skip
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_MONTHS = "January February March April May June July August September October November December".split()
_ANIMALS = {
    "dog": ("dogs", "barks", "bark"), "cat": ("cats", "sleeps", "sleep"), "horse": ("horses", "waits", "wait"),
    "goose": ("geese", "hisses", "hiss"), "goat": ("goats", "jumps", "jump"), "hen": ("hens", "scratches", "scratch"),
    "mouse": ("mice", "hides", "hide"), "sheep": ("sheep", "eats", "eat"), "pig": ("pigs", "digs", "dig"),
    "duck": ("ducks", "swims", "swim"), "cow": ("cows", "stands", "stand"), "fox": ("foxes", "watches", "watch"),
}  # fmt: skip
_KIN = {"she": "sister aunt cousin neighbour niece".split(), "he": "brother uncle cousin neighbour nephew".split()}
_GOALS = (
    "home|to town|to the sea|to work|to bed early|to school|for a walk|to a wedding|to the theatre|to the post office"
).split("|")
_SKILLS = "swim sing dance read write paint ride sail sew cook whistle climb".split()


def demo_model_path() -> Path:
    """Folder of the embedded checkpoint: a trained Llama with 32 query and 8 KV heads, and its tokenizer."""
    return Path(__file__).parent / "demo_model"


def demo_text(split: str, chars: int | None = None) -> str:
    """Stories of a split, separated by blank lines, the same on every machine.

    Args:
        split: `train`, `calibration` or `test`.
        chars: how many characters at least; the story that reaches it is finished. By default 2,000,000, 500,000 and
            120,000. A longer text begins with the shorter one.

    Raises:
        UsageError: for any other split, or fewer than one character.
    """
    if split not in DEMO_SPLITS:
        raise unknown("split of the demo text", split, DEMO_SPLITS)
    if chars is not None and chars < 1:
        raise UsageError(f"cannot write {chars} characters of demo text; give 1 or more")
    seed, length = DEMO_SPLITS[split]
    dice = _Dice(seed)
    stories: list[str] = []
    left = length if chars is None else chars
    while left > 0:
        stories.append(_tell(dice))
        left -= len(stories[-1]) + 2
    return "\n\n".join(stories) + "\n"


class _Dice:
    """Choices from `random()` alone, whose sequence Python guarantees across versions."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def number(self, low: int, high: int) -> int:
        return low + int(self._random() * (high - low + 1))

    def one(self, options: Sequence[_T]) -> _T:
        return options[self.number(0, len(options) - 1)]

    def some(self, options: Sequence[_T], count: int) -> list[_T]:
        pool = list(options)
        return [pool.pop(self.number(0, len(pool) - 1)) for _ in range(count)]

    def person(self, *others: str) -> _Person:
        """Somebody whose name is not among `others`."""
        woman = self.number(0, 1) == 1
        name = self.one([name for name in (_WOMEN if woman else _MEN) if name not in others])
        return _Person(name, *(("she", "her", "her") if woman else ("he", "him", "his")))


@dataclass(frozen=True)
class _Person:
    name: str
    they: str
    them: str
    their: str


@dataclass
class _Story:
    """What has been told: the hero, a friend, and the things that a later question may be about."""

    dice: _Dice
    hero: _Person
    friend: _Person
    questions: list[str] = field(default_factory=list)

    def fresh(self, options: Sequence[str], count: int) -> list[str]:
        """Things no pending question is about, lest a later scene change the answer."""
        asked = " ".join(self.questions)
        return self.dice.some([thing for thing in options if not (thing in asked or _THINGS[thing] in asked)], count)


def _count(number: int, thing: str) -> str:
    return f"{NUMBERS[number]} {thing if number == 1 else _THINGS[thing]}"


def _article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _tell(dice: _Dice) -> str:
    hero = dice.person()
    story = _Story(dice, hero, dice.person(hero.name))
    parts = [_opening(story)]
    parts += [dice.one(_SCENES)(story) for _ in range(dice.number(2, 4))]
    if story.questions:
        parts.append(dice.one(story.questions))
    parts.append(_ending(story))
    return " ".join(parts)


def _opening(story: _Story) -> str:
    dice, hero, friend = story.dice, story.hero, story.friend
    job, place, mood, sky = dice.one(_JOBS), dice.one(_PLACES), dice.one(_MOODS), dice.one(list(_SKIES))
    kin = dice.one(_KIN[friend.they])
    return dice.one(
        (
            f"{hero.name} was {_article(job)} and {hero.they} lived {place} with {hero.their} {kin} {friend.name}.",
            f"One {dice.one(_DAYS)} the {sky} {_SKIES[sky]} all morning, and {hero.name} the {job} was {mood}.",
            f"There once was {_article(job)} called {hero.name}. Every day {hero.they} worked {place}.",
            f"{hero.name} woke up early. The {sky} {_SKIES[sky]}, but {hero.they} was {mood}.",
            f"{hero.name} and {friend.name} were {job}s. They worked {place}, and they were {mood}.",
        )
    )


def _counting(story: _Story) -> str:
    dice, hero = story.dice, story.hero
    thing, first, more = story.fresh(list(_THINGS), 1)[0], dice.number(1, 9), dice.number(1, 9)
    begin = f"{hero.name} had {_count(first, thing)}."
    if dice.number(0, 1):
        total, how = first + more, dice.one(("found", "bought", "got", "made"))
        end = f"Then {hero.they} {how} {NUMBERS[more]} more, so {hero.they} had {_count(total, thing)}."
    else:
        less = dice.number(1, first)
        total, how = first - less, dice.one(("lost", "sold", "gave away", "broke"))
        end = f"Then {hero.they} {how} {NUMBERS[less]} of them, so {hero.they} had {_count(total, thing)} left."
    story.questions.append(
        f"How many {_THINGS[thing]} did {hero.name} have in the end? {hero.they.capitalize()} had {_count(total, thing)}."
    )
    return f"{begin} {end}"


def _together(story: _Story) -> str:
    dice, hero, friend = story.dice, story.hero, story.friend
    thing, mine, yours = story.fresh(list(_THINGS), 1)[0], dice.number(1, 9), dice.number(1, 9)
    return (
        f"{hero.name} had {_count(mine, thing)} and {friend.name} had {_count(yours, thing)}, "
        f"so together they had {_count(mine + yours, thing)}."
    )


def _moving(story: _Story) -> str:
    dice, hero = story.dice, story.hero
    thing = story.fresh(list(_THINGS), 1)[0]
    item = f"{dice.one(_ADJECTIVES)} {thing}"
    first, second = dice.some(_PLACES, 2)
    where = f"Where was the {item}? The {item} was {second}, not {first}."
    told = f"{hero.name} put the {item} {first}. Later {hero.they} carried it away and left it {second}."
    if dice.number(0, 1):
        return f"{told} {where}"
    story.questions.append(where)
    return told


def _talking(story: _Story) -> str:
    dice, hero, friend = story.dice, story.hero, story.friend
    thing, place, mood, goal = dice.one(list(_THINGS)), dice.one(_PLACES), dice.one(_MOODS), dice.one(_GOALS)
    return dice.one(
        (
            f'"Have you seen my {thing}?" asked {friend.name}. "Yes, it is {place}," said {hero.name}. '
            f"So {friend.name} went to look {place}, and there it was.",
            f'"Have you seen my {thing}?" asked {friend.name}. "No, I have not," said {hero.name}. '
            f"So {friend.name} went home without the {thing}, and {friend.they} was {mood}.",
            f'"Are you {mood}?" asked {friend.name}. "Yes, I am {mood}," said {hero.name}, and {hero.they} went {goal}.',
            f'"Where do you go?" {friend.name} asked {hero.them}. "I go {goal}," {hero.they} said. '
            f"Then {hero.name} went {goal} and {friend.name} went with {hero.them}.",
        )
    )


def _listing(story: _Story) -> str:
    dice, hero = story.dice, story.hero
    things, numbers = story.fresh(list(_THINGS), 3), [dice.number(2, 9) for _ in range(3)]
    first, second, third = (_count(number, thing) for number, thing in zip(numbers, things, strict=True))
    which = dice.number(0, 2)
    return (
        f"In the bag of {hero.name} there were {first}, {second} and {third}. How many {_THINGS[things[which]]} were in "
        f"{hero.their} bag? There were {_count(numbers[which], things[which])}."
    )


def _animals(story: _Story) -> str:
    dice, hero = story.dice, story.hero
    one, place, mood = dice.one(list(_ANIMALS)), dice.one(_PLACES), dice.one(_MOODS)
    many, does, do = _ANIMALS[one]
    if dice.number(0, 1):
        return f"The {one} of {hero.name} {does} {place} when it is {mood}, but {hero.they} likes it."
    count = NUMBERS[dice.number(2, 9)]
    return f"The {count} {many} of {hero.name} {do} {place} when they are {mood}, but {hero.they} likes them."


def _giving(story: _Story) -> str:
    dice, hero, friend = story.dice, story.hero, story.friend
    item = f"{dice.one(_ADJECTIVES)} {dice.one(list(_THINGS))}"
    return (
        f"{hero.name} gave {friend.name} {_article(item)}. {friend.name} thanked {hero.them}, for {friend.they} had wanted "
        f"{_article(item)} for a long time. Now the {item} belongs to {friend.name}, and {hero.name} is {dice.one(_MOODS)}."
    )


def _dates(story: _Story) -> str:
    dice, hero = story.dice, story.hero
    day, month, date, year = dice.number(0, 6), dice.one(_MONTHS), dice.number(1, 27), dice.number(1901, 1999)
    return (
        f"It was {_DAYS[day]}, {month} {date}, {year}. The next day, on {_DAYS[(day + 1) % 7]}, {month} {date + 1}, {year}, "
        f"{hero.name} went {dice.one(_GOALS)}."
    )


def _skills(story: _Story) -> str:
    dice, hero, friend = story.dice, story.hero, story.friend
    can, cannot = dice.some(_SKILLS, 2)
    if dice.number(0, 1):
        return f"{hero.name} and {friend.name} want to {can}. They {can} every day, for they love to {can}."
    return (
        f"{hero.name} can {can} but {hero.they} cannot {cannot}. {friend.name} can {cannot} but {friend.they} cannot {can}. "
        f"Who can {can}? {hero.name} can."
    )


def _ending(story: _Story) -> str:
    dice, hero, friend = story.dice, story.hero, story.friend
    mood, place = dice.one(_MOODS), dice.one(_PLACES)
    return dice.one(
        (
            f"In the evening {hero.name} was {mood} and {hero.they} slept {place}.",
            f"That is all there is to say about {hero.name} and {hero.their} friend {friend.name}.",
            f"At last {hero.name} sat down {place}, and {hero.they} was {mood}.",
            f"And so {hero.name} and {friend.name} went home, and they were {mood} as ever.",
        )
    )


_SCENES: tuple[Callable[[_Story], str], ...] = (
    _counting, _together, _moving, _talking, _listing, _animals, _giving, _dates, _skills,
)  # fmt: skip
