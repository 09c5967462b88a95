"""The table of `encoder_distil.py`: results/encoder_distil.jsonl -> results/encoder_distil.md."""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from common import RESULTS
from encoders import Difference, difference, unpacked
from kept import stored

LINES = RESULTS / "encoder_distil.jsonl"
TASKS = {"sst2": "SST-2", "mrpc": "MRPC"}
OURS = {
    "homodistil": "HomoDistil, whole heads",
    "sooner": "HomoDistil, whole heads, removal ends at 35 %",
    "narrow": "HomoDistil, heads narrowed",
    "narrow-sooner": "HomoDistil, heads narrowed, removal ends at 35 %",
}
RIVALS = {
    "once": "whole heads pruned once, then distilled",
    "narrow-once": "heads narrowed once, then distilled",
    "first": "first units, distilled",
}
AGAINST = {"homodistil": ("once", "first"), "sooner": ("once", "first")} | dict.fromkeys(
    ("narrow", "narrow-sooner"), ("narrow-once",)
)
"""The rivals of each of ours."""
METHODS = OURS | RIVALS
LAST = 20
"""Updates at the end of a training whose losses are averaged."""


def report() -> None:
    """Write results/encoder_distil.md."""
    done = stored(LINES)
    found = [line for line in done if line["part"] == "texts" and line["method"] in METHODS]
    tasks = [line for line in done if line["part"] in TASKS]
    if not found:
        return
    teachers = [line for line in done if line["method"] == "teacher"]
    text = [*_said(found, tasks, teachers), "", *_losses(found), "", *_accuracies(tasks), "", *_goals(found, tasks), ""]
    (RESULTS / "encoder_distil.md").write_text("\n".join(text), "utf-8")


def _of(found: Sequence[dict[str, Any]], method: str) -> list[dict[str, Any]]:
    """The seeds of a method."""
    return sorted((line for line in found if line["method"] == method), key=lambda line: line["seed"])


def _said(
    found: Sequence[dict[str, Any]], tasks: Sequence[dict[str, Any]], teachers: Sequence[dict[str, Any]]
) -> list[str]:
    dense = teachers[0]
    where, one, sizes = found[0]["machine"], found[0], dense["parameters"]
    versions = ", ".join(f"{name} {where['versions'][name]}" for name in ("torch", "transformers"))
    config, how, made = one["config"], one["how"], dense["how"]
    tuned = {line["part"]: line["knobs"] for line in tasks}
    told = [
        f"{name} {knobs['steps']} updates at {knobs['lr']} on rows cut at {knobs['max_length']} tokens"
        for task, name in TASKS.items()
        if (knobs := tuned.get(task))
    ]
    return [
        "# HomoDistil on a real encoder, beside pruning once and a smaller start",
        "",
        "all-MiniLM-L6-v2 under a new head for masked tokens, tuned once on the WikiText-2 part"
        f" ({made['steps']} updates of {made['batch']} texts of {made['length']} tokens at {made['lr']}): loss"
        f" {dense['first_loss']:.2f} at first, {dense['last_loss']:.2f} over the last {LAST} updates,"
        f" {dense['held_nats']:.2f} nats a masked token on held-out texts, of which it guesses"
        f" {100 * dense['held_accuracy']:.0f} %. It is the teacher: {sizes['total'] / 1e6:.1f} million parameters, of"
        f" which {sizes['embeddings'] / 1e6:.1f} are embeddings. Students keep {how['keep']:.0%} of all of them:"
        f" {one['parameters']['total'] / 1e6:.1f} million. The embedding gets as narrow as the hidden size"
        f" ({config['hidden_size']} of 384, with {config['num_attention_heads']} of 12 heads, or 12 heads as much"
        f" narrower, and about {config['intermediate_size']} of 1,536 channels in all six layers); no token leaves.",
        "",
        f"{one['updates']} updates of {how['batch']} x {how['length']} tokens each, at {how['lr']}: shortened, the"
        f" recipe has 28,000 of 4,096 x 128. `Once` lets all units leave after update {how['observed']}, by the"
        f" moving average of its first {how['observed']}; `first units` starts as the teacher's first heads, channels"
        f" and dimensions. Then the same fine-tuning of each, of 32 examples an update ({'; '.join(told)}), scored on"
        f" the test files. Training under bfloat16 autocast;"
        f" {where['processor']}, {where['threads']} thread(s), {versions}. See"
        " `benchmarks/encoder_distil.py`.",
        *_others(found, teachers[1:]),
    ]


