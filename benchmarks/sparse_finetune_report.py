"""The table of results/sparse_finetune.jsonl.

    python benchmarks/sparse_finetune_report.py

Means over seeds with their standard errors, and differences in pairs of one seed, in nats a token, with the 95 %
interval of Student's t. A cell whose training failed, or that ends above the pruned model it started from, is called
diverged. What is said of a pair is said of its interval.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from scipy.stats import t

from common import RESULTS
from kept import stored
from sparse_cases import GRID_SEED, LOSSES
from sparse_finetune import LINES

Rows = Sequence[dict[str, Any]]
PAIRS = (
    ("CE + SquareHead", "CE"),
    ("CE + SquareHead", "CE + KL"),
    ("CE + KL", "CE"),
    ("CE + KL + SquareHead", "CE + KL"),
    ("CE + KL + SquareHead", "CE + SquareHead"),
)


def diverged(row: dict[str, Any]) -> bool:
    """Whether a training failed or made the model worse."""
    return "diverged" in row or ("held_before" in row and row["held"] > row["held_before"])


def of(done: Rows, loss: str) -> Rows:
    """Scored cells of a loss."""
    return [row for row in done if row["loss"] == loss and row["seed"] != GRID_SEED]


def mean_error(values: Sequence[float]) -> str:
    """A mean with its standard error over seeds, which a single one has none of."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}"


def scores(done: Rows, corpora: Sequence[str]) -> list[str]:
    """A row a loss: perplexities."""
    lines = [
        f"| loss | rate | seeds | {' | '.join(corpora)} | held-out loss |",
        f"|---|---:|---:|{'---:|' * len(corpora)}---:|",
    ]
    for loss in ("dense", "pruned", *LOSSES):
        mine = of(done, loss)
        if not mine:
            continue
        fine = [row for row in mine if not diverged(row)]
        count = str(len(mine)) if len(fine) == len(mine) else f"{len(mine)}, {len(mine) - len(fine)} diverged"
        rate = "-" if mine[0]["rate"] is None else f"{mine[0]['rate']:.0e}"
        numbers = ["diverged"] * (len(corpora) + 1)
        if fine:
            numbers = [mean_error([row["found"][name]["value"] for row in fine]) for name in corpora]
            numbers.append(mean_error([row["held"] for row in fine]))
        lines.append(f"| {loss} | {rate} | {count} | {' | '.join(numbers)} |")
    return lines


def difference(done: Rows, one: str, other: str, name: str) -> tuple[float, float, int] | None:
    """Mean difference of losses, half of its 95 % interval, and pairs; None for fewer than two."""
    base = {row["seed"]: row for row in of(done, other) if not diverged(row)}
    pairs = [(row, base[row["seed"]]) for row in of(done, one) if not diverged(row) and row["seed"] in base]
    gaps = [mine["found"][name]["loss"] - theirs["found"][name]["loss"] for mine, theirs in pairs]
    if len(gaps) < 2:
        return None
    half = float(t.ppf(0.975, len(gaps) - 1)) * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return statistics.fmean(gaps), half, len(gaps)


def differences(done: Rows, corpora: Sequence[str]) -> list[str]:
    """A row a pair and text: what lies between, and what may be said of it."""
    lines = ["| difference | text | nats a token, 95 % interval | pairs | |", "|---|---|---:|---:|---|"]
    for one, other in PAIRS:
        for name in corpora:
            found = difference(done, one, other, name)
            if found is None:
                continue
            mean, half, n = found
            said = "below" if mean + half < 0 else "above" if mean - half > 0 else "not told apart"
            interval = f"{mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}]"
            lines.append(f"| {one} against {other} | {name} | {interval} | {n} | {said} |")
    return lines


def grid(done: Rows) -> list[str]:
    """The loss on held-out windows, by loss and rate."""
    mine = [row for row in done if row["seed"] == GRID_SEED]
    rates = sorted({row["rate"] for row in mine})
    lines = [f"| loss | {' | '.join(f'{rate:.0e}' for rate in rates)} |", f"|---|{'---:|' * len(rates)}"]
    for loss in LOSSES:
        told = {row["rate"]: row for row in mine if row["loss"] == loss}
        if not told:
            continue
        least = min((row["held"] for row in told.values() if not diverged(row)), default=math.nan)
        cells = [_cell(told.get(rate), least) for rate in rates]
        lines.append(f"| {loss} | {' | '.join(cells)} |")
    return lines + edges(done, rates)


def edges(done: Rows, rates: Sequence[float]) -> list[str]:
    """Which losses might have gained from rates beyond the grid."""
    used = {loss: of(done, loss)[0]["rate"] for loss in LOSSES if of(done, loss)}
    found = [f"{loss} ({rate:.0e})" for loss, rate in used.items() if rate in (rates[0], rates[-1])]
    return ["", f"At an end of the grid, so that a rate beyond it may be better: {', '.join(found)}."] if found else []


def _cell(row: dict[str, Any] | None, least: float) -> str:
    if row is None:
        return "-"
    if diverged(row):
        return "diverged"
    return f"**{row['held']:.4f}**" if row["held"] == least else f"{row['held']:.4f}"


def section(name: str, done: Rows) -> list[str]:
    """All of a model."""
    one = next(row for row in done if row["loss"] in LOSSES)
    corpora = list(next(row for row in done if "found" in row)["found"])
    tokens = {key: value["tokens"] for key, value in next(row for row in done if "found" in row)["found"].items()}
    zeros = sorted({row["zeros"] for row in done if row["loss"] in LOSSES and "zeros" in row})
    where = one["machine"]
    counted = f"{zeros[0]:,}" if len(zeros) == 1 else f"{zeros[0]:,} to {zeros[-1]:,}"
    return [
        f"## {name}",
        "",
        f"{one['updates']} updates of {one['tokens']:,} tokens under each loss; perplexity of"
        f" {' and '.join(f'{key} ({count:,} tokens)' for key, count in tokens.items())}, ± one standard error over"
        f" seeds. The {counted} zeros of every cell are the same before and after, bit for bit."
        f" {where['processor']}, {where['threads']} of {where['cores']} cores (shared), torch"
        f" {where['versions']['torch']}, transformers {where['versions']['transformers']}.",
        "",
        *scores(done, corpora),
        "",
        *differences(done, corpora),
        "",
        f"Rates, each loss the same ones, by the loss on held-out windows with seed {GRID_SEED}, which is not scored:",
        "",
        *grid(done),
        "",
    ]


def main() -> None:
    """Write results/sparse_finetune.md."""
    done = stored(LINES)
    lost = sum(diverged(row) for row in done)
    said = f"{lost} cells diverged." if lost else "No cell diverged."
    text = [
        "# SquareHead beside its parts, at 70 % zeros",
        "",
        "SparseGPT zeros 70 % of the weights of all linears of the blocks; all weights that are left learn, at equal"
        " updates, from the same pruned model and the same batches. Losses in nats a token; differences are paired by"
        " seed, below 0 where the first is better. Seeds draw what is calibrated on and the order of training, of one"
        " dense model each. Texts were neither calibrated nor trained on here, though the model's authors may have had"
        f" them. {said} See `benchmarks/sparse_finetune.py`.",
        "",
    ]
    for name in dict.fromkeys(row["model"] for row in done):
        text += section(name, [row for row in done if row["model"] == name])
    (RESULTS / "sparse_finetune.md").write_text("\n".join(text), "utf-8")


if __name__ == "__main__":
    main()
