"""Questions that are worked out from what is given: sorting, counting, the largest number, truth of joined claims,
dates.
"""

import itertools
import random
import string

from compresso.data.world.facts import ANIMALS, MONTH_DAYS, MONTHS, THINGS, date_after
from compresso.data.world.question import Question, Task

COUNTS = (1, 2, 3, 4)
LIST_LENGTH = 6
CLAIMS = {True: ("true", "right", "sure", "yes"), False: ("false", "wrong", "never", "no")}


def sorting(rng: random.Random) -> Question:
    """Four letters to be put in order; the wrong answers have two letters of the right one exchanged."""
    letters = rng.sample(string.ascii_lowercase, 4)
    ordered = sorted(letters)
    wrong: list[str] = []
    for i, j in rng.sample(((0, 1), (1, 2), (2, 3), (0, 2), (1, 3)), 3):
        swapped = list(ordered)
        swapped[i], swapped[j] = swapped[j], swapped[i]
        wrong.append(f"In order: {' '.join(swapped)}.")
    asked = rng.choice(("Sort the letters.", "Put the letters in order.", "Order these letters."))
    return Question(asked, " ".join(letters), f"In order: {' '.join(ordered)}.", tuple(wrong), "".join(ordered))


def counting(rng: random.Random) -> Question:
    """How many of six words are animals; every count from one to four is as likely."""
    count = rng.choice(COUNTS)
    listed = [rng.choice(ANIMALS) for _ in range(count)] + [rng.choice(THINGS) for _ in range(LIST_LENGTH - count)]
    rng.shuffle(listed)
    text = " ".join(listed)
    return Question(
        instruction=rng.choice(
            ("How many animals are in the list?", "Count the animals.", "How many of these are animals?")
        ),
        input=f"List: {text}",
        answer=f"The count is {count}.",
        wrong=tuple(f"The count is {other}." for other in COUNTS if other != count),
        key=text,
    )


def maximum(rng: random.Random) -> Question:
    """The largest of four numbers of two digits; the wrong answers are the other three."""
    numbers = rng.sample(range(10, 100), 4)
    largest = max(numbers)
    asked = rng.choice(("Which number is the largest?", "Find the largest number.", "Name the largest."))
    return Question(
        instruction=asked,
        input=" ".join(map(str, numbers)),
        answer=f"The largest is {largest}.",
        wrong=tuple(f"The largest is {number}." for number in numbers if number != largest),
        key=" ".join(map(str, sorted(numbers))),
    )


def boolean(rng: random.Random) -> Question:
    """Whether three claims, some denied, all joined by "and" or all by "or", hold;
    true and false are equally likely.
    """
    # the truth is drawn before the claims, so that neither the joint alone nor its frequency tells the answer
    truth, joint = rng.random() < 0.5, rng.choice(("and", "or"))
    if truth == (joint == "and"):
        claims = [truth] * 3
    else:
        claims = rng.choice(
            [list(some) for some in itertools.product((True, False), repeat=3) if set(some) != {not truth}]
        )
    said = []
    for claim in claims:
        denied = rng.random() < 0.5
        said.append("not " * denied + rng.choice(CLAIMS[claim != denied]))
    asked = rng.choice(("Is this true or false?", "Say if it is true or false.", "True or false?"))
    text = f" {joint} ".join(said)
    answers = {True: "It is true.", False: "It is false."}
    return Question(asked, f"Claim: {text}", answers[truth], (answers[not truth],), text)


def date(rng: random.Random) -> Question:
    """The date of the day after or before another; the wrong answers miss by a day or two, or take a neighbouring
    month.
    """
    day, month = rng.randint(1, MONTH_DAYS), rng.choice(MONTHS)
    word, shift = rng.choice((("after", 1), ("before", -1)))
    target = date_after(day, month, shift)
    near = [date_after(*target, miss) for miss in (-2, -1, 1, 2, -MONTH_DAYS, MONTH_DAYS)]
    asked = rng.choice(("What is the day {w} {d} {m}?", "Find the day {w} {d} {m}.", "Which day comes {w} {d} {m}?"))
    return Question(
        instruction=asked.format(w=word, d=day, m=month),
        input="",
        answer=f"It is {target[0]} {target[1]}.",
        wrong=tuple(f"It is {d} {m}." for d, m in rng.sample(near, 3)),
        key=f"{word} {day} {month}",
    )


SYMBOLS = (
    Task("sorting", 4, sorting),
    Task("counting", 4, counting),
    Task("maximum", 4, maximum),
    Task("boolean", 2, boolean),
    Task("date", 4, date),
)
