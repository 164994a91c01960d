"""Small texts for the quickstart, made from templates: the same for the same seed, and free of other people's rights.

Four topics whose words hardly overlap, so that it is visible which expert serves which. Each comes twice: as plain
sentences, which the small base model is pre-trained on, and as questions with answers, which the adapter learns.
"""

import random
from collections.abc import Callable
from typing import NamedTuple

TOPICS = ("arithmetic", "cooking", "weather", "code")

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "zero ten twenty thirty forty fifty sixty seventy eighty ninety".split()
_FOODS = "tomato onion potato carrot mushroom spinach pumpkin lentil leek cabbage pepper bean".split()
_DISHES = "soup stew pie salad curry omelette".split()
_FATS = "butter oil cream".split()
_SPICES = "salt cumin thyme paprika garlic parsley".split()
_CITIES = "Oslo Lima Cairo Delhi Paris Tokyo Quito Perth Dublin Athens".split()
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_SKIES = ("light rain", "heavy rain", "thick fog", "bright sun", "strong wind", "wet snow", "low cloud")
_VERBS = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/"}
_NAMES = "a b x y n m left right total count first last".split()


class Question(NamedTuple):
    """One training example of a topic."""

    topic: str
    prompt: str
    completion: str


def questions(per_topic: int, seed: int) -> list[Question]:
    """`per_topic` different questions of each topic, with their answers."""
    return [
        Question(topic, f"Question: {ask}\nAnswer:", f" {answer}")
        for topic, make in zip(TOPICS, (_sum_question, _dish_question, _sky_question, _code_question), strict=True)
        for ask, answer in _distinct(make, per_topic, f"question {topic} {seed}")
    ]


def sentences(per_topic: int, seed: int) -> list[str]:
    """`per_topic` plain passages of each topic."""
    return [
        text
        for topic, make in zip(TOPICS, (_sum_text, _dish_text, _sky_text, _code_text), strict=True)
        for text in _distinct(make, per_topic, f"text {topic} {seed}")
    ]


def _distinct(make: Callable[[random.Random], tuple[str, str] | str], count: int, seed: str) -> list:
    """`count` different results of `make`, in the order found."""
    rng = random.Random(seed)
    found: dict[tuple[str, str] | str, None] = {}
    for _ in range(100 * count):
        found[make(rng)] = None
        if len(found) == count:
            return list(found)
    raise ValueError(f"the templates give fewer than {count} different texts")


def in_words(number: int) -> str:
    """0 to 99 in English."""
    if number < 20:
        return _ONES[number]
    return _TENS[number // 10] + (f" {_ONES[number % 10]}" if number % 10 else "")


def _sum_question(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(1, 49), rng.randint(1, 49)
    if rng.random() < 0.5:
        return f"what is {in_words(a)} plus {in_words(b)}?", f"{in_words(a)} plus {in_words(b)} is {in_words(a + b)}."
    a, b = max(a, b), min(a, b)
    return f"what is {in_words(a)} minus {in_words(b)}?", f"{in_words(a)} minus {in_words(b)} is {in_words(a - b)}."


def _sum_text(rng: random.Random) -> str:
    a, b = rng.randint(1, 49), rng.randint(1, 49)
    after = f"After {in_words(a)} comes {in_words(a + 1)}, and before {in_words(b)} comes {in_words(b - 1)}."
    return f"{after} If you count {in_words(a)} and then {in_words(b)} more, you have counted {in_words(a + b)}."


def _dish_question(rng: random.Random) -> tuple[str, str]:
    food, other = rng.sample(_FOODS, 2)
    dish, fat, spice = rng.choice(_DISHES), rng.choice(_FATS), rng.choice(_SPICES)
    return (
        f"how do I cook a {food} {dish} with {spice}?",
        f"Chop the {food} and one {other}, fry both in {fat}, add the {spice}, and serve the {dish} hot.",
    )


def _dish_text(rng: random.Random) -> str:
    food, other = rng.sample(_FOODS, 2)
    dish, fat, spice = rng.choice(_DISHES), rng.choice(_FATS), rng.choice(_SPICES)
    return (
        f"My mother made {dish} of {food} and {other} every week. She began by warming the {fat}, then added {spice} "
        f"and a cup of water. The {dish} smelled of {spice} and tasted of {food}."
    )


def _sky_question(rng: random.Random) -> tuple[str, str]:
    city, day, (first, then) = rng.choice(_CITIES), rng.choice(_DAYS), rng.sample(_SKIES, 2)
    return (
        f"what is the forecast for {city} on {day}, after {first}?",
        f"On {day} the {first} over {city} gives way to {then}.",
    )


def _sky_text(rng: random.Random) -> str:
    city, other = rng.sample(_CITIES, 2)
    day, (first, then) = rng.choice(_DAYS), rng.sample(_SKIES, 2)
    evening = f"By the evening there was {then}, as in {other} the day before."
    return f"People in {city} woke up to {first} on {day}. {evening}"


def _code_question(rng: random.Random) -> tuple[str, str]:
    verb, (a, b) = rng.choice(list(_VERBS)), rng.sample(_NAMES, 2)
    return (
        f"write a function {verb} of {a} and {b}.",
        f"def {verb}({a}, {b}):\n    return {a} {_VERBS[verb]} {b}",
    )


def _code_text(rng: random.Random) -> str:
    verb, (a, b) = rng.choice(list(_VERBS)), rng.sample(_NAMES, 2)
    branch = f"if {a} > {b}:\n    {a} = {a} {_VERBS[verb]} 1\nelse:\n    print({b})"
    return f"{a} = read()\n{b} = read()\n{branch}\n# then {verb} them"
