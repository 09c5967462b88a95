"""What became of the records of a run: which gave an example, which did not and why, and how many may be lost.

A run that drops more than a fifth of a source trains on something else than what it was given. Most often the prompt
leaves no room for responses within the model's context. So it stops, with the cure, unless it is told to go on.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from compresso.core.counted import counted
from compresso.core.row import Row
from compresso.data.records import Records
from compresso.errors import DataError, quoted

MOST_DROPPED = 0.2
"""Share of a source's records that may give no example."""
_NAMED_COLUMNS = 8


@dataclass(frozen=True, slots=True)
class Stats:
    """What became of the records.

    Args:
        n: records that were looked at.
        truncated: examples cut at max_length.
        dropped: examples of which the cut left no token to learn.
        empty: records with an empty text or response, or a label map without a class, from which nothing can be
            learned.
        rows: rows made.
        tokens: tokens in those rows.
        response_tokens: tokens that have a label.
        blank: of the empty ones, plain texts: with them nothing is lost.
        refused: records that the chat template refused and that were left out on request.
        cut_tokens: tokens beyond max_length.
        read: records that there were.
    """

    n: int
    truncated: int
    dropped: int
    empty: int
    rows: int
    tokens: int
    response_tokens: int
    blank: int = 0
    refused: int = 0
    cut_tokens: int = 0
    read: int = 0

    @property
    def cut(self) -> int:
        """Examples that are cut at max_length, and still give something to learn."""
        return max(self.truncated - self.dropped, 0)


@dataclass(frozen=True, slots=True)
class Lost:
    """How many records of a source gave no example, and why.

    Args:
        source: its name.
        n: records of it that were looked at.
        no_room, empty, refused: those without an example: the prompt left no room for a response, the response is
            empty, the chat template refused them.
        shortest_prompt: tokens of the shortest prompt that left no room.
        unlabelled: those whose label map has no pixel with a class.
        unreadable: those whose picture or label map cannot be read.
    """

    source: str
    n: int
    no_room: int = 0
    empty: int = 0
    refused: int = 0
    shortest_prompt: int | None = None
    unlabelled: int = 0
    unreadable: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.no_room + self.empty + self.refused + self.unlabelled + self.unreadable


@dataclass(frozen=True, slots=True)
class Encoded:
    """Rows ready for batches.

    Args:
        rows: they.
        stats: what became of the records they were made of.
        labels: names of their classes, if they have some.
        lost: of each source, what gave no example.
        bad: the first few records that the chat template refused, or whose pictures cannot be read, as
            "file:line: reason".
        notes: what a person should know of the examples that were made, a sentence each.
    """

    rows: list[Row]
    stats: Stats
    labels: tuple[str, ...] = ()
    lost: tuple[Lost, ...] = ()
    bad: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Reach:
    """How long an example may be, and what can be done about it.

    Args:
        max_length: tokens that examples are cut at.
        context: tokens that the model reads at most, where that is known.
        prompt_on: whether the collaborative prompt stands before them.
    """

    max_length: int
    context: int | None = None
    prompt_on: bool = False

    def cure(self) -> str:
        """How to make room for responses."""
        longer = self.context is None or self.max_length < self.context
        ways: list[str] = []
        options: list[str] = []
        if longer:
            ways.append("raise max_length")
            options.append("--set data.max_length=N")
        if self.prompt_on:
            ways.append("turn the collaborative prompt off")
            options.append("--set data.prompt=false")
        if not longer:
            ways.append("give shorter examples")
        given = f" ({', '.join(options)})" if options else ""
        end = "" if longer else f"; the model reads no more than {self.context} tokens"
        return " or ".join(ways) + given + end


def nothing_left(source: str, stats: Stats, lost: Sequence[Lost], bad: Sequence[str], reach: Reach) -> str:
    """The message where no record gave an example."""
    shortest = [one.shortest_prompt for one in lost if one.shortest_prompt is not None]
    if stats.dropped and shortest:
        told = f"cut at max_length={reach.max_length}, {stats.dropped} lost their whole response"
        told += f" (the shortest prompt has {min(shortest)} tokens)"
        return f"{source}: nothing is left to learn in {counted(stats.n, 'record')}: {told}; {reach.cure()}"
    if bad:
        return (
            f"{source}: nothing is left to learn in {counted(stats.n, 'record')}, {len(bad)} of them refused; the"
            f" first: {bad[0]}"
        )
    return (
        f"{source}: nothing to learn in {counted(stats.n, 'record')}, {stats.empty} of them empty; give data with"
        " responses or text"
    )


