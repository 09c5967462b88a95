"""Questions whose answer must be known: facts of creatures, what happens to objects, which creature is larger, who is
meant.
"""

import random

from compresso.data.world.facts import (
    ACTIONS,
    ATTRIBUTES,
    CREATURES,
    ERRANDS,
    HE,
    ITEMS,
    OBJECTS,
    PLACES,
    RESULTS,
    SHE,
    SIZES,
    result,
)
from compresso.data.world.question import Question, Task

_CREATURES, _OBJECTS = tuple(CREATURES), tuple(OBJECTS)


def fact(rng: random.Random) -> Question:
    """One attribute of one creature; the wrong answers are other values of the same attribute."""
    creature, attribute = rng.choice(_CREATURES), rng.choice(ATTRIBUTES)
    value = CREATURES[creature][attribute.name]
    others = [other for other in attribute.values if other != value]
    return Question(
        instruction=rng.choice(attribute.questions).format(c=creature),
        input="",
        answer=f"It {attribute.phrase.format(v=value)}.",
        wrong=tuple(f"It {attribute.phrase.format(v=other)}." for other in rng.sample(others, 3)),
        key=f"{creature} {attribute.name}",
    )


def physics(rng: random.Random) -> Question:
    """What an action does to an object; the wrong answers are what it does to other materials."""
    thing, action = rng.choice(_OBJECTS), rng.choice(ACTIONS)
    outcome = result(thing, action)
    column = ACTIONS.index(action)
    others = sorted({row[column] for row in RESULTS.values()} - {outcome})
    asked = rng.choice(
        ("What happens if you {a} a {o}?", "You {a} a {o}. What does it do?", "Name what a {o} does if you {a} it.")
    )
    return Question(
        instruction=asked.format(a=action, o=thing),
        input="",
        answer=f"It {outcome}.",
        wrong=tuple(f"It {other}." for other in rng.sample(others, 3)),
        key=f"{thing} {action}",
    )


def comparison(rng: random.Random) -> Question:
    """Which of two creatures is the larger, or the smaller; their sizes are at least two steps apart."""
    while True:
        first, second = rng.sample(_CREATURES, 2)
        rank = {name: SIZES.index(CREATURES[name]["size"]) for name in (first, second)}
        if abs(rank[first] - rank[second]) >= 2:
            break
    word, choose = rng.choice((("larger", max), ("smaller", min)))
    right = choose((first, second), key=lambda name: rank[name])
    wrong = second if right == first else first
    asked = rng.choice(("Which is {w}, a {x} or a {y}?", "Is a {x} or a {y} {w}?", "Name the {w} one: a {x} or a {y}."))
    return Question(
        instruction=asked.format(w=word, x=first, y=second),
        input="",
        answer=f"The {right} is {word}.",
        wrong=(f"The {wrong} is {word}.",),
        key=" ".join(sorted((first, second))),
    )


def coreference(rng: random.Random) -> Question:
    """Whom a pronoun means, when a woman and a man are named before it."""
    she, he = rng.choice(SHE), rng.choice(HE)
    first, second = rng.sample((she, he), 2)
    pronoun, right, wrong = rng.choice((("She", she, he), ("He", he, she)))
    item, errand, place = rng.choice(ITEMS), rng.choice(ERRANDS), rng.choice(PLACES)
    opening = rng.choice(("{f} met {s} at the {p}.", "{f} and {s} went to the {p}.", "{f} saw {s} in the {p}."))
    return Question(
        instruction=rng.choice((f"Who {errand} the {item}?", f"Name who {errand} the {item}.")),
        input=f"{opening.format(f=first, s=second, p=place)} {pronoun} {errand} the {item}.",
        answer=f"It was {right}.",
        wrong=(f"It was {wrong}.",),
        key=f"{she} {he}",
    )


KNOWLEDGE = (
    Task("fact", 4, fact),
    Task("physics", 4, physics),
    Task("comparison", 2, comparison),
    Task("coreference", 2, coreference),
)
