"""The loop on small objectives, in one process: what an update is, what is skipped, what is left as it was."""

import io
import math
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from compresso.errors import CompressoError, Interrupted, NumericError, ResourceError, ResumeError
from compresso.training.checkpoint import TrainingCheckpoints
from compresso.training.fit import MOST_SKIPS, fit
from compresso.training.groups import Group
from compresso.training.history import History
from compresso.training.order import Micro, ShuffledBatches
from compresso.training.progress import Progress


class Line(nn.Module):
    """Least squares with dropout, and a multiplier that takes part from update 2 on."""

    def __init__(self, dropout: float = 0.0, break_at: Mapping[int, str] | None = None) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.5, -0.5, 0.25]))
        self.multiplier = nn.Parameter(torch.zeros(1))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.dropout = nn.Dropout(dropout)
        self.break_at = break_at or {}
        self.micros: list[Micro] = []

    def forward(self, batch: dict[str, Tensor], micro: Micro) -> dict[str, Tensor]:
        self.micros.append(micro)
        guess = self.dropout(batch["x"]) @ (self.w * self.frozen)
        loss = (guess - batch["y"]).square().mean()
        size = self.w.square().sum()
        if micro.update >= 2:
            loss = loss + self.multiplier[0] * (size - 1)
        how = self.break_at.get(micro.update)
        if how == "loss":
            loss = loss * math.nan
        if how == "gradient":
            loss = loss + (self.w[0] * 0).abs().sqrt()
        return {"loss": loss, "size": size}

    def groups(self, **how: object) -> list[Group]:
        return [Group("w", [self.w], lr=0.05, **how), Group("multiplier", [self.multiplier], lr=0.1, ascend=True)]  # pyright: ignore


def data(global_batch: int = 4) -> ShuffledBatches:
    generator = torch.Generator().manual_seed(0)
    rows = [(x, x @ torch.tensor([1.0, 2.0, -1.0])) for x in torch.randn(10, 3, generator=generator)]
    return ShuffledBatches(
        rows,
        global_batch,
        lambda some: {"x": torch.stack([x for x, _ in some]), "y": torch.stack([y for _, y in some])},
        seed=1,
    )


def train(line: Line, steps: int = 6, **how: object) -> History:
    return fit(line, line.groups(), data(), steps, **{"seed": 3, "device": "cpu"} | how)  # pyright: ignore