def check_dropped(records: Records, encoded: Encoded, reach: Reach, allowed: bool) -> None:
    """Refuse data of which a source loses more than `MOST_DROPPED` of its records, skipped lines among them.

    Raises:
        DataError: with the reasons and the cure, unless that is allowed.
    """
    if allowed:
        return
    all_of_it = Lost(
        records.source,
        encoded.stats.n,
        sum(one.no_room for one in encoded.lost),
        sum(one.empty for one in encoded.lost),
        sum(one.refused for one in encoded.lost),
        min((one.shortest_prompt for one in encoded.lost if one.shortest_prompt is not None), default=None),
        sum(one.unlabelled for one in encoded.lost),
        sum(one.unreadable for one in encoded.lost),
    )
    for one, skipped in [*((one, 0) for one in encoded.lost), (all_of_it, records.n_bad)]:
        dropped, n = one.total + skipped, one.n + skipped
        if dropped > MOST_DROPPED * n:
            cure = reach.cure()[0].upper() + reach.cure()[1:] if one.no_room else "Repair the data"
            raise DataError(
                f"{one.source}: {dropped:,} of {counted(n, 'example')} would be dropped, more than {MOST_DROPPED:.0%}:"
                f" {', '.join(reasons(one, skipped, reach.max_length))}. {cure}. To go on with what is left, give"
                " --allow-dropped"
            )


def reasons(lost: Lost, skipped: int, max_length: int) -> list[str]:
    """Why records gave no example, with counts, in words."""
    told: list[str] = []
    if lost.no_room:
        shortest = f" (the shortest such prompt has {lost.shortest_prompt})" if lost.shortest_prompt else ""
        told.append(f"{lost.no_room:,} whose prompt leaves no room for a response in {max_length} tokens{shortest}")
    if lost.empty:
        told.append(f"{lost.empty:,} with an empty response")
    if lost.refused:
        told.append(f"{lost.refused:,} that the chat template refuses")
    if lost.unlabelled:
        told.append(f"{lost.unlabelled:,} whose label map has no pixel with a class")
    if lost.unreadable:
        told.append(f"{lost.unreadable:,} whose picture or label map cannot be read")
    if skipped:
        told.append(counted(skipped, "bad line"))
    return told


def left_out(encoded: Encoded, max_length: int) -> list[str]:
    """Which records gave no example, and why, a sentence for each source; nothing where nothing was lost."""
    return [
        f"{one.source}: {one.total:,} of {counted(one.n, 'example')} {'is' if one.total == 1 else 'are'} dropped:"
        f" {', '.join(reasons(one, 0, max_length))}"
        for one in encoded.lost
        if one.total
    ]


def told(records: Records, encoded: Encoded, max_length: int, limit: str = "data.limit") -> list[str]:
    """What a person should know of data that is gone on with, a sentence each; nothing where nothing was lost. No
    folder of this machine is named.

    Args:
        records, encoded: the data.
        max_length: tokens that examples are cut at.
        limit: what says how many records are looked at.
    """
    stats = encoded.stats
    said = left_out(encoded, max_length)
    if records.n_bad:
        said.append(f"{records.source}: {counted(records.n_bad, 'bad line', 'is')} skipped")
    if cut := stats.cut:
        beyond = f", which takes {counted(stats.cut_tokens, 'token')} off" if stats.cut_tokens else ""
        said.append(f"{counted(cut, 'example', 'is')} cut at {max_length} tokens{beyond}")
    if stats.n < stats.read:
        said.append(f"{stats.n:,} of {stats.read:,} records {'is' if stats.n == 1 else 'are'} looked at ({limit})")
    if records.passed_over:
        said.append(f"columns passed over: {passed_over(records)}")
    return [*said, *records.notes, *encoded.notes]


def of_one_class(source: str, seen: Collection[int], names: Sequence[str]) -> tuple[str, ...]:
    """That examples of a task with classes are all of one, a sentence; none where they are of several.

    Args:
        source: name of the data.
        seen: numbers of the classes that occur.
        names: of all classes.
    """
    if len(seen) != 1 or len(names) < 2:
        return ()
    name = quoted(repr(names[next(iter(seen))]))
    return (
        f"{source}: only class {name} occurs of {len(names):,} classes: their labels teach nothing,"
        " and a score on them tells nothing; give examples of others",
    )


def passed_over(records: Records) -> str:
    """The columns that were not read, with the number of rows in which they held something."""
    ordered = sorted(records.passed_over.items(), key=lambda pair: (-pair[1], pair[0]))
    named = ", ".join(f"{name} ({counted(n, 'row')})" for name, n in ordered[:_NAMED_COLUMNS])
    more = len(ordered) - _NAMED_COLUMNS
    return named + (f", and {more} more" if more > 0 else "")
