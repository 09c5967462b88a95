"""Plain text about the world: descriptions, small stories and worked examples, never in the form of a question.

Facts that are held out of the instructions do occur here: the items then ask whether a model can give in an answer what
it has only read in a text.
"""

import random

from compresso.data.world.facts import (
    ACTIONS,
    ATTRIBUTES,
    CREATURES,
    ERRANDS,
    ITEMS,
    OBJECTS,
    PAST,
    PEOPLE,
    PLACES,
    SIZES,
    result,
)
from compresso.data.world.symbols import boolean, counting, date, maximum, sorting

_CREATURES, _OBJECTS, _PEOPLE = tuple(CREATURES), tuple(OBJECTS), tuple(PEOPLE)
_HIS = {"she": "her", "he": "his"}


def _said(creature: str, attribute: str) -> str:
    phrase = next(a.phrase for a in ATTRIBUTES if a.name == attribute)
    return phrase.format(v=CREATURES[creature][attribute])


def _portrait(rng: random.Random) -> str:
    """Some facts of one creature, in any order."""
    creature = rng.choice(_CREATURES)
    names = rng.sample([a.name for a in ATTRIBUTES], rng.choice((3, 4, 5)))
    said = [_said(creature, name) for name in names]
    subject = rng.choice(("The", "A", "Every"))
    parts = [f"{subject} {creature} {said[0]}."]
    rest = said[1:]
    while rest:
        if len(rest) >= 2 and rng.random() < 0.5:
            parts.append(f"It {rest.pop(0)} and {rest.pop(0)}.")
        else:
            parts.append(f"{rng.choice(('It', f'The {creature}'))} {rest.pop(0)}.")
    return " ".join(parts)


def _bestiary(rng: random.Random) -> str:
    """One fact each of several creatures."""
    attributes = [a.name for a in ATTRIBUTES]
    return " ".join(f"A {c} {_said(c, rng.choice(attributes))}." for c in rng.sample(_CREATURES, rng.choice((3, 4, 5))))


def _sizes(rng: random.Random) -> str:
    """Comparisons of creatures by size."""
    parts = []
    for _ in range(rng.choice((2, 3))):
        pair = rng.sample(_CREATURES, 2)
        pair.sort(key=lambda name: SIZES.index(CREATURES[name]["size"]))
        small, large = pair
        if CREATURES[small]["size"] == CREATURES[large]["size"]:
            parts.append(f"A {small} is as large as a {large}.")
        elif rng.random() < 0.5:
            parts.append(f"A {large} is larger than a {small}.")
        else:
            parts.append(f"A {small} is smaller than a {large}.")
    return " ".join(parts)


def _workshop(rng: random.Random) -> str:
    """One object: its material and what happens to it."""
    thing = rng.choice(_OBJECTS)
    actions = rng.sample(ACTIONS, rng.choice((2, 3)))
    parts = [f"A {thing} is made of {OBJECTS[thing]}."] if rng.random() < 0.6 else []
    for action in actions:
        said = rng.choice(("If you {a} a {o}, it {r}.", "A {o} {r} if you {a} it."))
        parts.append(said.format(a=action, o=thing, r=result(thing, action)))
    return " ".join(parts)


def _errand(rng: random.Random) -> str:
    """People at a place, what they do there, and what they see."""
    first, second = rng.sample(_PEOPLE, 2)
    place, item, other = rng.choice(PLACES), *rng.sample(ITEMS, 2)
    he, his = PEOPLE[first], _HIS[PEOPLE[first]]
    parts = [
        rng.choice(
            (f"{first} went to the {place}.", f"{first} met {second} at the {place}.", f"{first} lives by the {place}.")
        )
    ]
    parts.append(f"{he.capitalize()} {rng.choice(ERRANDS)} {rng.choice((his, 'the'))} {item}.")
    match rng.randrange(3):
        case 0:
            thing, action = rng.choice(_OBJECTS), rng.choice(ACTIONS)
            parts.append(
                f"{he.capitalize()} {PAST[action]} a {thing}. A {thing} {result(thing, action)} if you {action} it."
            )
        case 1:
            creature = rng.choice(_CREATURES)
            parts.append(f"A {creature} sat there. It {_said(creature, rng.choice([a.name for a in ATTRIBUTES]))}.")
        case _:
            parts.append(f"{second} took {_HIS[PEOPLE[second]]} {other} and went home.")
    return " ".join(parts)


def _lesson(rng: random.Random) -> str:
    """Two worked examples of one symbolic kind."""
    kind = rng.choice((sorting, counting, maximum, boolean, date))
    parts = []
    for _ in range(2):
        question = kind(rng)
        match kind:
            case _ if kind is date:
                parts.append(f"The day {question.key} is {question.answer.removeprefix('It is ')}")
            case _ if kind is counting:
                parts.append(f"Of the animals in {question.key}: {question.answer.lower()}")
            case _:
                parts.append(f"Given {question.input}. {question.answer}")
    return " ".join(parts)


KINDS = (_portrait, _bestiary, _sizes, _workshop, _errand, _lesson)
WEIGHTS = (30, 15, 8, 20, 17, 10)


def document(rng: random.Random) -> str:
    """One document of one to six sentences."""
    return rng.choices(KINDS, WEIGHTS)[0](rng)
