"""LoRA recovery: adapters trained on the already smaller model, then merged (Hu et al., arXiv 2106.09685; LLM-Pruner's
third stage, arXiv 2305.11627, section 3.3; Compresso's optional fine-tuning with frozen masks, arXiv 2310.05015).

After Compresso the masks are folded into the weights, so they are frozen by construction. Departure from Compresso's
script: adapters start fresh on merged weights instead of going on with those of mask training, so recovery can follow
any pruning.

Behind `svd`, `train: factors` is SVD-LLM's order (arXiv 2403.07378, section 3.3 and the authors' code): adapters learn
on the left factors while the right ones wait, in the first half of the updates; then on the right ones, the left being
frozen as they are. The rank stays what svd left, where `train: lora` adds its own. Departures: half of the updates
each, as many as asked for in all (the authors take two epochs each); the second half goes on in the order of examples.

`base: nf4` is QLoRA (arXiv 2305.14314), `base: int8` adapters on LLM.int8 (arXiv 2208.07339): the base is rounded while
adapters learn, for cards with little memory. The adapters learned what the rounded base lacks, too, and are merged
into the stored weights, so that the merged model is not quite the one that was trained; its scores are measured.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from peft import PeftModel
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compresso.arch.base import Arch
from compresso.arch.context import width_of
from compresso.edit.factors import factor_, multiply_out_
from compresso.edit.few_bit_base import library, linears_of_blocks, no_linears, restore_base_, round_base_
from compresso.errors import RecipeError
from compresso.job import Job
from compresso.stage import AdamW, Effects, Learning, Passes, Trains, TunesLora, Watches, stage
from compresso.stage.tuning import check_routers, group_of, learner, router_numbers, settled, shards_of, tune, watching
from compresso.training.groups import Group
from compresso.training.history import curve
from compresso.training.objectives import LossObjective
from compresso.training.watch import Watch


@stage(
    "recover",
    title="LoRA fine-tuning of the smaller model, merged into its weights",
    paper="2106.09685",
    effects=Effects.WEIGHTS,
    needs=("data", "gradients", "training"),
    when="After any removal; worth most where much was removed.",
    failures=(
        "Instruction-only data ruins plain-text perplexity: mix text in. Too high a rate shows as a rising held-out"
        " loss."
    ),
    any_task=True,
)
class Recover:
    """Knobs of LoRA recovery.

    Args:
        trains, lora, adamw, watches: see `Trains`, `TunesLora`, `AdamW` and `Watches`.
        train: "lora" adapters, merged at the end, "all" weights (in float32 while they learn; wants a lower lr),
            those of the "router" of each mixture alone, or "factors": adapters on those of the targets that svd left
            with a low rank, left factors first, then right. Adapters lie on stacked experts, too, where targets name
            gate_proj, up_proj or down_proj, and on routers where they name "router".
        base: what adapters learn on: the weights as "stored", or the linears of the blocks rounded to "int8" or "nf4"
            while they learn, which takes a half or a quarter of the memory of 16 bits; merged is into the stored ones.
    """

    trains: Trains = Trains()
    train: Literal["lora", "all", "router", "factors"] = "lora"
    base: Literal["stored", "int8", "nf4"] = "stored"
    lora: TunesLora = TunesLora()
    adamw: AdamW = AdamW()
    watches: Watches = Watches()

    def __post_init__(self) -> None:
        """Refuse to keep adapters that fit no linear of the result."""
        if self.train == "factors" and self.trains.save_adapter:
            raise ValueError("save_adapter: adapters of factors fit no linear of the result; leave save_adapter out")
        if self.base != "stored" and self.train != "lora":
            raise ValueError(
                f"base={self.base} holds weights that do not learn, and train={self.train} is not adapters alone; give"
                " train: lora, or leave base out"
            )

    def follows(self) -> tuple[str, str]:
        """`svd`, for factors."""
        if self.train != "factors":
            return "", ""
        return "svd", "train: factors tunes what svd left with a low rank; put svd before it, or give train: lora"

    def check(self, model: PreTrainedModel, arch: Arch) -> None:
        """Raise RecipeError for factors, or few bits, of a family whose linears are no `nn.Linear`, and for routers
        of one without.
        """
        if self.train == "router":
            check_routers(model)
        if self.base != "stored":
            library()
            if next(linears_of_blocks(model), None) is None:
                raise no_linears(model, self.base)
        if self.train == "factors" and any(isinstance(module, Conv1D) for module in model.modules()):
            raise RecipeError(
                f"the linears of a {model.config.model_type} are Conv1D, and train: factors takes them apart as Linear"
                " alone; give train: lora"
            )

    def check_processes(self, n: int) -> None:
        """Raise RecipeError for few bits in several processes."""
        if self.base != "stored" and n > 1:
            raise RecipeError(
                f"base={self.base} is trained in one process, and not in {n}; leave base out, or take one process,"
                " which is one device"
            )

    def learning(self) -> Learning:
        """Adapters, or all weights, or those of routers."""
        steps, spreads = [self.trains.steps], self.train != "factors"
        if self.train == "router":
            return Learning(self.trains, steps, None, frozen=True, own=router_numbers, spreads=spreads)
        return Learning(self.trains, steps, None if self.train == "all" else self.lora, spreads=spreads)

    def work(self, model: PreTrainedModel, arch: Arch) -> Sequence[Passes]:
        """The passes of the training."""
        return self.learning().passes()

    def __call__(self, job: Job) -> Job:
        """Train adapters and merge them, or train weights."""
        (total,) = self.trains.updates(len(job.rows))
        watch = watching(job, self.watches, total)
        if self.train == "factors":
            return self._factors(job, total, watch)
        stored = job.model.dtype
        held = {} if self.base == "stored" else round_base_(job.model, self.base)
        model = learner(job, self.lora if self.train == "lora" else None, routers=self.train == "router")
        learning = group_of(self.train, model, self.adamw, width_of(job.model.config), total)
        objective, shards = LossObjective(model, job.task.loss), shards_of(job)
        history = tune(job, "recover", self.trains, objective, [learning], total, watch=watch, shards=shards)
        told: dict[str, object] = {}
        if held:
            assert isinstance(model, PeftModel)
            restore_base_(model, held)
            told = {"base": {"learned_on": self.base, "linears": len(held), "merged_into": str(stored).split(".")[-1]}}
        return settled(job, model, stored, "recover", self.trains).note(
            "recover",
            **told,
            updates=total,
            trainable=learning.numbers,
            lr=learning.lr,
            curve=curve(history),
            **(watch.facts() if watch else {}),
        )

    def _factors(self, job: Job, total: int, watch: Watch | None) -> Job:
        """Train adapters on left factors, then on right ones; the products keep their rank."""
        ranks: dict[str, int] = job.records.get("svd", {}).get("ranks", {})
        parts = getattr(job.arch, "parts", None)
        stands = [] if parts is None else [parts.standing_for(target) for target in self.lora.targets]
        ends = tuple(f".{one}" for one in (*self.lora.targets, *stands) if one)
        chosen = {name: rank for name, rank in ranks.items() if f".{name}".endswith(ends)}
        if not chosen:
            raise RecipeError(
                f"train: factors tunes what svd left with a low rank, and of {', '.join(self.lora.targets)} it left"
                " none; put svd before it, or train lora"
            )
        factor_(job.model, chosen)
        model = learner(job, replace(self.lora, targets=("left", "right")))
        first, hidden = (total + 1) // 2, width_of(job.model.config)
        sides = {
            side: [one for name, one in model.named_parameters() if one.requires_grad and f".{side}." in name]
            for side in ("left", "right")
        }
        groups: list[Group] = []
        for side, begun, updates in (("left", 0, first), ("right", first, total - first)):
            own = group_of(side, model, self.adamw, hidden, max(updates, 1))
            groups.append(replace(own, params=sides[side], schedule=_from(begun, updates, own.schedule)))

        def before_step(update: int) -> None:
            for one in sides["right" if update < first else "left"]:
                one.grad = None  # its AdamW state waits, too

        history = tune(
            job,
            "recover",
            self.trains,
            LossObjective(model, job.task.loss),
            groups,
            total,
            before_step=before_step,
            phase=lambda update: "left factors" if update < first else "right factors",
            watch=watch,
        )
        done = settled(job, model, job.model.dtype, "recover", self.trains)
        multiply_out_(done.model, chosen)
        return done.note(
            "recover",
            updates=total,
            trainable=sum(one.numbers for one in groups),
            lr=groups[0].lr,
            factors=len(chosen),
            curve=curve(history),
            **(watch.facts() if watch else {}),
        )


def _from(begun: int, updates: int, schedule: Callable[[int], float]) -> Callable[[int], float]:
    """A schedule that begins at an update, and is 0 before and after its own."""
    return lambda update: schedule(update - begun) if begun <= update < begun + updates else 0.0