def weights(line: Line) -> list[Tensor]:
    return [line.w.detach().clone(), line.multiplier.detach().clone()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_loop_is_the_plain_loop():
    """Oracle: the same updates written out with torch's own optimizers."""
    line, plain = Line(), Line()
    history = train(line, accumulation=2)
    descend = torch.optim.AdamW([plain.w], lr=0.05, weight_decay=0.0)
    ascend = torch.optim.AdamW([plain.multiplier], lr=0.1, weight_decay=0.0, maximize=True)
    source, losses = data(), []
    for update in range(6):
        halves = [
            plain(source.at(update, rows), Micro(update, i, rows)) for i, rows in enumerate((range(2), range(2, 4)))
        ]
        loss = sum(half["loss"] for half in halves) / 2
        loss.backward()
        descend.step()
        ascend.step()
        descend.zero_grad()
        ascend.zero_grad()
        losses.append(loss.item())
    for mine, other in zip(weights(line), weights(plain), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(history.column("loss"), losses, rtol=1e-5, atol=1e-7)
    assert [row["update"] for row in history.rows] == list(range(6))
    assert [m.slot for m in line.micros[:4]] == [0, 1, 0, 1] and [m.rows for m in line.micros[:2]] == [
        range(2),
        range(2, 4),
    ]


def test_accumulation_equals_the_whole_batch():
    once, twice, four = Line(), Line(), Line()
    train(once)
    train(twice, accumulation=2)
    train(four, accumulation=4)
    for a, b, c in zip(weights(once), weights(twice), weights(four), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_the_gradient_of_an_update_is_that_of_its_whole_batch(accumulation: int):
    """In closed form. AdamW forgets the scale of a gradient, so weights after training do not show it; a clip and
    scores do.
    """
    line, seen = Line(), list[Tensor]()

    def before(update: int) -> None:
        assert line.w.grad is not None
        seen.append(line.w.grad.clone())

    batch, w = data().at(0, range(4)), line.w.detach().clone()
    train(line, 1, accumulation=accumulation, before_step=before)
    torch.testing.assert_close(seen, [2 / 4 * batch["x"].T @ (batch["x"] @ w - batch["y"])])


def test_a_group_outside_its_phase_has_no_gradient_and_does_not_move():
    line = Line()
    grads: list[bool] = []
    train(line, 2, after_update=lambda update: grads.append(line.multiplier.grad is None))
    assert grads == [True, True] and torch.equal(line.multiplier, torch.zeros(1))
    train(line, 4, after_update=lambda update: grads.append(line.multiplier.grad is None))
    assert grads[2:] == [True, True, False, False] and not torch.equal(line.multiplier, torch.zeros(1))


def test_after_update_sees_the_step_and_its_gradient_and_is_logged():
    line = Line()
    seen: list[tuple[int, float]] = []

    @torch.no_grad()
    def clamp(update: int) -> dict[str, float]:
        assert line.w.grad is not None
        line.w.clamp_(-0.5, 0.5)
        seen.append((update, float(line.w.abs().max())))
        return {"largest": float(line.w.abs().max())}

    history = train(line, after_update=clamp)
    assert [update for update, _ in seen] == list(range(6)) and max(largest for _, largest in seen) == 0.5
    assert history.column("largest") == [largest for _, largest in seen]
    assert line.w.grad is None


def test_before_step_sees_the_whole_gradient_before_the_clip_and_the_step():
    line, whole, clipped = Line(), list[torch.Tensor](), list[torch.Tensor]()
    start = line.w.detach().clone()

    def before(update: int) -> None:
        assert line.w.grad is not None
        assert update or torch.equal(line.w, start)
        whole.append(line.w.grad.clone())

    def after(update: int) -> None:
        assert line.w.grad is not None
        clipped.append(line.w.grad.clone())

    fit(line, line.groups(clip=1e-3), data(), 3, seed=3, device="cpu", before_step=before, after_update=after)
    assert len(whole) == 3 and float(whole[0].norm()) > 1e-3
    for one, other in zip(whole, clipped, strict=True):
        torch.testing.assert_close(other, one * (1e-3 / one.norm()), rtol=1e-4, atol=0)


def test_schedules_count_updates():
    asked: list[int] = []
    line = Line()

    def schedule(update: int) -> float:
        asked.append(update)
        return 1.0 if update < 3 else 0.0

    states: list[Tensor] = []
    fit(
        line,
        line.groups(schedule=schedule),
        data(),
        5,
        seed=3,
        device="cpu",
        accumulation=2,
        after_update=lambda update: states.append(line.w.detach().clone()),
    )
    assert asked == [0, 1, 2, 3, 4]
    assert not torch.equal(states[1], states[2]) and torch.equal(states[2], states[4])


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_an_update_that_is_not_finite_is_skipped_whole(how: str, tmp_path: Path):
    line, checkpoints, called = (
        Line(break_at={1: how, 3: how, 4: how}),
        TrainingCheckpoints(tmp_path, keep=9),
        list[int](),
    )
    seen = list[int]()
    history = train(line, 6, checkpoints=checkpoints, save_every=1, before_step=seen.append, after_update=called.append)
    assert history.skipped == [1, 3, 4] and seen == called == [0, 2, 5] == [row["update"] for row in history.rows]
    saved = [checkpoints.load(tmp_path / f"step-{n:06d}").tensors for n in range(1, 7)]
    assert all(t.isfinite().all() for tensors in saved for t in tensors.values())
    for before, after in ((0, 1), (2, 3), (3, 4)):
        assert saved[before].keys() == saved[after].keys()
        assert all(torch.equal(saved[before][name], saved[after][name]) for name in saved[before])
    assert saved[5]["optimizer/w/step"] == 3


def test_too_many_skips_end_the_run_and_go_back_to_the_last_checkpoint(tmp_path: Path):
    broken = dict.fromkeys(range(5, 9), "loss")
    good, line, checkpoints = Line(), Line(break_at=broken), TrainingCheckpoints(tmp_path)
    train(good, 4)
    with pytest.raises(
        NumericError, match=r"update 7: loss nan; 3 updates in a row .* put back to update 4; lower the learning rate"
    ) as stop:
        train(line, 20, checkpoints=checkpoints, save_every=4)
    assert equal(weights(line), weights(good)) and stop.value.exit_code == 4 and MOST_SKIPS == 3
    path = checkpoints.latest()
    assert path == tmp_path / "step-000004"


def test_too_many_skips_without_checkpoints():
    with pytest.raises(NumericError, match=r"update 2: .*no checkpoint to go back to"):
        train(Line(break_at={0: "gradient", 1: "loss", 2: "gradient"}))


def test_nan_made_after_the_update_never_reaches_the_disk(tmp_path: Path):
    line = Line()

    @torch.no_grad()
    def poison(update: int) -> None:
        if update == 3:
            line.multiplier.fill_(math.nan)

    with pytest.raises(
        NumericError, match=r"param/multiplier holds NaN or Inf after 4 updates, so no checkpoint was written"
    ):
        train(line, checkpoints=TrainingCheckpoints(tmp_path), save_every=2, after_update=poison)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000002"]


def stopping(at: int) -> Callable[[int], None]:
    def after_update(update: int) -> None:
        if update == at:
            raise RuntimeError("stopped by the test")

    return after_update


@pytest.mark.parametrize("at", range(2, 6))
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(tmp_path: Path, at: int):
    """Dropout, optimizer, data order and phases included; update 1 was skipped."""
    whole, cut, resumed = (Line(dropout=0.5, break_at={1: "loss"}) for _ in range(3))
    wanted = train(whole, checkpoints=TrainingCheckpoints(tmp_path / "whole"))
    with pytest.raises(RuntimeError, match="stopped by the test"):
        train(cut, checkpoints=TrainingCheckpoints(tmp_path / "cut"), save_every=2, after_update=stopping(at))
    torch.manual_seed(at)  # whatever the new process did before must not matter
    with torch.no_grad():
        resumed.w.fill_(9.0)
    found = train(resumed, checkpoints=TrainingCheckpoints(tmp_path / "cut"), save_every=2)
    assert found == wanted and equal(weights(resumed), weights(whole))
    assert len(resumed.micros) == 6 - at // 2 * 2


def test_a_finished_run_is_not_repeated(tmp_path: Path):
    line, again = Line(), Line()
    wanted = train(line, checkpoints=TrainingCheckpoints(tmp_path))
    assert train(again, checkpoints=TrainingCheckpoints(tmp_path)) == wanted
    assert again.micros == [] and equal(weights(line), weights(again))


def test_a_damaged_newest_checkpoint_costs_some_updates_only(tmp_path: Path):
    whole, cut, resumed = Line(), Line(), Line()
    wanted = train(whole)
    with pytest.raises(RuntimeError):
        train(cut, checkpoints=TrainingCheckpoints(tmp_path), save_every=2, after_update=stopping(5))
    (tmp_path / "step-000004" / "manifest.json").unlink()
    checkpoints = TrainingCheckpoints(tmp_path)
    assert train(resumed, checkpoints=checkpoints, save_every=2) == wanted
    assert equal(weights(resumed), weights(whole)) and len(resumed.micros) == 4 and len(checkpoints.notes) == 1


def test_a_changed_run_is_refused_and_left_untouched(tmp_path: Path):
    train(Line(), checkpoints=TrainingCheckpoints(tmp_path, {"model": "a", "version": 1}))
    line = Line()
    before = weights(line)
    with pytest.raises(ResumeError) as refusal:
        fit(
            line,
            line.groups(clip=2.0),
            data(8),
            7,
            seed=4,
            device="cpu",
            accumulation=2,
            precision="bf16",
            checkpoints=TrainingCheckpoints(tmp_path, {"model": "b", "version": 1}),
        )
    for part in (
        "model was 'a', is 'b'",
        "fit.seed was 3, is 4",
        "fit.steps was 6, is 7",
        "fit.global_batch was 4, is 8",
        "fit.micro_batches was 1, is 2",
        "fit.precision was 'no', is 'bf16'",
        "fit.groups.w.clip was None, is 2.0",
    ):
        assert part in str(refusal.value)
    assert "version" not in str(refusal.value) and equal(before, weights(line))


def test_a_checkpoint_of_a_different_module_is_refused(tmp_path: Path):
    class Other(Line):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(1))

    train(Line(), checkpoints=TrainingCheckpoints(tmp_path))
    with pytest.raises(
        ResumeError, match="1 tensors are only in the checkpoint or only in the model, the first is buffer/scale"
    ):
        train(Other(), checkpoints=TrainingCheckpoints(tmp_path))


def test_buffers_are_part_of_the_state(tmp_path: Path):
    class Counting(Line):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

        def forward(self, batch: dict[str, Tensor], micro: Micro) -> dict[str, Tensor]:
            self.seen += 1
            return super().forward(batch, micro)

    resumed = Counting()
    with pytest.raises(RuntimeError):
        train(Counting(), checkpoints=TrainingCheckpoints(tmp_path), save_every=2, after_update=stopping(3))
    train(resumed, checkpoints=TrainingCheckpoints(tmp_path), save_every=2)
    assert resumed.seen == 6


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [2, 5])
def test_a_signal_saves_at_the_end_of_the_update_and_stops(tmp_path: Path, number: signal.Signals, at: int):
    whole, cut, resumed = Line(), Line(), Line()
    wanted = train(whole)
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]

    def kick(update: int) -> None:
        if update == at:
            signal.raise_signal(number)

    # the signal comes after the update's flags were summed, so one more update is done if there is one
    done = min(at + 2, 6)
    with pytest.raises(Interrupted) as stop:
        train(cut, checkpoints=TrainingCheckpoints(tmp_path), after_update=kick)
    assert stop.value.code == 128 + number and stop.value.signal == number
    assert str(stop.value) == f"stopped by {number.name}; continue from {tmp_path / f'step-{done:06d}'}"
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert train(resumed, checkpoints=TrainingCheckpoints(tmp_path)) == wanted and equal(
        weights(resumed), weights(whole)
    )
    assert len(resumed.micros) == 6 - done


