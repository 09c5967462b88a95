"""Work that processes share out, as functions of the processes; run as a script by torchrun, all of them in each
process, and what each process found is written down. Called with `ALONE`, they are what one process does.
"""

import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from compresso.arch.base import Arch, arch_for
from compresso.core.axis import Kind
from compresso.core.entropy import histograms
from compresso.core.plan import Plan
from compresso.core.row import Row
from compresso.core.sparsity import lowest_in_rows
from compresso.errors import CompressoError, Interrupted
from compresso.job import Job
from compresso.observe.activations import activation_scores
from compresso.observe.folds import Fold, Stats, absolute_sums, second_moment, squares
from compresso.observe.gate_taylor import gate_taylor
from compresso.observe.influence import angular_distances, block_influence
from compresso.observe.journal import FoldJournal
from compresso.observe.losses import losses_under
from compresso.observe.observe import Pass
from compresso.sweep.bank import BankKnobs, make_bank
from compresso.sweep.bank_file import read_moment
from compresso.sweep.block import BlockEdit
from compresso.sweep.calibration import Calibration
from compresso.sweep.journal import Journal
from compresso.sweep.least_squares import Fit
from compresso.sweep.lost import lost
from compresso.sweep.one_shot import zeroed
from compresso.sweep.repair import Calibrated, repair_
from compresso.sweep.scaling import largest, moment_and_size
from compresso.sweep.slicing import bases_of
from compresso.sweep.sweep import sweep
from compresso.sweep.swept import SweepRun
from compresso.sweep.targets import Group, Where, chosen
from compresso.training.ranks import Ranks, ranks
from compresso.training.rounds import RoundJournal

CONFIG: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 32,
    "max_position_embeddings": 64,
}
FOLDS: Mapping[str, Fold] = {
    "squares": squares,
    "absolute_sums": absolute_sums,
    "second_moment": second_moment,
    "moment_and_size": moment_and_size,
    "largest": largest,
}
BATCHES = 5
"""An odd number, so that two processes have unequal shares."""


def made() -> tuple[PreTrainedModel, Arch]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()
        for parameter in model.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.3)
    return model, arch_for(model.config)


