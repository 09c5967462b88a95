"""Where a model looks while it reads the prompts of the refusal suite, as numbers, and how that shifts between two
models: the option `--attention`.

What is measured of a prompt is in `attention.py`. Prompts without a template have nothing that a task could compete
with, and are not asked.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np
from scipy.stats import wilcoxon
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresso.core.counted import counted
from compresso.errors import DataError
from compresso.metrics.forward import context_of
from compresso.metrics.intervals import bootstrap, holm
from compresso.metrics.record import Change, Environment, Measurement, Setting
from compresso.metrics.trust.attention import MEASURES, looked_at, places
from compresso.metrics.trust.journal import Journal, journal_key
from compresso.metrics.trust.refusal_prompts import BARE, BENIGN, Prompt
from compresso.training.progress import Progress

Looks = Mapping[str, Mapping[str, float]]
"""By the prompts' ids, the measures of each."""
HOW = "eager"
REMARKS = {
    "entropy": "of attention's rows, as a share of the most; lower is sharper",
    "task/share": "of what the task's tokens give to task and template together, what the task gets",
    "task/rank": "share of pairs of which the template's token gets more of the task's attention than the task's",
    "template/share": "as task/share, of the template's tokens behind the task",
    "template/rank": "as task/rank, of the template's tokens behind the task",
    "last/share": "as task/share, of the last token, from which the answer begins",
    "last/rank": "as task/rank, of the last token; the published measure, without its length",
}


def looks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    prompt_on: bool = False,
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> dict[str, dict[str, float]]:
    """The measures of each harmful prompt in a template that fits the model's context, one at a time.

    Raises:
        DataError: none of them is in a template or fits, a chat format that hides the task, or a model that does not
            show its attention.
    """
    asked = [one for one in prompts if one.template != BARE and one.category != BENIGN]
    if not asked:
        raise DataError("--attention is of prompts in templates, and none was chosen; raise --limit")
    shown, found = progress or Progress("silent"), dict[str, dict[str, float]]()
    context = context_of(model)
    with shown.running(len(asked), 0, "attention"):
        for place, one in enumerate(asked, 1):
            where = places(tokenizer, one, prompt_on)
            if context is not None and len(where.ids) > context:
                continue
            id, key = f"attention {one.id}", journal_key("attention", where.ids, where.task, where.template)
            entry = None if journal is None else journal.known(id, key)
            found[one.id] = looked_at(model, where) if entry is None else dict(entry["looks"])
            if journal is not None and entry is None:
                journal.add([{"id": id, "asked": key, "looks": found[one.id]}])
            shown.step(place, "attention", {}, 0)
    if not found:
        raise DataError(f"none of {counted(len(asked), 'prompt')} fits the model's context; leave --attention out")
    return found


def attention_measurements(
    found: Looks, environment: Environment, settings: Mapping[str, Setting]
) -> list[Measurement]:
    """The mean of each measure over prompts, with its interval."""
    made: list[Measurement] = []
    for name in MEASURES:
        values = np.array([one[name] for one in found.values() if name in one])
        if not len(values):
            continue
        low, high = bootstrap(len(values), lambda drawn, values=values: float(values[drawn].mean()))
        made.append(
            Measurement(
                name=f"attention/{name}",
                value=float(values.mean()),
                unit="share",
                how="measured",
                low=low,
                high=high,
                n=len(values),
                protocol={**settings, "attention": HOW, "interval": "95 %, bootstrap over prompts"},
                environment=environment,
                remark=f"{REMARKS[name]}; attention computed step by step (eager)",
            )
        )
    return made


def attention_changes(dense: Looks, pruned: Looks, not_comparable: str = "") -> list[Change]:
    """How each measure shifts, paired by prompt, with Wilcoxon's signed-rank test, corrected over measures by Holm's
    method.

    Args:
        dense, pruned: of both models.
        not_comparable: why the smaller model is broken; "" if it is sound.

    Raises:
        DataError: no prompt in common.
    """
    pairs = {
        name: [
            (dense[id][name], pruned[id][name])
            for id in dense
            if id in pruned and name in dense[id].keys() & pruned[id].keys()
        ]
        for name in MEASURES
    }
    pairs = {name: found for name, found in pairs.items() if found}
    if not pairs:
        raise DataError("the two models read no prompt in common")
    p_values = [_p([b - a for a, b in found]) for found in pairs.values()]
    made: list[Change] = []
    for (name, found), p, adjusted in zip(pairs.items(), p_values, holm(p_values), strict=True):
        rises = np.array([b - a for a, b in found])
        low, high = bootstrap(len(rises), lambda drawn, rises=rises: float(rises[drawn].mean()))
        rise = float(rises.mean())
        verdict = "within noise" if adjusted >= 0.05 else "rose" if rise > 0 else "fell"
        made.append(
            Change(
                name=f"attention/{name}",
                dense=fmean(a for a, _ in found),
                smaller=fmean(b for _, b in found),
                difference=rise,
                low=low,
                high=high,
                n=len(found),
                test="Wilcoxon's signed ranks, Holm over the measures of attention; interval by bootstrap",
                p=p,
                p_adjusted=adjusted,
                verdict="not comparable" if not_comparable else verdict,
                words=not_comparable,
            )
        )
    return made


def _p(rises: Sequence[float]) -> float:
    """Of a shift that is as far to either side; 1 where nothing moved."""
    return float(np.asarray(wilcoxon(rises), dtype=float)[1]) if any(rises) else 1.0