def test_a_signal_stops_a_run_without_checkpoints():
    with pytest.raises(Interrupted, match="stopped by SIGTERM; nothing was saved"):
        train(Line(), after_update=lambda update: signal.raise_signal(signal.SIGTERM) if update == 0 else None)


def test_what_is_within_a_long_update_is_told():
    """Which micro-batch it is at, and, once, that a signal is obeyed at its end."""
    stream = io.StringIO()

    class Slow(Line):
        def forward(self, batch: dict[str, Tensor], micro: Micro) -> dict[str, Tensor]:
            if micro.update == 1 and len(self.micros) % 4 == 1:
                signal.raise_signal(signal.SIGTERM)
            if micro.update == 1 and len(self.micros) % 4 == 3:
                until = time.monotonic() + 60
                while "working" not in stream.getvalue() and time.monotonic() < until:
                    time.sleep(0.005)
            return super().forward(batch, micro)

    with pytest.raises(Interrupted):
        train(Slow(), accumulation=4, phase=lambda _: "slow", progress=Progress("lines", 0.05, stream))
    (told,) = [line for line in stream.getvalue().splitlines() if "SIGTERM" in line]
    assert told == "SIGTERM: the update is finished and saved before the run stops; once more stops it at once"
    (first, *_) = [line for line in stream.getvalue().splitlines() if "working" in line]
    assert first.startswith("slow  1/6") and ", 3 of 4 micro-batches of the next update, working for 0:00:0" in first
    assert first.endswith(" left")


