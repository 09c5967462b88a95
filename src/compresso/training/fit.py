"""The training loop: masks, LoRA adapters and distillation are all trained here.

What is unusual: the loop has no hidden state. Which examples, which gate noise and which dropout an update sees are
functions of (seed, update, slot), so a resumed run repeats the uninterrupted one bit for bit on a CPU, and N processes
with A micro-batches each do what one process with N * A does. Everything is counted in updates of the optimizer, never
in micro-batches. Accelerate brings devices, DDP and the reduction of gradients; where FSDP 2 is asked for, weights are
spread over the processes while the loop runs (`training/shards.py`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from compresso.core.row import tokens_in
from compresso.errors import CompressoError, Interrupted, NumericError
from compresso.training.checkpoint import TrainingCheckpoints
from compresso.training.checkpoint_manager import CheckpointManager
from compresso.training.device import choose_device, choose_precision, slow_precision
from compresso.training.groups import Group, adamw, all_finite, check_groups, clip_, gradient_norms, set_rates_
from compresso.training.halving import Halving, free
from compresso.training.history import History
from compresso.training.launch import new_accelerator, prepare, sharding, summed
from compresso.training.noise import mixed_seed
from compresso.training.order import Batches, Micro, micros_of
from compresso.training.progress import Progress
from compresso.training.shards import Shards, Spread, spread
from compresso.training.signals import Requests, asked, noted_signals
from compresso.training.state import trainable
from compresso.training.watch import Watch

MOST_SKIPS = 3
"""This many updates in a row with a NaN or Inf in loss or gradient end a run; fewer are skipped."""


def fit(
    objective: nn.Module,
    groups: Sequence[Group],
    batches: Batches,
    steps: int,
    *,
    seed: int,
    accumulation: int = 1,
    precision: str = "no",
    device: torch.device | str = "auto",
    before_step: Callable[[int], None] | None = None,
    after_update: Callable[[int], Mapping[str, float] | None] | None = None,
    checkpoints: TrainingCheckpoints | None = None,
    save_every: int = 50,
    progress: Progress | None = None,
    phase: Callable[[int], str] = lambda update: "training",
    watch: Watch | None = None,
    begin: Callable[[torch.optim.Optimizer], None] | None = None,
    shards: Shards | None = None,
) -> History:
    """Train in place, from the newest checkpoint if there is one, and return the log of all updates, those of
    interrupted runs included.

    An update: every micro-batch's loss is its own mean, and micro-batches and processes are averaged; then clip, AdamW,
    `after_update`. An update whose loss or gradient is not finite leaves the parameters and the optimizer as they are
    and has no `after_update`; it is listed in `History.skipped`.

    Args:
        objective: called as `objective(batch, micro)` with a `Micro`; returns a dict of scalars with "loss"; the others
            are logged. It owns every parameter that learns, also the gates and multipliers, so that their gradients are
            averaged over processes. Parameters that a phase does not use keep `grad` None, and their AdamW state waits.
        groups: each trainable parameter in exactly one.
        batches: the data; `global_batch` must be a multiple of accumulation x processes.
        steps: updates in all.
        seed: of dropout; the objective's own noise comes from `noise.gate_noise`.
        accumulation: micro-batches an update and process.
        precision: as in `choose_precision`; "bf16" computes under autocast, parameters keep their type.
        device: as in `choose_device`.
        before_step: called in every process with the update's index once its gradients are there, averaged over
            micro-batches and processes, before they are clipped.
        after_update: called in every process with the update's index, after the optimizer and before gradients are
            dropped, to clamp or project; its numbers are logged.
        checkpoints: where to save and resume; its folder must be visible to all processes. None saves nothing.
        save_every: updates between saves; the last update is saved too.
        progress: display; None shows nothing.
        phase: the name shown for an update.
        watch: looks at a held-out loss on the way, ends training when that only rises, and leaves the best state in
            the objective.
        begin: given the optimizer before anything is done, for an `after_update` that edits its state, too.
        shards: what is spread over processes under FSDP 2; None trains whole weights in each, as without FSDP. While it
            is, others stand in the places of its parameters: read them through the module, whole ones by
            `state.trained`.

    Raises:
        ResourceError: memory does not suffice for a single example; a micro-batch that does not fit is halved, and that
            is said (in one process).
        NumericError: MOST_SKIPS updates in a row were not finite; the parameters are put back to the newest checkpoint,
            if there is one.
        ResumeError: the newest checkpoint belongs to another run.
        Interrupted: SIGINT or SIGTERM came; the state was saved at the end of the update.
        CompressoError: groups, batches or launch do not fit together.
    """
    check_groups(groups, trainable(objective))
    device = choose_device(device)
    compute = choose_precision(precision, device)
    accelerator = new_accelerator(device)
    ranks, rank = accelerator.num_processes, accelerator.process_index
    micros_of(
        0, batches.global_batch, accumulation, rank, ranks
    )  # refuses an impossible split before anything is moved
    run = {
        "seed": seed,
        "steps": steps,
        "global_batch": batches.global_batch,
        "micro_batches": accumulation * ranks,
        "precision": compute,
        "groups": {g.name: g.facts() for g in groups},
    } | ({"held": watch.identity} if watch else {})
    halving = Halving(ranks)
    shown = progress if progress is not None and accelerator.is_main_process else Progress("silent")

    with ExitStack() as stack:
        spread_over = stack.enter_context(spread(shards, objective, accelerator)) if shards and sharding() else None
        groups = groups if spread_over is None else spread_over.groups(groups)
        optimizer = adamw(groups)
        if begin is not None:
            begin(optimizer)
        model = spread_over or prepare(accelerator, objective, optimizer)
        manager = CheckpointManager(accelerator, objective, optimizer, checkpoints, run, watch)
        done, history = manager.resume()
        requests = stack.enter_context(noted_signals())
        stack.enter_context(_training(objective, accelerator.device))
        stack.enter_context(shown.running(steps, done, phase(max(min(done, steps - 1), 0))))
        for note in checkpoints.notes if checkpoints else ():
            shown.say(note)
        if slow := slow_precision(compute, device):
            shown.say(slow)
        _look(watch, accelerator, objective, done, shown, spread_over)
        for update in range(done, steps):
            if watch is not None and watch.over:
                break
            micros = micros_of(update, batches.global_batch, accumulation, rank, ranks)
            while True:
                try:
                    means, tokens = _gradients(
                        accelerator, model, batches, micros, seed, compute == "bf16", halving, shown, requests
                    )
                    break
                except Exception as error:
                    if not halving.after(error, micros):
                        raise
                optimizer.zero_grad(set_to_none=True)  # of the parts that did fit: the update is done anew
                free()
            if spread_over is not None:
                spread_over.average_()
            norms = gradient_norms(optimizer)
            bad = ~(means["loss"].isfinite() & all_finite(norms).to(means["loss"].device))
            sums = summed(accelerator, means | requests.flags() | {"#bad": bad, "#tokens": torch.tensor(tokens)})
            stop = asked(sums)
            row: dict[str, float] = {"update": update, **{name: sums[name] / ranks for name in means}}
            if sums["#bad"]:
                history.skipped.append(update)
                shown.say(f"update {update} skipped: its loss ({row['loss']}) or gradient is not finite")
                _give_up_after_skips(history, row["loss"], manager)
            else:
                set_rates_(optimizer, groups, update)
                if before_step is not None:
                    before_step(update)
                clip_(optimizer, groups, norms)
                optimizer.step()
                row |= dict((after_update(update) if after_update else None) or {})
                history.rows.append(row)
            optimizer.zero_grad(set_to_none=True)
            _look(watch, accelerator, objective, update + 1, shown, spread_over)
            over = watch is not None and watch.over
            if stop or over or update + 1 == steps or (update + 1) % save_every == 0:
                manager.save(update + 1, history)
            shown.step(update + 1, phase(update), row, sums["#tokens"])
            if stop:
                raise Interrupted(stop, manager.saved)
        late = asked(summed(accelerator, requests.flags()))  # came during the last save
        if late:
            raise Interrupted(late, manager.saved)
        if watch is not None:
            shown.say(watch.settle_(objective))
        if spread_over is not None:
            optimizer.state.clear()  # so that there is room for whole weights
    return history


def _look(
    watch: Watch | None,
    accelerator: Accelerator,
    objective: nn.Module,
    done: int,
    shown: Progress,
    spread_over: Spread | None,
) -> None:
    """Evaluate on held-out examples, if something does and it is time to, and say so."""
    through = (lambda score: score()) if spread_over is None else spread_over.read
    if watch is not None and (told := watch.look(accelerator, objective, done, through)) is not None:
        shown.say(told)


def _gradients(
    accelerator: Accelerator,
    model: nn.Module,
    batches: Batches,
    micros: Sequence[Micro],
    seed: int,
    bf16: bool,
    halving: Halving,
    shown: Progress,
    requests: Requests,
) -> tuple[dict[str, Tensor], float]:
    """Accumulate the gradients of an update; returns this process' mean of every logged number, and its count of
    tokens.
    """
    device = accelerator.device
    means: dict[str, Tensor] = {}
    tokens = 0.0
    pieces = ((one, piece) for one in micros for piece in halving.pieces(one, batches))
    for micro, piece in pieces:
        tokens += tokens_in(piece.batch)
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in piece.batch.items()}
        part = () if piece.part is None else (piece.part,)
        torch.manual_seed(mixed_seed("dropout", seed, micro.update, micro.slot, *part))
        with nullcontext() if micro is micros[-1] and piece.last else accelerator.no_sync(model):
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                numbers: dict[str, Tensor] = model(batch, piece.micro)
            if "loss" not in numbers or (means and numbers.keys() != means.keys()):
                found = f"the objective returned {sorted(numbers)} at update {micro.update}"
                raise CompressoError(f"{found}; wanted 'loss', and the same names for all of an update")
            (numbers["loss"] * piece.weight / len(micros)).backward()
        for name, number in numbers.items():
            share = number.detach().double() * piece.weight / len(micros)
            means[name] = means[name] + share if name in means else share
        if piece.last:
            through = micros.index(micro) + 1
            shown.part(through, len(micros), "micro-batches of the next update")
            if through < len(micros) and (sentence := requests.told()):
                shown.say(sentence)
    return means, tokens


def _give_up_after_skips(history: History, loss: float, manager: CheckpointManager) -> None:
    last = history.skipped[-1]
    if history.skipped[-MOST_SKIPS:] == list(range(last - MOST_SKIPS + 1, last + 1)):
        raise NumericError(
            f"update {last}: loss {loss}; {MOST_SKIPS} updates in a row had a loss or gradient that is not finite;"
            f" {manager.rewind()}; lower the learning rate, or look at the data of these updates"
        )


@contextmanager
def _training(objective: nn.Module, device: torch.device) -> Iterator[None]:
    """Training mode, torch's global generators, and a hook that detaches logged numbers; all undone at the end.

    DDP waits for the gradient of every parameter that any output depends on, so numbers that are only logged must not
    depend on any.
    """

    def detach(module: nn.Module, inputs: object, numbers: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: number if name == "loss" else number.detach() for name, number in numbers.items()}

    modes = {module: module.training for module in objective.modules()}
    hook = objective.register_forward_hook(detach)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            objective.train()
            yield
    finally:
        hook.remove()
        for module, mode in modes.items():
            module.training = mode
