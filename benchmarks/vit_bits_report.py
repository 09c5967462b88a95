"""The table of `vit_bits.py`: results/vit_bits.jsonl -> results/vit_bits.md."""

import statistics
from typing import Any

from common import RESULTS
from encoders import difference, unpacked
from kept import stored

LINES = RESULTS / "vit_bits.jsonl"
COMPAT = {"quantisers": "deepspeed_compat"}
CELLS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "fp32": ("FP32", None),
    **{
        f"w{bits}a{bits}{' public' if style else ''}": (
            f"W{bits}A{bits}{', public grids' if style else ''}",
            {"weight_bits": bits, "input_bits": bits, **style},
        )
        for style in ({}, COMPAT)
        for bits in (8, 6, 4)
    },
}
"""Cell -> its words, and the knobs of `qat`; None where nothing is rounded."""


def report() -> None:
    """Write results/vit_bits.md."""
    if not (found := stored(LINES)):
        return
    (RESULTS / "vit_bits.md").write_text("\n".join([*_said(found), "", *_table(found), ""]), "utf-8")


def _said(found: list[dict[str, Any]]) -> list[str]:
    one = found[0]
    how, where = one["how"], one["machine"]
    versions = ", ".join(f"{name} {where['versions'][name]}" for name in ("torch", "transformers"))
    return [
        "# A ViT in 8, 6 and 4 bits, without training",
        "",
        "No pretrained weights of a vision model were at hand, so a small ViT is trained on 10,000 pictures of"
        f" CIFAR-10, from random numbers in {how['steps']} updates of {how['batch']} at {how['lr']}:"
        f" {how['num_hidden_layers']} layers, hidden {how['hidden_size']}, patches of {how['patch_size']} x"
        f" {how['patch_size']},"
        f" {one['parameters']:,} parameters. It knows little, so these rows say what rounding takes of what a model"
        " knows, and nothing of a ViT that was trained for days.",
        "",
        f"Scored on {one['n']:,} pictures of the test part, which choose nothing; always one class is"
        f" {100 * one['guess']:.1f} % right. The stage `qat` with `steps: 0`: weights have a scale a row, inputs of"
        " linears a scale a token (a patch), taken at each call; the projection of patches, norms, products of queries"
        " and keys and the head stay whole. Rounded activations are simulated. `public grids` are those of"
        " DeepSpeed's library (`deepspeed_compat`), the others the textbook's. Accuracy of each seed and their mean;"
        " beside it the difference to the same seed's FP32 in points, ± 95 % over seeds (Student's t) and over"
        " examples. Moved: the logits' distance from FP32's, relative to how large these are, 500 pictures, mean of"
        f" the seeds. {where['processor']}, {where['threads']} thread(s), {versions}. See `benchmarks/vit_bits.py`.",
    ]


def _table(found: list[dict[str, Any]]) -> list[str]:
    text = [
        "| model | seeds | mean | to FP32 | ± over seeds | ± over examples | moved |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    cells = {(line["cell"], line["seed"]): line for line in found}
    right = {place: unpacked(line["right"], line["n"]) for place, line in cells.items()}
    for name, (said, knobs) in CELLS.items():
        seeds = sorted(seed for cell, seed in cells if cell == name)
        if not seeds:
            continue
        each = [100 * cells[name, seed]["accuracy"] for seed in seeds]
        shown = ["", "", "", ""]
        if knobs is not None and (both := [seed for seed in seeds if ("fp32", seed) in cells]):
            apart = difference([right[name, seed] for seed in both], [right["fp32", seed] for seed in both])
            moved = statistics.fmean(cells[name, seed]["moved"] for seed in both)
            of_seeds = "" if apart.of_seeds is None else f"{apart.of_seeds:.2f}"
            shown = [f"{apart.mean:+.2f}", of_seeds, f"{apart.of_examples:.2f}", f"{100 * moved:.1f} %"]
        text.append(
            f"| {said} | {', '.join(f'{one:.2f}' for one in each)} | {statistics.fmean(each):.2f} |"
            f" {' | '.join(shown)} |"
        )
    return text