def test_the_process_is_left_as_it_was():
    line = Line(dropout=0.5)
    line.eval()
    torch.manual_seed(5)
    generator = torch.get_rng_state()
    keys = set(vars(line))
    train(line)
    assert torch.equal(generator, torch.get_rng_state())
    assert not any(m.training for m in line.modules())
    assert set(vars(line)) == keys and "forward" not in vars(line) and not line._forward_hooks
    assert torch.equal(line.frozen, torch.ones(3)) and line.w.grad is None


def test_dropout_depends_on_the_seed_alone():
    one, two, other = Line(dropout=0.5), Line(dropout=0.5), Line(dropout=0.5)
    torch.manual_seed(1)
    train(one)
    torch.manual_seed(2)
    train(two)
    train(other, seed=4)
    assert equal(weights(one), weights(two)) and not equal(weights(one), weights(other))


def test_bf16_computes_under_autocast_and_keeps_parameters():
    kinds: list[torch.dtype] = []

    class Linear(Line):
        def forward(self, batch: dict[str, Tensor], micro: Micro) -> dict[str, Tensor]:
            kinds.append((batch["x"] @ self.w[:, None]).dtype)
            return super().forward(batch, micro)

    exact, line = Linear(), Linear()
    train(exact, 1)
    train(line, 1, precision="bf16")
    assert kinds == [torch.float32, torch.bfloat16] and line.w.dtype == torch.float32


@pytest.mark.parametrize(
    ("numbers", "message"),
    [({}, r"returned \[\] at update 0; wanted 'loss'"), ({"a": 1}, r"returned \['a'\]")],
)
def test_an_objective_without_a_loss_is_refused(numbers: dict[str, int], message: str):
    class Bad(Line):
        def forward(self, batch: dict[str, Tensor], micro: Micro) -> dict[str, Tensor]:
            return {name: torch.tensor(float(number)) for name, number in numbers.items()}

    with pytest.raises(CompressoError, match=message):
        train(Bad())


def test_what_cannot_be_trained_is_refused_before_anything_moves(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(CompressoError, match="cannot be split over 1 processes x 3 micro-batches"):
        train(Line(), accumulation=3)
    line = Line()
    with pytest.raises(CompressoError, match="are in no group"):
        fit(line, line.groups()[:1], data(), 2, seed=0, device="cpu")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ResourceError, match="one process was launched"):
        train(line)


def test_an_earlier_use_of_accelerate_in_this_process_does_not_decide():
    wanted, line = Line(), Line()
    train(wanted)
    AcceleratorState._reset_state(reset_partial_state=True)
    Accelerator(cpu=True, mixed_precision="bf16")
    train(line)
    assert equal(weights(line), weights(wanted))


def test_one_objective_can_be_trained_again_in_another_way():
    line = Line()
    train(line, 2, precision="bf16")
    before = weights(line)
    train(line, 2)
    assert not equal(before, weights(line))
