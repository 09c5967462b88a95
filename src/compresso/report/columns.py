"""Which numbers may stand in one column, what a column is called, and how its numbers are written.

One column holds one name, unit, kind (measured, counted, estimated) and protocol; for clocks and memory also one
machine, because tokens a second of two machines do not compare. Where two columns would read alike, the settings in
which they differ join the title.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from compresso.core.counted import counted
from compresso.metrics.record import Measurement, Setting

Key = tuple[str, str, str, str, str]
"""Name, unit, kind, protocol as JSON, and the machine where it matters."""

GROUPS = (
    "Size",
    "Perplexity",
    "Tasks: accuracy",
    "Tasks: accuracy by length-normalised likelihood",
    "Tasks: exact match",
    "Tasks: F1",
    "Tasks: intersection over union",
    "Distance from the dense model",
    "Generated text",
    "Trust",
    "Speed",
    "Memory",
    "Other",
)
QUALITY = GROUPS[1 : GROUPS.index("Trust")]
"""Groups in which a difference is damage or luck, and noise matters."""
NOISE = "noise/"
"""A number of the dense model whose name is this and another number's name: how far dense lies from itself, in the same
unit.

Its protocol is that of the number, and under the key "noise" how it was found: "other seed", "half-split", "repeated".
"""
CACHE = "kv_bytes/token"
_AGAINST_DENSE = (
    "kl",
    "top1_agreement",
    "removed_mass",
    "decode_speedup",
    "prefill_speedup",
    "decode_bound",
    "frames_speedup",
)
_GROUP_OF_END = {
    "perplexity": "Perplexity",
    "byte_perplexity": "Perplexity",
    "acc": "Tasks: accuracy",
    "acc_norm": "Tasks: accuracy by length-normalised likelihood",
    "exact_match": "Tasks: exact match",
    "f1": "Tasks: F1",
    "miou": "Tasks: intersection over union",
    "pixel-acc": "Tasks: accuracy",
}
OF_A_CLASS = "/iou/"
"""Between a data set's name and that of a class of pixels."""
_GROUP_OF_START = {
    **dict.fromkeys(("parameters", "bytes", "macs", "kv_bytes"), "Size"),
    **dict.fromkeys(("kl", "top1_agreement", "removed_mass"), "Distance from the dense model"),
    **dict.fromkeys(("repetition", "degenerate"), "Generated text"),
    **dict.fromkeys(("prefill", "decode", "prefill_speedup", "decode_speedup", "decode_bound"), "Speed"),
    **dict.fromkeys(("prefill_ms", "decode_ms", "frames", "frames_speedup"), "Speed"),
    **dict.fromkeys(("memory", "cache_live", "cache_seen", "cache_bytes"), "Memory"),
    **dict.fromkeys(("trust", "refusal", "benign", "judge", "attention"), "Trust"),
}
_WORDS = {
    "parameters/total": "parameters, all",
    "parameters/blocks": "parameters, blocks",
    "parameters/embeddings": "parameters, embeddings",
    "parameters/norms": "parameters, norms",
    "bytes/disk": "on disk",
    "macs/token": "MACs a token",
    "macs/picture": "MACs a picture",
    "macs/patch": "MACs a patch",
    CACHE: "KV cache a token",
    "kl": "KL divergence",
    "top1_agreement": "same first choice",
    "removed_mass": "dense probability of removed tokens",
    "repetition": "repeated 4-grams",
    "degenerate": "broken texts",
    "memory/peak": "peak memory",
    "frames": "frames a second",
    "frames_speedup": "speed-up of frames",
}
_LARGEST = 1e9
"""From here on powers of ten are read more easily than digits."""
_PREFIXES = {
    "prefill": "prefill",
    "decode": "decode",
    "prefill_speedup": "prefill speed-up",
    "decode_speedup": "decode speed-up",
    "decode_bound": "decode speed-up, at most",
    "prefill_ms": "time of a prefill",
    "decode_ms": "time of a decoded token",
    "cache_live": "tokens held in the cache",
    "cache_seen": "earlier tokens that a query could see",
    "cache_bytes": "cache, allocated",
}


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Args:
        key: what its numbers have in common.
        name, unit, how: of the numbers.
        protocol: of the numbers.
        title: for people.
        detail: settings that tell it from columns of the same title; may be empty.
    """

    key: Key
    name: str
    unit: str
    how: str
    protocol: dict[str, Setting]
    title: str
    detail: str = ""


def has_cache(numbers: Iterable[Measurement]) -> bool:
    """Whether any of the models keeps keys and values: encoders and models of pictures do not."""
    return any(one.value for one in numbers if one.name == CACHE)


def column_key(number: Measurement) -> Key:
    """What two numbers must share to stand in one column."""
    place = number.environment
    machine = (
        f"{place.device}, {place.hardware}, {counted(place.threads, 'thread')}, {place.dtype}"
        if _is_timed(number)
        else ""
    )
    return (number.name, number.unit, number.how, json.dumps(number.protocol, sort_keys=True), machine)


def columns(numbers: Iterable[Measurement]) -> list[Column]:
    """The columns that these numbers need, in order of appearance; noise floors get none, and no cache of models that
    have none.
    """
    found: dict[Key, Column] = {}
    given = list(numbers)
    shown = [one for one in given if not one.name.startswith(NOISE) and (one.name != CACHE or has_cache(given))]
    for number in shown:
        key = column_key(number)
        if key not in found:
            found[key] = Column(key, number.name, number.unit, number.how, dict(number.protocol), title(number.name))
    return [_told_apart(one, [other for other in found.values() if other.name == one.name]) for one in found.values()]


def group(name: str) -> str:
    """The table that a number belongs to."""
    head, _, tail = name.rpartition("/")
    if OF_A_CLASS in name:
        return _GROUP_OF_END["miou"]
    return (_GROUP_OF_END.get(tail) if head else None) or _GROUP_OF_START.get(name.partition("/")[0], "Other")


def title(name: str) -> str:
    """A number's name for people.

    >>> title("decode_speedup/batch8"), title("wikitext2/byte_perplexity"), title("piqa/acc"), title("held/iou/road")
    ('decode speed-up, batch 8', 'wikitext2, per byte', 'piqa', 'held, road')
    """
    if name in _WORDS:
        return _WORDS[name]
    head, _, tail = name.rpartition("/")
    if head in _PREFIXES:
        return f"{_PREFIXES[head]}, {tail.replace('batch', 'batch ')}"
    if OF_A_CLASS in name:
        return name.replace(OF_A_CLASS, ", ")
    if tail == "byte_perplexity":
        return f"{head}, per byte"
    return head if head and tail in _GROUP_OF_END else name


def lower_is_better(name: str) -> bool | None:
    """Which way is good; None where neither is."""
    table = group(name)
    if name.partition("/")[0] in ("prefill_ms", "decode_ms"):
        return True
    if table == "Trust":
        return False if name.startswith("trust/") and name.count("/") == 1 else None
    if table == "Perplexity" or name in ("kl", "removed_mass", "repetition", "degenerate"):
        return True
    if table.startswith("Tasks") or table == "Speed" or name == "top1_agreement":
        return False
    return True if table in ("Size", "Memory") else None


def is_against_dense(name: str) -> bool:
    """Whether a number says how a model relates to the dense one, which therefore has none itself."""
    return name.partition("/")[0] in _AGAINST_DENSE and group(name) in ("Distance from the dense model", "Speed")


def written(value: float, unit: str, name: str = "", error: float | None = None) -> str:
    """A number with its unit, and its standard error if there is one.

    >>> written(0.6123, "share", error=0.0112), written(770792, "bytes"), written(1.273, "1", "decode_speedup/batch1")
    ('61.2 ± 1.1 %', '770.8 kB', '1.27 ×')
    >>> written(2799.4, "1"), written(11190.2, "1"), written(4.1234, "1")
    ('2,799', '11,190', '4.123')
    """
    if unit == "share":
        return f"{_with_error(100 * value, None if error is None else 100 * error, 1)} %"
    if unit == "bytes":
        return _scaled(value, ("B", "kB", "MB", "GB", "TB"))
    if unit in ("parameters", "macs"):
        return f"{value:,.0f}" if value < 1e7 else _scaled(value, ("", "K", "M", "B", "T"))
    if unit == "tokens/s":
        return f"{value:,.0f} tokens/s" if value >= 100 else f"{value:.3g} tokens/s"
    if unit == "1" and ("speedup" in name or "bound" in name):
        return f"{value:.2f} ×"
    text = _plain(value) if error is None else _with_error(value, error, 3)
    return text if unit == "1" else f"{text} {unit}"


def written_range(low: float, high: float, unit: str, name: str = "") -> str:
    """Smallest to largest.

    >>> written_range(264.2, 319.7, "tokens/s")
    '264 to 320'
    """
    return f"{written(low, unit, name)} to {written(high, unit, name)}".replace(" tokens/s", "").replace(" ×", "")


def _plain(value: float) -> str:
    """Four digits, or all of a larger whole number: 2,799 and 11,190 may stand side by side."""
    return f"{value:,.0f}" if 1e3 <= abs(value) < _LARGEST else f"{value:.4g}"


def _with_error(value: float, error: float | None, decimals: int) -> str:
    """Value ± error with as many decimals as show two digits of the error."""
    if error is None or error == 0:
        return f"{value:.{decimals}f}"
    decimals = min(max(1 - math.floor(math.log10(error)), 0), 6)
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def _scaled(value: float, units: Sequence[str]) -> str:
    step = 0
    while abs(value) >= 1000 and step < len(units) - 1:
        value, step = value / 1000, step + 1
    return f"{value:.4g} {units[step]}".strip()


def _is_timed(number: Measurement) -> bool:
    return number.how == "measured" and group(number.name.removeprefix(NOISE)) in ("Speed", "Memory")


def _told_apart(column: Column, alike: Sequence[Column]) -> Column:
    """The column with a detail if others carry its name."""
    if len(alike) == 1:
        return column
    settings = {key for one in alike for key in one.protocol}
    differing = sorted(key for key in settings if len({json.dumps(one.protocol.get(key)) for one in alike}) > 1)
    parts = [f"{key}={column.protocol[key]}" for key in differing if key in column.protocol]
    parts += [column.how] if len({one.how for one in alike}) > 1 else []
    parts += [column.key[4]] if len({one.key[4] for one in alike}) > 1 else []
    return Column(column.key, column.name, column.unit, column.how, column.protocol, column.title, "; ".join(parts))
