"""Makes a bank of nested choices in one pass over the dense model, one block in memory at a time.

Statistics are those of the dense stream: no sub-layer knows what others will lose, so that one bank serves every choice
of levels. Weights for a choice are fitted later, on the stream as it is then.
"""

import logging
from collections.abc import Sequence
from typing import Annotated, Any

from annotated_types import Gt, Le
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as validated_dataclass
from torch import Tensor
from transformers import PreTrainedModel

from compresso.arch.queries import axes_of
from compresso.core.axis import Kind
from compresso.core.obs import NotPositiveDefiniteError
from compresso.errors import NumericError
from compresso.solve.bank import Bank, SubLayer
from compresso.solve.nested import Site, nested_sub_layer, sites
from compresso.sweep import bank_file
from compresso.sweep.audit import digest, fingerprints
from compresso.sweep.block import BlockRunner
from compresso.sweep.calibration import Calibration
from compresso.sweep.residence import InMemory
from compresso.sweep.survey import Weighting, look_at, survey
from compresso.sweep.swept import SweepRun
from compresso.sweep.targets import matrix

log = logging.getLogger(__name__)
TOKENS_A_COLUMN = 8
"""Fewest calibration tokens for each input of a fitted linear, below which fits follow the sample."""


@validated_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class BankKnobs:
    """How a bank is made.

    Args:
        damping: share of the mean diagonal added to second moments.
        weighting: what a token counts; see `Weighting`.
        moments: keep second moments beside the orders, so that weights can be fitted without another pass: 4 bytes for
            every pair of inputs.
    """

    damping: Annotated[float, Gt(0), Le(1)] = 0.01
    weighting: Weighting = Weighting.SINKS
    moments: bool = False


def make_bank(run: SweepRun, calibration: Calibration, knobs: BankKnobs) -> Bank:
    """The bank of a run's model, read if `run.folder/bank` holds it, built or finished if not.

    Args:
        run: the run's part; its model is not changed.
        calibration: which rows, and how they run; several processes take a share each.
        knobs: how.

    Raises:
        CheckpointError: there is the bank of another model, calibration, knobs or dtype.
        NumericError: NaN or Inf, or a second moment that cannot be inverted.
        Interrupted: SIGINT or SIGTERM came, and what is done is kept.
    """
    model, batches = run.model, calibration.batches(run.rows, run.seed)
    identity = {
        "model": digest(fingerprints((run.offloaded or InMemory(model)).tensors())),
        "calibration": digest([batch.tolist() for batch in batches]),
        "knobs": {"damping": knobs.damping, "weighting": str(knobs.weighting), "moments": knobs.moments},
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    axes, folder = axes_of(run.arch, model, (Kind.QUERY,)), run.folder / "bank"
    here: dict[int, list[Site]] = {}
    for site in sites(axes):
        here.setdefault(site.layer, []).append(site)
    run.ranks.warn_of_idle(run.stage, len(batches))
    if run.ranks.is_main:
        _warn_of_few(model, [site.consumer for of_layer in here.values() for site in of_layer], batches)
    drops_blocks = any(axis.kind == Kind.LAYER for axis in axes)

    def look(layer: int, runner: BlockRunner) -> tuple[dict[str, Tensor], dict[str, Any]]:
        mine = here.get(layer, [])
        seen = look_at(model, [site.consumer for site in mine], runner, knobs.weighting, run.ranks)
        tensors, facts = dict[str, Tensor](), dict[str, Any]()
        for site in mine:
            moment = seen.moments.pop(site.consumer) / seen.tokens
            more, facts[site.kind] = bank_file.packed(_nested(model, site, moment, knobs.damping))
            tensors |= more | ({f"{site.kind}.moment": moment[:-1, :-1]} if knobs.moments else {})
        return tensors, {"block": seen.moved / seen.tokens if drops_blocks else None, "sub_layers": facts}

    journal = bank_file.begin(folder, identity, len(run.arch.blocks(model)), run.ranks)
    survey(
        model,
        run.arch,
        batches,
        look,
        journal,
        place=calibration.activations,
        scratch=run.folder / "activations",
        offloaded=run.offloaded,
        progress=run.progress,
        name=f"{run.stage} bank",
        ranks=run.ranks,
    )
    return bank_file.read(folder, identity)


def _warn_of_few(model: PreTrainedModel, consumers: Sequence[str], batches: Sequence[Tensor]) -> None:
    """Say how many calibration tokens would do, where there are too few."""
    widest = max(consumers, key=lambda name: matrix(model, name).shape[1], default=None)
    if widest is None:
        return
    inputs, n_tokens = matrix(model, widest).shape[1], sum(batch.numel() for batch in batches)
    if n_tokens < TOKENS_A_COLUMN * inputs:
        log.warning(
            "calibration has %s tokens, fewer than %d for each of the %s inputs of %s; %s would do",
            f"{n_tokens:,}",
            TOKENS_A_COLUMN,
            f"{inputs:,}",
            widest,
            f"{TOKENS_A_COLUMN * inputs:,}",
        )


def _nested(model: PreTrainedModel, site: Site, moment: Tensor, damping: float) -> SubLayer:
    """The orders of a sub-layer. Raises NumericError, naming its consumer."""
    bias = getattr(model.get_submodule(site.consumer), "bias", None)
    try:
        return nested_sub_layer(site, matrix(model, site.consumer), moment, bias, damping)
    except NotPositiveDefiniteError as error:
        raise NumericError(f"{site.consumer}: {error}; give more calibration examples, or raise damping") from error
