"""The table of `vit_prune.py`: results/vit_prune.jsonl -> results/vit_prune.md."""

import math
import statistics
from dataclasses import dataclass
from typing import Any

from common import RESULTS
from encoders import difference, unpacked
from kept import stored

LINES = RESULTS / "vit_prune.jsonl"


@dataclass(frozen=True)
class Cell:
    """One model of the table.

    Args:
        said: its words.
        gone: percent of the block parameters that are removed.
        trained: whether it is trained behind that.
        taught: whether the dense model teaches it, beside the labels.
    """

    said: str
    gone: int = 0
    trained: bool = False
    taught: bool = False


CELLS = {
    "dense": Cell("dense"),
    "dense on": Cell("dense, trained on", trained=True),
    **{
        f"{gone} {name}": Cell(f"{gone} % removed, {said}", gone, name != "cut", name == "taught")
        for gone in (30, 50)
        for name, said in (("cut", "untrained"), ("alone", "trained by labels"), ("taught", "and by the dense model"))
    },
}


def report() -> None:
    """Write results/vit_prune.md."""
    if not (found := stored(LINES)):
        return
    (RESULTS / "vit_prune.md").write_text("\n".join([*_said(found), "", *_table(found), ""]), "utf-8")


def _said(found: list[dict[str, Any]]) -> list[str]:
    one = found[0]
    how, where, later = one["how"], one["machine"], one["later"]
    versions = ", ".join(f"{name} {where['versions'][name]}" for name in ("torch", "transformers"))
    return [
        "# A ViT without 30 and 50 % of its blocks",
        "",
        "No pretrained weights of a vision model were at hand, so a small ViT is trained on 10,000 pictures of"
        f" CIFAR-10, from random numbers in {how['steps']} updates of {how['batch']} at {how['lr']}:"
        f" {how['num_hidden_layers']} layers, hidden {how['hidden_size']}, patches of {how['patch_size']} x"
        f" {how['patch_size']}. It knows little, and has not learned all that it could: the row `dense, trained on` has"
        f" the {later['steps']} updates of {later['batch']} at {later['lr']} that the trained rows have, and is what"
        " they are compared with.",
        "",
        "FFN units leave in one pool, those whose gates the loss minds least for their parameters (`gate_taylor`,"
        f" {one['pruned']['batches'] * one['pruned']['batch']} training pictures); at 50 % whole layers may leave, too:"
        " a ViT's config cannot say that heads are gone, and its FFNs are half of it. `trained by labels`"
        " is `recover` of all weights, `and by the dense model` is `distill`: the labels' loss and the divergence from"
        f" the dense model's classes at temperature {later['temperature']:g}, with weight 1 each; the teacher is"
        " `dense`, which ends below what it teaches. Scored on"
        f" {one['n']:,} pictures of the test part, which choose nothing; always one class is {100 * one['guess']:.1f} %"
        " right. ± beside an accuracy is the standard error over pictures; the difference is paired, picture by"
        " picture, with 95 % over pictures beside it, and where there are three seeds over seeds (Student's t)."
        f" Multiply-accumulates are those of a patch. {where['processor']}, {where['threads']} thread(s), {versions}."
        " See `benchmarks/vit_prune.py`.",
    ]


def _table(found: list[dict[str, Any]]) -> list[str]:
    text = [
        "| model | seeds | accuracy | to dense, trained on | ± over pictures | ± over seeds | parameters | MACs |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    cells = {(line["cell"], line["seed"]): line for line in found}
    right = {place: unpacked(line["right"], line["n"]) for place, line in cells.items()}
    for name, cell in CELLS.items():
        seeds = sorted(seed for other, seed in cells if other == name)
        if not seeds:
            continue
        mean = statistics.fmean(cells[name, seed]["accuracy"] for seed in seeds)
        shares = [statistics.fmean(each) for each in zip(*(right[name, seed] for seed in seeds), strict=True)]
        error = statistics.stdev(shares) / math.sqrt(len(shares))
        shown = ["", "", ""]
        if name != "dense on" and (both := [seed for seed in seeds if ("dense on", seed) in cells]):
            apart = difference([right[name, seed] for seed in both], [right["dense on", seed] for seed in both])
            of_seeds = "" if apart.of_seeds is None else f"{apart.of_seeds:.2f}"
            shown = [f"{apart.mean:+.2f}", f"{apart.of_examples:.2f}", of_seeds]
        sizes = [f"{statistics.fmean(cells[name, seed][key] for seed in seeds):,.0f}" for key in ("parameters", "macs")]
        text.append(
            f"| {cell.said} | {len(seeds)} | {100 * mean:.2f} ± {100 * error:.2f} | {' | '.join([*shown, *sizes])} |"
        )
    return text
