"""The trained rows of `flagship.py`: each method with as many updates of as many tokens, those of its own training too.

An update has 2,048 tokens: 4 windows of 512, of papers, code, questions and answers, and instructions; no file that is
scored. What chooses without training sees the calibration of the table without training, whose knobs it has. Adapters
have rank 32 and the rate 5e-4 at a hidden size of 4,096, where a method's own file does not say otherwise. `/taught`
learns from the dense model in the place of labels.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from compresso.job import Job
from compresso.runner.recipe import build, read
from compresso.runner.rounds import entered, learning_of, left
from repair import SELECTORS, Subject, lines, selected, windows

BATCH, LENGTH = 4, 512
RATE = {"lr": 5e-4, "lr_at_hidden": 4096}
LORA = {"rank": 32, "alpha": 32, **RATE}
SHORT = {"batch": BATCH, "micro_batch": BATCH}
Stages = list[dict[str, dict[str, Any]]]

BOTH = ("shortgpt", "gate-taylor", "ristretto", "ristretto/dp", "ristretto/gradients")
SELECTED = {
    **{f"{name}{how}": name for name in BOTH for how in ("", "/taught")},
    **{name: name for name in ("llm-pruner", "contextual", "bonsai", "magnitude")},
    **{f"{name}/taught": name for name in ("minitron", "minitron/depth")},
}
"""Methods that choose first and train then: of each the selector of the table without training."""
COMPRESSO: dict[str, dict[str, Any]] = {
    "compresso": {},
    "compresso/depth-0.3": {"depth_weight": 0.3},
    "compresso/parts": {"kinds": ["head", "channel", "layer", "attention", "mlp"]},
    "compresso/taught": {},
}
"""Compresso as its recipe is, and with other knobs of depth."""
LEARNED = (*COMPRESSO, "loraprune", "lorashear", "ziplm", "ristretto/rounds")
"""Methods that choose while they train, or cut again after training."""
ORDER = (
    "ristretto/taught",
    "shortgpt/taught",
    "compresso",
    "ristretto/rounds",
    "shortgpt",
    "ristretto",
    "gate-taylor/taught",
    "minitron/taught",
    "minitron/depth/taught",
    "llm-pruner",
    "gate-taylor",
    "ziplm",
    "loraprune",
    "lorashear",
    "contextual",
    "bonsai",
    "magnitude",
    "ristretto/dp/taught",
    "ristretto/dp",
    "ristretto/gradients/taught",
    "ristretto/gradients",
    "compresso/taught",
    "compresso/depth-0.3",
    "compresso/parts",
)


def training_rows(subject: Subject, updates: int) -> list[dict[str, Any]]:
    """Windows to train on, kinds in turn, as long as each lasts; another length for a model of a shorter context."""
    kinds = [
        (f"{row['instruction']}\n{row['input']}\n{row['output']}" for row in lines("instruct/alpaca_subset")),
        *((row["text"] for row in lines("text/redpajama_sample") if row["domain"] == domain)
          for domain in ("arxiv", "github", "stackexchange")),
    ]  # fmt: skip
    width = min(LENGTH, int(subject.model.config.max_position_embeddings))
    n = -(-updates * BATCH // len(kinds))
    parts = [windows(subject.tokenizer, texts, width, n) for texts in kinds]
    found = [part[i] for i in range(n) for part in parts if i < len(part)]
    return [{"input_ids": ids, "labels": ids} for ids in found]


def stages_of(method: str, updates: int, keep: float, repair: str) -> Stages:
    """The stages of a method with so many updates in all."""
    mend: Stages = [] if repair == "none" else [{"repair": {"target": repair}}]
    if method in SELECTED:
        stage, knobs = SELECTORS[SELECTED[method]]
        trains = "distill" if method.endswith("/taught") else "recover"
        return [{stage: {**knobs, "keep": keep}}, *mend, {trains: {"steps": updates, **SHORT, **LORA}}]
    if method == "ristretto/rounds":
        stage, knobs = SELECTORS["ristretto"]
        return [{stage: {**knobs, "keep": keep, "rounds": 2}}, *mend, {"distill": {"steps": updates, **SHORT, **LORA}}]
    if method == "ziplm":
        cut = _own("ziplm", "ziplm") | {"keep": keep, "judge_rows": 6}
        cut["search"] = {**cut["search"], "evaluations": 100}
        learns = _own("ziplm/gradual", "token_distill") | {"steps": updates, "warmup": updates // 10, **SHORT}
        return [{"ziplm": cut}, *mend, {"token_distill": learns}]
    gates = max(updates // 10, 1)
    recover = {"recover": {"steps": updates - gates, **SHORT, **LORA}}
    if method in COMPRESSO:
        knobs = {"keep": keep, "hold": gates, "score_batches": 64, "depth_batches": 4, **SHORT, **COMPRESSO[method]}
        train = {"distill": recover["recover"]} if method.endswith("/taught") else recover
        return [{"learn_gates": {**_own("compresso", "learn_gates"), **knobs}}, *mend, train]
    half = updates // 2
    if method == "loraprune":
        knobs = {"keep": keep, "steps": half, **SHORT}
        recover = {"recover": {"steps": updates - half, **SHORT, **LORA}}
        return [{"loraprune": {**_own(method, "loraprune"), **knobs}}, *mend, recover]
    assert method == "lorashear", method
    tune, shrink = max(updates // 40, 1), max(updates * 9 // 40, 2)
    rest = {"text_steps": updates - tune - shrink, "instruction_steps": 0, **SHORT, **LORA}
    knobs = {"keep": keep, "tune": tune, "shrink": shrink, "periods": 5, **SHORT}
    return [{"lorashear": {**_own(method, "lorashear"), **knobs}}, *mend, {"recover_knowledge": rest}]


def _own(recipe: str, stage: str) -> dict[str, Any]:
    """What a shipped recipe says of a stage."""
    found: Mapping[str, Any] = next(one[stage] for one in read(recipe)["stages"] if stage in one)
    return dict(found)


def trained(
    subject: Subject, method: str, updates: int, ratio: float, repair: str, seed: int, folder: Path, chosen: Path
) -> tuple[Job, dict[str, Any]]:
    """The job that a method leaves, and what its row says of it.

    Args:
        folder: of journals and training checkpoints, which a killed run goes on from.
        chosen: of the journals of a method that chooses first, as the row without training does.
    """
    data = training_rows(subject, updates)
    recipe = build({"stages": stages_of(method, updates, 1 - ratio, repair)}, method)
    job, acts = subject.job(folder, seed), recipe.acts
    whole = int(job.cost()().blocks)
    if method in SELECTED:
        choice, _ = selected(subject, SELECTED[method], ratio, seed, chosen)
        job, acts = replace(choice, model=copy.deepcopy(choice.model)), acts[1:]
    for act in acts:
        learns = learning_of(act.stage) is not None
        given, stage, facts = entered(replace(job, rows=data if learns else subject.rows, out=folder / act.folder), act)
        after = stage(given)
        job = left(replace(after, rows=subject.rows), job, act, facts)
    return job, {"kept_share_of_blocks": int(job.cost()().blocks) / whole, "stages": [act.label for act in recipe.acts]}
