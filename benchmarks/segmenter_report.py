"""The tables of `segmenter.py`: results/segmenter.jsonl -> results/segmenter.md."""

from dataclasses import dataclass
from typing import Any

from common import RESULTS
from kept import stored

LINES = RESULTS / "segmenter.jsonl"
CALIBRATED = 32
"""Pictures that scale the activations of int8."""


@dataclass(frozen=True)
class Cell:
    """One model of the table.

    Args:
        what: dense, half, l2, gates or taylor.
        taught: whether the dense model teaches it.
        gone: percent of the channels of each layer that l2 removes.
    """

    what: str
    taught: bool = False
    gone: int = 0


CELLS = {
    "dense": Cell("dense"),
    "half alone": Cell("half"),
    "half taught": Cell("half", taught=True),
    "l2 50 alone": Cell("l2", gone=50),
    "l2 50 taught": Cell("l2", taught=True, gone=50),
    "gates 50 taught": Cell("gates", taught=True),
    "taylor 50 taught": Cell("taylor", taught=True),
    "l2 30 alone": Cell("l2", gone=30),
    "l2 30 taught": Cell("l2", taught=True, gone=30),
    "l2 70 alone": Cell("l2", gone=70),
    "l2 70 taught": Cell("l2", taught=True, gone=70),
}

FILES = [(name, dtype) for name in ("dense", "half taught", "l2 50 taught") for dtype in ("f32", "f16", "int8")]
"""Models that are written as graphs, and their dtypes."""


def report() -> None:
    """Write results/segmenter.md."""
    if not (found := stored(LINES)):
        return
    cells, files = [one for one in found if "file" not in one], [one for one in found if "file" in one]
    text = [*_said(cells[0]), "", *_cells(cells)]
    if files:
        text += ["", *_files(files)]
    (RESULTS / "segmenter.md").write_text("\n".join([*text, ""]), "utf-8")


def _said(one: dict[str, Any]) -> list[str]:
    how, place = one["how"], one["machine"]
    versions = ", ".join(f"{name} {place['versions'][name]}" for name in ("torch", "transformers"))
    return [
        "# A segmenter for a small board",
        "",
        f"CamVid at {how['size'][1]} x {how['size'][0]}, 367 pictures to train on, mIoU of 11 classes from one"
        f" confusion matrix of {one['pictures']} test pictures, which choose nothing. One seed, on a CPU, and short:"
        f" {how['begun']['steps']} updates of {how['batch']} pictures from random numbers, {how['later']['steps']}"
        " behind pruning. No pretrained weights were at hand, so the teacher is the dense MobileViT-small (DeepLabV3's"
        " head) of this table, which knows little, and not a Swin. With one seed, differences of one or two points say"
        f" nothing. The most frequent class alone has {100 * one['guess']:.1f} %. See `benchmarks/segmenter.py`;"
        f" {place['processor']}, {place['threads']} thread(s), {versions}.",
    ]


def _cells(found: list[dict[str, Any]]) -> list[str]:
    text = [
        "| model | mIoU | pixels | parameters | MACs a picture | share of block parameters |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    by_name = {one["cell"]: one for one in found}
    for name in CELLS:
        if (one := by_name.get(name)) is not None:
            text.append(
                f"| {name} | {100 * one['miou']:.2f} | {100 * one['pixels']:.2f} | {one['parameters']:,} |"
                f" {one['macs']:,} | {one['kept_share_of_blocks']:.3f} |"
            )
    return text


def _files(found: list[dict[str, Any]]) -> list[str]:
    text = [
        f"Written as ONNX, on {found[0]['pictures']} of the test pictures; int8 is calibrated on"
        f" {CALIBRATED} training pictures. Agreement: pixels of the logits whose class is the live model's. Frames a"
        " second are those of a machine that does other work, more of it in some rows (f16 and int8) than in others,"
        " and do not compare; the processor's time a frame does. Memory:"
        " the peak of a whole process that may map 4 GB.",
        "",
        "| model | dtype | bytes | engine | mIoU (live model) | agreement | frames/s | processor ms | peak MB |",
        "|---|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for one in sorted(found, key=lambda one: FILES.index((one["cell"], one["file"]))):
        for program, facts in one["engines"].items():
            begun = f"| {one['cell']} | {one['file']} | {one['bytes']:,} | {program} |"
            if facts["opens"] != "yes":
                text.append(f"{begun} {facts['opens']}: {facts['reason']} | | | | |")
                continue
            ran = ("", "", "") if "not_run" in facts else _ran(facts)
            scored = f"{100 * facts['miou']:.2f} ({100 * one['model_miou']:.2f})"
            text.append(f"{begun} {scored} | {100 * facts['agreement']:.2f} % | {' | '.join(ran)} |")
    return text


def _ran(facts: dict[str, Any]) -> tuple[str, str, str]:
    return f"{facts['frames_per_s']:.1f}", f"{facts['processor_ms']:.1f}", f"{facts['peak_bytes'] / 1e6:.0f}"
