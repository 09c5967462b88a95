"""The invented world: who and what there is in it, and what is true of each.

Everything here is a constant: the names are made from syllables and the facts are drawn once, from the fixed
`WORLD_SEED`, so two installations always hold the same world. Only what is said about it (documents, instructions,
items) depends on a seed given by the caller. All names begin with a consonant, so "a" is always the right article.
"""

import random
from dataclasses import dataclass

WORLD_SEED = 20310
N_CREATURES, N_OBJECTS, N_PEOPLE = 144, 80, 80


@dataclass(frozen=True)
class Attribute:
    """One thing that is true of a creature: how it is said (`{v}` is the value), and how it is asked (`{c}` is the
    creature).
    """

    name: str
    phrase: str
    questions: tuple[str, ...]
    values: tuple[str, ...]


def _attribute(name: str, phrase: str, questions: tuple[str, ...], values: str) -> Attribute:
    return Attribute(name, phrase, questions, tuple(value.strip() for value in values.split(",")))


ATTRIBUTES: tuple[Attribute, ...] = (
    _attribute(
        "food",
        "eats {v}",
        ("What does a {c} eat?", "What is the food of a {c}?", "Name what a {c} eats."),
        "moss, berries, beetles, snails, honey, roots, ferns, seeds, shrimp, mushrooms",
    ),
    _attribute(
        "home",
        "lives in {v}",
        ("Where does a {c} live?", "What is the home of a {c}?", "Name where a {c} lives."),
        "caves, treetops, marshes, dunes, rivers, meadows, logs, cliffs, burrows, reeds",
    ),
    _attribute(
        "colour",
        "has {v} eyes",
        ("What colour are the eyes of a {c}?", "Which eyes does a {c} have?", "Name the eye colour of a {c}."),
        "red, blue, green, yellow, brown, black, white, grey, purple, orange",
    ),
    _attribute(
        "voice",
        "{v} at night",
        ("What does a {c} do at night?", "What is the voice of a {c}?", "Name the sound of a {c}."),
        "hums, whistles, croaks, growls, chirps, hisses, clicks, howls, squeaks, barks",
    ),
    _attribute(
        "cover",
        "is covered in {v}",
        ("What is a {c} covered in?", "What is the skin of a {c} like?", "Name what covers a {c}."),
        "fur, feathers, scales, plates, spines, wool, slime, bark, bristles, leather",
    ),
    _attribute(
        "fear",
        "is afraid of {v}",
        ("What is a {c} afraid of?", "What does a {c} fear?", "Name the fear of a {c}."),
        "thunder, fire, bells, wolves, mirrors, snow, smoke, water, owls, drums",
    ),
    _attribute(
        "treasure",
        "collects {v}",
        ("What does a {c} collect?", "What is the treasure of a {c}?", "Name what a {c} collects."),
        "pebbles, buttons, shells, twigs, coins, nuts, bones, petals, ribbons, keys",
    ),
    _attribute(
        "hour",
        "wakes at {v}",
        ("When does a {c} wake?", "What is the hour of a {c}?", "Name when a {c} wakes."),
        "dawn, noon, dusk, midnight, moonrise, sunset, breakfast, tea",
    ),
    _attribute(
        "size",
        "grows {v}",
        ("How big is a {c}?", "What is the size of a {c}?", "Name how big a {c} grows."),
        "tiny, small, middling, large, giant",
    ),
)
SIZES = ATTRIBUTES[-1].values

ACTIONS = ("drop", "heat", "soak", "bend", "hit", "cut", "freeze", "rub", "burn", "shake")
PAST = dict(
    zip(
        ACTIONS,
        ("dropped", "heated", "soaked", "bent", "hit", "cut", "froze", "rubbed", "burned", "shook"),
        strict=True,
    )
)
# what happens to each material, in the order of ACTIONS
RESULTS: dict[str, tuple[str, ...]] = {
    "glass": ("shatters", "glows", "shines", "snaps", "shatters", "chips", "cracks", "squeaks", "glows", "rings"),
    "clay": ("cracks", "hardens", "softens", "folds", "flattens", "splits", "cracks", "smears", "hardens", "wobbles"),
    "wax": ("dents", "melts", "floats", "softens", "flattens", "peels", "hardens", "shines", "melts", "wobbles"),
    "iron": ("rings", "glows", "rusts", "bends", "rings", "sparks", "stings", "sparks", "glows", "rattles"),
    "wool": ("floats", "smokes", "shrinks", "folds", "puffs", "frays", "stiffens", "sparks", "smokes", "puffs"),
    "ice": ("shatters", "melts", "floats", "snaps", "cracks", "chips", "grows", "melts", "steams", "rattles"),
    "wood": ("bounces", "smokes", "swells", "snaps", "dents", "splits", "stiffens", "shines", "burns", "rattles"),
    "stone": ("sinks", "steams", "shines", "cracks", "sparks", "chips", "splits", "crumbles", "steams", "rattles"),
    "paper": ("floats", "curls", "tears", "folds", "tears", "frays", "curls", "smears", "burns", "rustles"),
    "gum": (
        "bounces",
        "softens",
        "swells",
        "stretches",
        "bounces",
        "stretches",
        "snaps",
        "squeaks",
        "stinks",
        "wobbles",
    ),
}