def batches() -> list[Tensor]:
    """Of unequal lengths and sizes, so that a mean of means is no mean."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(4, 10), (4, 10), (1, 10), (3, 23), (2, 23)]
    assert len(shapes) == BATCHES
    return [torch.randint(0, 32, shape, generator=generator) for shape in shapes]


def padded() -> list[dict[str, Tensor]]:
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} for ids in batches()]


def of_folds(folder: Path, them: Ranks) -> dict[str, Tensor]:
    """Every statistic of every linear, and how many tokens it is of."""
    model, arch = made()
    groups = chosen(model, arch, Where())
    found: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[Group, Stats], dict[str, Any]]:
        def look(group: Group, seen: Stats) -> dict[str, Any]:
            found[f"{name} {group.names[0]}"] = seen.total.clone()
            found[f"{name} {group.names[0]} n"] = torch.tensor(seen.n)
            return {}

        return look

    for name, fold in FOLDS.items():
        sweep(model, arch, groups, batches(), fold, note(name), place="disk", scratch=folder / "states", ranks=them)
    return found


def of_one_batch(folder: Path, them: Ranks) -> dict[str, Tensor]:
    """One process of two has nothing to look at."""
    model, arch = made()
    edit = zeroed(model, lambda _, score: (lowest_in_rows(score, 0.5), {}))
    sweep(model, arch, chosen(model, arch, Where()), batches()[:1], squares, edit, ranks=them)
    return dict(model.state_dict())


def zeroing(folder: Path, them: Ranks, stop: int = -1) -> tuple[dict[str, Tensor], set[int], Interrupted | None]:
    """Wanda's weights, which blocks were edited, and what stopped it.

    stop: the block at which the last process gets a signal.
    """
    model, arch = made()
    zero, edited = zeroed(model, lambda _, score: (lowest_in_rows(score, 0.5), {})), list[int]()

    def edit(group: Group, seen: Stats) -> Mapping[str, Any]:
        if group.layer == stop and stop not in edited and them.rank == them.n - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        edited.append(group.layer)
        return zero(group, seen)

    journal = Journal(folder / "journal", {"of": "these"})
    try:
        sweep(model, arch, chosen(model, arch, Where()), batches(), squares, edit, journal=journal, ranks=them)
    except Interrupted as found:
        return {}, set(edited), found
    return dict(model.state_dict()), set(edited), None


def pruned(folder: Path, them: Ranks) -> dict[str, Tensor]:
    """Wanda, and the same after a signal to one process has stopped it behind its second block."""
    plain, _, _ = zeroing(folder / "plain", them)
    _, begun, stop = zeroing(folder / "stopped", them, stop=1)
    assert stop is not None and stop.saved == str(folder / "stopped" / "journal")
    assert begun == {0, 1}, "all processes stop behind the same block"
    them.wait()
    resumed, again, _ = zeroing(folder / "stopped", them)
    assert again == {2}, "finished blocks are read"
    assert all(torch.equal(resumed[name], one) for name, one in plain.items())
    return plain


def of_passes(folder: Path, them: Ranks) -> dict[str, Tensor]:
    """Scores by passes over a model that nothing changes."""
    model, arch = made()
    axes, blocks = arch.axes(model), arch.blocks(model)
    layers = [axis for axis in axes if axis.kind == Kind.LAYER]
    widths = [axis for axis in axes if axis.kind in (Kind.HEAD, Kind.CHANNEL)]

    def how(name: str) -> Pass:
        return Pass(FoldJournal(them.own(folder / name), {}, every=2), None, name, them)

    influence = block_influence(model, blocks, layers, (Kind.LAYER,), padded(), how("influence"))
    assert influence.tokens == sum(ids.numel() for ids in batches())
    return {
        "influence": influence.scores[layers[0].name],
        "angles": angular_distances(model, blocks, padded(), how("angles")),
        **{
            f"activation {k}": v
            for k, v in activation_scores(model, widths, list(blocks), padded(), how=how("act")).items()
        },
        **{f"taylor {k}": v for k, v in gate_taylor(model, widths, padded(), how("taylor")).items()},
    }


def of_bank(folder: Path, them: Ranks) -> dict[str, Tensor]:
    """Second moments of a bank, the orders that units leave in, and what that costs."""
    model, arch = made()
    rows: list[Row] = [{"input_ids": row.tolist(), "labels": row.tolist()} for ids in batches() for row in ids]
    run = SweepRun("bank", model, arch, rows, 0, folder, lambda _: {}, ranks=them)
    bank = make_bank(run, Calibration(examples=64, batch=3), BankKnobs(moments=True))
    found: dict[str, Tensor] = {f"block {layer}": torch.tensor(value) for layer, value in bank.blocks.items()}
    for one in bank.sub_layers.values():
        found[f"{one.name} moment"] = read_moment(folder / "bank", one)
        for ladder in one.ladders:
            found[f"{one.name} {ladder.slots} order"] = torch.tensor(ladder.order)
            found[f"{one.name} {ladder.slots} errors"] = torch.tensor(ladder.errors)
    return found


def repaired(folder: Path, them: Ranks) -> dict[str, Tensor]:
    """Least squares behind channels that left and before a block that left."""
    dense, arch = made()
    smaller, _ = made()
    for name, parameter in smaller.named_parameters():
        if name.endswith("layers.0.mlp.down_proj.weight"):
            parameter.data[:, ::2] = 0
    blocks = arch.blocks(smaller)
    del blocks[1]
    smaller.config.num_hidden_layers = 2
    for i, block in enumerate(blocks):
        block.self_attn.layer_idx = i  # type: ignore[union-attr]
    layers = (0, 2)
    gone = lost(dense, smaller, arch, layers)
    data = Calibrated(batches()[:3], batches()[3:], "disk", folder / "states")
    facts = repair_(dense, smaller, arch, gone, layers, None, data, Fit(), None, ranks=them)
    errors = {f"errors of {name}": torch.tensor(one["held_out_error"]) for name, one in facts.items()}
    assert facts and all(one["tokens"] == sum(ids.numel() for ids in data.seen) for one in facts.values())
    return {**smaller.state_dict(), **errors}


def sliced(folder: Path, them: Ranks) -> dict[str, Tensor]:
    """The projections onto what slicing keeps: a basis is known up to signs."""
    model, arch = made()
    found = bases_of(model, arch, batches(), 12, 12, 1e-2, scratch=folder / "states", ranks=them)
    return {"bases": found.bases @ found.bases.mT, "lost": torch.tensor(found.lost)}


def removed(folder: Path, them: Ranks) -> dict[str, Tensor]:
    """Losses of a model that is a little other in each process, and units that another mask is given for in each: of
    both what the main one has.
    """
    model, arch = made()
    with torch.no_grad():
        model.get_parameter("model.norm.weight").mul_(1 + 0.01 * them.rank)
    axis = next(one for one in arch.axes(model) if one.kind == Kind.CHANNEL)
    gone = [torch.arange(axis.size) != i for i in range(3)]
    journal = RoundJournal(folder / "losses", {"of": "removed"}, them)
    masks = [{axis.name: one.float()} for one in gone]
    losses = losses_under(model, [axis], masks, padded(), journal=journal)
    model, arch = made()
    job = Job(model, arch, None, [], [], Plan(), {}, {}, seed=0, out=folder, quiet=True)
    smaller = job.without(masks[them.rank], "removed").model
    return {"losses": losses, **{name: one.detach().clone() for name, one in smaller.state_dict().items()}}


PARTS: Mapping[str, Callable[[Path, Ranks], dict[str, Tensor]]] = {
    "of_folds": of_folds,
    "of_one_batch": of_one_batch,
    "pruned": pruned,
    "of_passes": of_passes,
    "of_bank": of_bank,
    "repaired": repaired,
    "sliced": sliced,
    "removed": removed,
}


def refusals(them: Ranks) -> list[str]:
    """What each process says where one cannot go on, or several may not begin."""
    model, arch = made()
    groups, told = chosen(model, arch, Where()), list[str]()
    broken = batches()
    broken[1][:] = 31
    spoilt, _ = made()
    spoilt.get_input_embeddings().weight.data[31] = torch.inf  # type: ignore[union-attr]

    def learned(_: Any) -> dict[str, Any]:
        return {}

    def nothing(group: Group, seen: Stats) -> dict[str, Any]:
        return {}

    for of, rows, fold, edit in (
        (spoilt, broken, squares, nothing),
        (model, batches(), histograms, nothing),
        (model, batches(), None, BlockEdit(learned)),
    ):
        try:
            sweep(of, arch, groups, rows, fold, edit, name="wanda", ranks=them)
            told.append("")
        except CompressoError as error:
            told.append(f"{type(error).__name__}: {error}")
    return told


def main() -> None:
    """Do all parts in each process, below the folder given."""
    warnings.simplefilter("ignore")
    out, them = Path(sys.argv[1]), ranks()
    for name, part in PARTS.items():
        found = part(out / name, them)
        tensors = {key: one.detach().clone().contiguous() for key, one in found.items()}
        save_file(tensors, out / f"{name}.{them.rank}.safetensors")
    (out / f"refusals.{them.rank}.json").write_text(json.dumps(refusals(them)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