def _others(found: Sequence[dict[str, Any]], teachers: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What is said of teachers that were tuned anew, where a processor rounds otherwise."""
    for one in teachers:
        taught = {line["method"]: None for line in found if line.get("teacher") == one["held_nats"]}
        yield ""
        yield (
            f"{'; '.join(METHODS[name] for name in METHODS if name in taught)}: from a teacher that was tuned anew on"
            f" another processor ({one['machine']['processor']}), {one['held_nats']:.2f} nats; they are compared with"
            " each other alone."
        )


def _losses(found: Sequence[dict[str, Any]]) -> list[str]:
    text = [
        f"Loss: the whole of what is minimised, mean of the last {LAST} updates; KL: of the student from the teacher, a"
        " masked token, peak over the training batches and at the end on held-out texts; mean of the seeds, ± their"
        " standard deviation.",
        "",
        "| student | seeds | peak KL | final loss | of it KL | held-out KL | held-out nats |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for method, title in METHODS.items():
        if not (cells := _of(found, method)):
            continue
        columns = [
            [one["peak_divergence"] for one in cells],
            [one["last"]["loss"] for one in cells],
            [one["last"]["divergence"] for one in cells],
            [one["held"]["divergence"] for one in cells],
            [one["held"]["nats"] for one in cells],
        ]
        text.append(f"| {title} | {len(cells)} | {' | '.join(_spread(column) for column in columns)} |")
    return text


def _accuracies(tasks: Sequence[dict[str, Any]]) -> list[str]:
    text = [
        "Accuracy on the test files in %, of each seed and their mean; HomoDistil's minus the other's of the same seed"
        " in points: mean ± 95 % over seeds (Student's t), and over examples; whole heads against whole heads, narrowed"
        " against narrowed.",
        "",
        "| task | student | seeds | mean | F1 | HomoDistil above it | ± over seeds | ± over examples |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for task, name in TASKS.items():
        for method, title in METHODS.items():
            if not (cells := [line for line in _of(tasks, method) if line["part"] == task]):
                continue
            each = [100 * one["accuracy"] for one in cells]
            f1 = 100 * statistics.fmean(one["f1"] for one in cells)
            mine = "narrow" if method.startswith("narrow") else "homodistil"
            apart = None if method in OURS else above(tasks, mine, method, task)
            shown = (
                "| | |" if apart is None else f"{apart.mean:+.2f} | {_half(apart.of_seeds)} | {apart.of_examples:.2f} |"
            )
            text.append(
                f"| {name} | {title} | {', '.join(f'{one:.1f}' for one in each)} | {statistics.fmean(each):.2f} |"
                f" {f1:.1f} | {shown}"
            )
    return text


def above(tasks: Sequence[dict[str, Any]], method: str, other: str, task: str) -> Difference | None:
    """Points of accuracy by which a method is above another, of the seeds that have both."""
    ours, theirs = (
        {one["seed"]: unpacked(one["right"], one["n"]) for one in _of(tasks, name) if one["part"] == task}
        for name in (method, other)
    )
    seeds = sorted(ours.keys() & theirs.keys())
    return difference([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds]) if seeds else None


def _goals(found: Sequence[dict[str, Any]], tasks: Sequence[dict[str, Any]]) -> list[str]:
    """What was asked of HomoDistil, and whether it is there."""
    text: list[str] = []
    for method, said in OURS.items():
        lines_ = [one for rival in AGAINST[method] for one in _against(found, tasks, method, rival)]
        text += [f"Goals, {said}:", "", *lines_, ""] if lines_ else []
    return text[:-1]


def _against(
    found: Sequence[dict[str, Any]], tasks: Sequence[dict[str, Any]], method: str, rival: str
) -> Iterator[str]:
    """What a method has over a rival, of the seeds that have both."""
    ours, title = {one["seed"]: one for one in _of(found, method)}, RIVALS[rival]
    pairs = [(ours[one["seed"]], one) for one in _of(found, rival) if one["seed"] in ours]
    if not pairs:
        return
    if rival.endswith("once"):
        shares = [one["peak_divergence"] / other["peak_divergence"] for one, other in pairs]
        met = sum(share < 0.5 for share in shares)
        yield (
            f"- peak KL under half of that of `{title}`: in {met} of {len(pairs)} seeds"
            f" ({', '.join(f'{share:.2f}' for share in shares)} of it)"
        )
    apart = [one["last"]["loss"] - other["last"]["loss"] for one, other in pairs]
    held = [one["held"]["divergence"] - other["held"]["divergence"] for one, other in pairs]
    yield (
        f"- final loss below `{title}`: in {sum(one < 0 for one in apart)} of {len(pairs)} seeds, by"
        f" {-statistics.fmean(apart):+.3f} on average; held-out KL below it in {sum(one < 0 for one in held)}, by"
        f" {-statistics.fmean(held):+.3f}"
    )
    for task, name in TASKS.items():
        if (difference_ := above(tasks, method, rival, task)) is not None:
            n = sum(one > 0 for one in difference_.each)
            yield (
                f"- {name} above `{title}`: in {n} of {len(difference_.each)} seeds, {difference_.mean:+.2f} points on"
                " average"
            )


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def _half(width: float | None) -> str:
    return "" if width is None else f"{width:.2f}"