PLACES = (
    "mill",
    "bridge",
    "market",
    "tower",
    "garden",
    "harbour",
    "well",
    "forest",
    "barn",
    "school",
    "lake",
    "kitchen",
)
ITEMS = (
    "lamp",
    "rope",
    "basket",
    "drum",
    "hat",
    "jug",
    "kite",
    "ladder",
    "spoon",
    "map",
    "bell",
    "cup",
    "broom",
    "coat",
    "pear",
    "box",
)
ERRANDS = ("carried", "found", "lost", "sold", "broke", "painted", "wanted", "hid", "cleaned", "bought")
ANIMALS = ("fish", "cat", "bird", "goat", "frog", "wolf", "duck", "bear", "crab", "mole")
THINGS = ("moon", "salt", "door", "ring", "leaf", "star", "wall", "shoe", "pipe", "boat")


def _names(n: int, rng: random.Random, taken: set[str]) -> tuple[str, ...]:
    starts = (
        "b",
        "br",
        "d",
        "dr",
        "f",
        "g",
        "gl",
        "h",
        "k",
        "kr",
        "l",
        "m",
        "n",
        "p",
        "pl",
        "r",
        "s",
        "sk",
        "t",
        "th",
        "tr",
        "v",
        "w",
        "z",
    )
    vowels = ("a", "e", "i", "o", "u")
    ends = ("l", "m", "n", "r", "x", "th", "sk", "nd", "b", "k", "v", "zz")
    found: list[str] = []
    while len(found) < n:
        name = (
            rng.choice(starts)
            + rng.choice(vowels)
            + rng.choice("bdfgklmnprstvz")
            + rng.choice(vowels)
            + rng.choice(ends)
        )
        # the first four letters are unique too, so no two names differ in their last letters alone
        if name[:4] not in taken:
            taken.add(name[:4])
            found.append(name)
    return tuple(found)


def _make() -> tuple[dict[str, dict[str, str]], dict[str, str], dict[str, str], tuple[str, ...]]:
    rng = random.Random(WORLD_SEED)
    taken: set[str] = set()
    creatures: dict[str, dict[str, str]] = {}
    names = _names(N_CREATURES, rng, taken)
    # each value is given to as many creatures as any other, so that no answer can be guessed from its frequency
    columns: dict[str, list[str]] = {}
    for attribute in ATTRIBUTES:
        column = [attribute.values[i % len(attribute.values)] for i in range(N_CREATURES)]
        rng.shuffle(column)
        columns[attribute.name] = column
    for i, name in enumerate(names):
        creatures[name] = {attribute.name: columns[attribute.name][i] for attribute in ATTRIBUTES}
    materials = tuple(RESULTS)
    objects = {name: materials[i % len(materials)] for i, name in enumerate(_names(N_OBJECTS, rng, taken))}
    people = {name.capitalize(): ("she", "he")[i % 2] for i, name in enumerate(_names(N_PEOPLE, rng, taken))}
    months = tuple(name.capitalize() for name in _names(12, rng, taken))
    return creatures, objects, people, months


CREATURES, OBJECTS, PEOPLE, MONTHS = _make()
SHE = tuple(name for name, pronoun in PEOPLE.items() if pronoun == "she")
HE = tuple(name for name, pronoun in PEOPLE.items() if pronoun == "he")
MONTH_DAYS = 30


def result(thing: str, action: str) -> str:
    """What happens to this object when the action is done to it, in the third person ("melts")."""
    return RESULTS[OBJECTS[thing]][ACTIONS.index(action)]


def date_after(day: int, month: str, shift: int) -> tuple[int, str]:
    """The date `shift` days later (earlier where negative) in a year of twelve months of thirty days,
    which runs round.
    """
    index = MONTHS.index(month) * MONTH_DAYS + day - 1 + shift
    index %= MONTH_DAYS * len(MONTHS)
    return index % MONTH_DAYS + 1, MONTHS[index // MONTH_DAYS]
