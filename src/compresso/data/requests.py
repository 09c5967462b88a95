"""Requests that a demonstration trains on, where nobody has data at hand: short everyday questions, put together from
topics and forms; a model that follows instructions answers them itself.
"""

TOPICS = (
    "rain", "honey", "bicycles", "the moon", "bread", "trees", "music", "sleep", "rivers", "clocks", "coffee", "snow",
    "dogs", "books", "bridges", "salt", "friendship", "maps", "gardens", "light", "trains", "the sea", "numbers",
    "bees", "windows", "mountains", "cooking", "letters", "colours", "walking",
)  # fmt: skip
FORMS = (
    "Tell me one interesting fact about {topic}.",
    "Explain {topic} to a child in two sentences.",
    "Why do people like {topic}?",
    "Write a short sentence about {topic}.",
    "Name two things that go well with {topic}.",
    "What would change without {topic}?",
)


def requests() -> tuple[str, ...]:
    """All of them, each topic's apart, in a fixed order.

    >>> len(requests()), requests()[0]
    (180, 'Tell me one interesting fact about rain.')
    """
    return tuple(form.format(topic=topic) for form in FORMS for topic in TOPICS)
