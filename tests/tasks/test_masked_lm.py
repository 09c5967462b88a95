"""Masked language modelling: what is masked is what the paper says and what the seed says, scores depend on the text
alone, a base model gets a head tied to its embedding, and stages train and prune it under its own loss.
"""

import copy
import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import Call, Forked, work_of
from tests.tasks.conftest import NEUTRAL, SIZES, SPECIAL, VOCABULARY, exported, tokenizer, untrained
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM, BertModel, GPT2Config, ViTConfig

from compresso.core.loss import MASKED_TOKEN
from compresso.core.masking import Masking, masked
from compresso.core.row import Row
from compresso.data.masked import encode_masked
from compresso.data.record_forms import BadRecord
from compresso.data.records import Records, Text
from compresso.engines.encoder import encoder_parity, encoder_reference
from compresso.engines.onnx_runtime import ONNX
from compresso.errors import DataError
from compresso.job import Job
from compresso.methods.distill import Distill
from compresso.methods.gate_taylor import GateTaylor
from compresso.methods.recover import Recover
from compresso.metrics.record import Environment
from compresso.report.records import RunRecords
from compresso.runner.options import with_options
from compresso.runner.run import run
from compresso.stage import TunesLora
from compresso.stage.tuning import attached
from compresso.tasks.masked_lm import MASKED_LM
from compresso.training.distill_objective import DistillObjective
from compresso.training.masked_halves import MaskedNetwork
from compresso.training.order import Micro

MASK = len(VOCABULARY)
MASKING = Masking(MASK, MASK + 1, (0, 1, 2, 3, MASK))
WORDS = list(range(len(SPECIAL), len(VOCABULARY)))
Make = Callable[..., Job]


def masking_tokenizer() -> Any:
    made = tokenizer()
    made.add_special_tokens({"mask_token": "[MASK]"})
    return made


def texts(n: int, seed: int = 0) -> list[str]:
    """Texts in which each word says which comes next."""
    draw = random.Random(seed)
    starts = [(draw.randrange(len(NEUTRAL)), draw.randint(6, 14)) for _ in range(n)]
    return [" ".join(NEUTRAL[(start + i) % len(NEUTRAL)] for i in range(length)) for start, length in starts]


def encoded(lines: list[str], **how: Any) -> Any:
    return encode_masked(Records("text", [Text(line) for line in lines], "t"), masking_tokenizer(), **how)


def original(row: Row) -> list[int]:
    return [seen if label == -100 else label for seen, label in zip(row["input_ids"], row["labels"], strict=True)]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a base model whose tokenizer has a mask."""
    folder = tmp_path_factory.mktemp("models") / "base"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(BertConfig(**SIZES | {"vocab_size": MASK + 1})).save_pretrained(folder)
    masking_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of texts of one word each, which is learned in seconds."""
    path, draw = tmp_path_factory.mktemp("data") / "lines.jsonl", random.Random(0)
    made = [" ".join([draw.choice(NEUTRAL[:4])] * draw.randint(6, 14)) for _ in range(240)]
    path.write_text("".join(json.dumps({"text": one}) + "\n" for one in made))
    return path


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """make(): a job of a masked language model with random weights large enough to tell units apart."""

    def _make() -> Job:
        return untrained(
            BertForMaskedLM(BertConfig(**SIZES | {"vocab_size": MASK + 1})).eval(),
            encoded(texts(24), max_length=32).rows,
            MASKED_LM,
            tmp_path / "work",
        )

    return _make


def test_shares_are_those_of_the_paper() -> None:
    """Of 15 % of the words: 80 % the mask, 10 % another word, 10 % themselves; special tokens stay."""
    draw = random.Random(0)
    ids = [2, *(draw.choice(WORDS) for _ in range(40_000)), 3]
    seen, labels = masked(ids, MASKING, seed=1)
    asked = [place for place, label in enumerate(labels) if label != -100]
    assert len(asked) == round(0.15 * 40_000) and all(labels[place] == ids[place] for place in asked)
    assert all(a == b for place, (a, b) in enumerate(zip(seen, ids, strict=True)) if labels[place] == -100)
    fates = Counter("mask" if seen[p] == MASK else "same" if seen[p] == ids[p] else "other" for p in asked)
    assert fates["mask"] / len(asked) == pytest.approx(0.8, abs=0.02)
    assert fates["other"] / len(asked) == pytest.approx(0.1 * (1 - 1 / len(WORDS)), abs=0.015)
    others = Counter(seen[p] for p in asked if seen[p] not in (MASK, ids[p]))
    assert set(others) == set(WORDS)  # every word, and none but words


@pytest.mark.parametrize("n", [1, 2, 3, 10])
def test_a_short_text_is_asked_for_one_word_at_least(n: int) -> None:
    _, labels = masked([2, *WORDS[:n], 3], MASKING, seed=0)
    assert sum(label != -100 for label in labels) == max(1, round(0.15 * n))
    with pytest.raises(ValueError, match="none of 3 tokens may be masked"):
        masked([2, 1, 3], MASKING, seed=0)


def test_masks_as_read_depend_on_the_text_alone_and_are_drawn_anew_by_a_seed() -> None:
    lines = texts(20)
    rows = encoded(lines, max_length=32).rows
    turned = encoded(lines[::-1], max_length=32).rows[::-1]
    assert rows == turned
    again = [MASKED_LM.again(row, seed) for row in rows for seed in (1, 1, 2)]
    assert again[::3] == again[1::3] and all(a != b for a, b in zip(again[::3], again[2::3], strict=True))
    assert [original(row) for row in again[::3]] == [original(row) for row in rows]
    assert all(set(a) >= {"source", "masking"} for a in again)


def test_an_update_sees_the_same_masks_again_and_other_ones_in_the_next_pass(make: Make) -> None:
    job = make()
    batches, others = job.batches(6, "any"), replace(job, seed=1).batches(6, "any")
    first, same, split = batches.at(0, range(6)), batches.at(0, range(6)), batches.at(0, range(3, 6))
    assert torch.equal(first["labels"], same["labels"])
    width = split["labels"].shape[1]
    assert torch.equal(first["labels"][3:, :width], split["labels"])
    n = len(job.rows)
    passes: list[list[tuple[tuple[int, ...], tuple[bool, ...]]]] = []  # texts and where they are masked
    for number in range(2):
        made = [batches.at(update, range(6)) for update in range(number * n // 6, (number + 1) * n // 6)]
        shown = [
            (ids.where(label == -100, label)[real == 1], (label != -100)[real == 1])
            for one in made
            for ids, label, real in zip(one["input_ids"], one["labels"], one["attention_mask"], strict=True)
        ]
        passes.append(sorted((tuple(text.tolist()), tuple(asked.tolist())) for text, asked in shown))
    texts_of = [[text for text, _ in one] for one in passes]
    assert texts_of[0] == texts_of[1] == sorted(tuple(original(row)) for row in job.rows)  # each text once a pass
    assert sum(a != b for a, b in zip(*passes, strict=True)) > n / 2
    assert not torch.equal(others.at(0, range(6))["input_ids"], first["input_ids"])


def test_texts_are_cut_or_packed_into_full_rows() -> None:
    lines = texts(12)
    whole = masking_tokenizer()(lines)["input_ids"]
    cut = encoded(lines, max_length=8)
    assert [original(row) for row in cut.rows] == [[*ids[:7], 3] if len(ids) > 8 else ids for ids in whole]
    assert cut.stats.truncated == sum(len(ids) > 8 for ids in whole)
    assert cut.stats.cut_tokens == sum(max(len(ids) - 8, 0) for ids in whole)
    packed = encoded(lines, max_length=10, pack=True)
    assert all(len(row["input_ids"]) == 10 for row in packed.rows[:-1])
    assert all(original(row)[0] == 2 and original(row)[-1] == 3 for row in packed.rows)
    inside = [original(row)[1:-1] for row in packed.rows]
    assert [one for row in inside for one in row if one != 3] == [one for ids in whole for one in ids[1:-1]]
    ends = sum(row.count(3) for row in inside)
    assert len(whole) - 1 - len(inside) <= ends <= len(whole) - 1  # none where a text ends with its row
    assert len(encoded(lines, max_length=8, limit=5).rows) == 5


def test_what_cannot_be_masked_says_so() -> None:
    records = Records("text", [Text("w1 w2")], "t")
    for given, how, said in (
        (tokenizer(), {"max_length": 8}, "the tokenizer has no mask token"),
        (masking_tokenizer(), {"max_length": 8, "vocab_size": MASK}, f"has the id {MASK}, the vocabulary has {MASK}"),
        (masking_tokenizer(), {"max_length": 2}, "max_length=2: wanted at least 3"),
    ):
        with pytest.raises(DataError, match=said):
            encode_masked(records, given, **how)
    with pytest.raises(DataError, match="nothing to guess in 2 records, 1 of them empty"):
        encoded(["unheard", " "], max_length=8)
    assert MASKED_LM.obstacle(BertConfig()) == ""
    assert "--task masked-lm takes an encoder" in MASKED_LM.obstacle(GPT2Config())
    assert "reads no text" in MASKED_LM.obstacle(ViTConfig())


def test_the_loss_is_the_models_own_and_the_score_its_parts(make: Make) -> None:
    job = make()
    given = job.collated(job.held)
    with torch.no_grad():
        wanted = job.model(**given)
    torch.testing.assert_close(MASKED_TOKEN(job.model, given), wanted.loss)
    torch.testing.assert_close(MASKED_TOKEN.mean(wanted.logits, given["labels"]), wanted.loss)
    seen: list[torch.Size] = []
    handle = job.model.cls.predictions.decoder.register_forward_hook(lambda *made: seen.append(made[-1].shape))
    adapted = attached(job, TunesLora(rank=2)).eval()
    torch.testing.assert_close(MASKED_TOKEN(adapted, given).detach(), wanted.loss)
    handle.remove()
    assert seen == [torch.Size([int((given["labels"] != -100).sum()), MASK + 1])]  # no other logits are made
    assert MASKED_TOKEN.terms(given["labels"]) == int((given["labels"] != -100).sum())
    found = MASKED_LM.score(job.model, job.held)
    assert found.mean == pytest.approx(float(wanted.loss), rel=1e-5)
    asked = given["labels"] != -100
    hits = (wanted.logits.argmax(-1) == given["labels"])[asked].float()
    assert found.accuracy == pytest.approx(float(hits.mean()))
    perplexity, accuracy = found.measurements(Environment.here(), "t")
    assert perplexity.name == MASKED_LM.metric and perplexity.stderr is not None and accuracy.stderr is not None
    assert perplexity.value == pytest.approx(float(wanted.loss.exp()), rel=1e-5) and accuracy.unit == "share"


@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM])
def test_a_new_head_decodes_by_the_embedding_and_the_encoder_stays(kind: type) -> None:
    torch.manual_seed(0)
    model = kind(BertConfig(**SIZES, tie_word_embeddings=True)).eval()
    encoder = {name: value.clone() for name, value in model.base_model.state_dict().items() if "pooler" not in name}
    made, other = (MASKED_LM.with_head(copy.deepcopy(model), (), seed) for seed in (0, 1))
    assert isinstance(made, BertForMaskedLM) and not made.training
    assert made.cls.predictions.decoder.weight is made.bert.embeddings.word_embeddings.weight
    state = made.state_dict()
    assert {name.removeprefix("bert.") for name in state if name.startswith("bert.")} == set(encoder)  # no pooler
    assert all(torch.equal(state[f"bert.{name}"], value) for name, value in encoder.items())
    dense = "cls.predictions.transform.dense.weight"
    assert not torch.equal(state[dense], other.state_dict()[dense])
    assert made.num_parameters() == sum(p.numel() for p in encoder.values()) + 32 * 32 + 32 + 2 * 32 + len(VOCABULARY)


def test_halves_are_the_whole_and_a_student_is_taught_where_it_is_asked(make: Make) -> None:
    job = make()
    given = job.collated(job.rows[:4])
    MaskedNetwork(job.model).check()
    teacher = copy.deepcopy(job.model)
    with torch.no_grad():
        teacher.cls.predictions.transform.dense.weight.mul_(-1)
        p, q = (m(**given).logits[given["labels"] != -100].log_softmax(-1) for m in (teacher, job.model))
        wanted = (p.exp() * (p - q)).sum(-1).mean()
    made = DistillObjective(
        job.model, MASKED_LM.halves(job.model, []), MASKED_LM.halves(teacher, []), compare=MASKED_LM.compare
    )
    assert made(given, Micro(0, 0, range(4)))["loss"].item() == pytest.approx(float(wanted), rel=1e-4)
    everywhere = MASKED_LM.compare(given, "all")
    assert int(everywhere.places.sum()) == int(given["attention_mask"].sum()) == int(everywhere.states.sum())


@pytest.mark.parametrize(
    "stage",
    [
        GateTaylor(keep=0.7, batches=1, batch=4, kinds=("head", "channel")),
        Recover(steps=2, batch=4, micro_batch=2, rank=2),
        Distill(steps=2, batch=4, micro_batch=2, train="all", intermediate_weight=1.0),
    ],
    ids=lambda stage: type(stage).__name__,
)
def test_stages_for_any_task_train_and_prune_it(stage: Any, make: Make) -> None:
    job = make()
    dense = copy.deepcopy(job.model)
    before = {name: value.clone() for name, value in job.model.state_dict().items()}
    job = replace(job, original=lambda dtype, device: copy.deepcopy(dense).to(device, dtype))
    state = stage(job).model.state_dict()
    assert any(
        state[name].shape != value.shape or not torch.equal(state[name], value) for name, value in before.items()
    )
    assert all(bool(value.isfinite().all()) for value in state.values())


SETS = (
    *("stages.finetune.steps=150", "stages.finetune.lr=1.0e-2", "stages.finetune.save_every=20"),
    *("stages.gate_taylor.batches=2", "stages.recover.rank=4", "stages.recover.save_every=5"),
    *("stages.recover.steps=10", "stages.recover.lr=1.0e-3", "stages.recover.lr_at_hidden=null"),
)


def outcome(output: Path) -> str:
    return hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="session")
def pruned(base: Path, lines: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result of a run that begins with a base model."""
    output = tmp_path_factory.mktemp("runs") / "masked"
    raw = with_options("gate-taylor", model=str(base), task="masked-lm", keep=0.8, sets=SETS)
    run(raw, base, lines, output=output, quiet=True)
    return output


@pytest.mark.slow
def test_a_run_makes_a_head_trains_prunes_and_tells_perplexity_and_accuracy(pruned: Path) -> None:
    records = RunRecords.checked(json.loads((pruned / "records.json").read_text()), "records")
    assert [*records.recipe.knobs()] == ["finetune", "gate_taylor", "recover"]
    assert json.loads((pruned / "records.json").read_text())["stages"]["finetune"]["new_head"] == [MASKED_LM.head]
    for one in records.report.models:
        (perplexity,) = [number for number in one.measurements if number.name == MASKED_LM.metric]
        (accuracy,) = [number for number in one.measurements if number.name == "held-masked/acc"]
        assert perplexity.value < 3.5 and accuracy.value > 0.45 and accuracy.stderr is not None  # of 4 words
    assert records.guard.verdict == "ok" and {one.name for one in records.guard.checks} == {"perplexity_growth", "loss"}
    model, info = AutoModelForMaskedLM.from_pretrained(pruned, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and model.config.intermediate_size < 48
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    card, page = (pruned / "README.md").read_text(), (pruned / "report.html").read_text()
    assert "pipeline_tag: fill-mask" in card and "held-masked" in card and "±" in card
    assert "held-masked" in page and "fill.tokenizer.mask_token" in page


@pytest.mark.slow
def test_killed_a_run_ends_in_the_same_bytes(
    base: Path, lines: Path, pruned: Path, forked: Forked, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    sets = [part for one in SETS for part in ("--set", one)]
    given = ["--model", str(base), "--task", "masked-lm", "--data", str(lines), "--keep", "0.8"]
    command = ["run", "gate-taylor", *given, "--output", str(output), *sets]
    assert forked(command, event="kill", phase="finetune", at=45)[0] == -9
    assert (work_of(output) / "training" / "finetune" / "step-000040").is_dir()
    code, log = forked([*command, "--resume"])
    assert code == 0, log
    assert outcome(output) == outcome(pruned)


@pytest.mark.slow
@pytest.mark.engines
def test_onnx_computes_the_same_in_the_engines(pruned: Path, call: Call, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    live = exported(call, pruned, tmp_path / "onnx")
    with torch.no_grad():
        live.get_parameter("cls.predictions.bias").add_(1)
    assert encoder_parity(ONNX, tmp_path / "onnx", encoder_reference(live, None)).opens == "no"


@pytest.mark.slow
def test_evaluate_asks_every_time_the_same(pruned: Path, lines: Path, call: Call) -> None:
    given = ("evaluate", pruned, "--task", "masked-lm", "--data", lines, "--limit", 40, "--json")
    (code, out, _), (_, again, _) = call(*given), call(*given)
    numbers, others = (json.loads(one)["models"][0]["measurements"] for one in (out, again))
    assert code == 0 and [one["name"] for one in numbers] == ["lines-masked/perplexity", "lines-masked/acc"]
    assert [one["value"] for one in numbers] == [one["value"] for one in others]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--model", "LLAMA"), "is a causal language model; --task masked-lm takes an encoder"),
        (("--model", "MASKLESS"), "the tokenizer has no mask token"),
        (("--data", "ASKED"), "holds a record of kind instruction; wanted text, content or sentence"),
        (("--data", "OTHER"), "fields are: words; wanted"),
    ],
)
def test_what_cannot_work_is_refused_in_a_line(
    more: tuple[str, str], said: str, base: Path, bert: Path, lines: Path, tiny_folder: Path, call: Call, tmp_path: Path
) -> None:
    asked, other = tmp_path / "asked.jsonl", tmp_path / "other.jsonl"
    asked.write_text('{"instruction": "w1", "output": "w2"}\n' * 40)
    other.write_text('{"words": "w1"}\n' * 40)
    named = {"LLAMA": tiny_folder, "MASKLESS": bert, "ASKED": asked, "OTHER": other}
    given = {"--model": base, "--task": "masked-lm", "--data": lines, "--output": tmp_path / "out"}
    given |= {more[0]: named[more[1]]}
    code, out, error = call("run", "gate-taylor", *(part for pair in given.items() for part in pair))
    assert (code, out) == (2, "") and len(error.splitlines()) == 1 and said in error


def test_a_plan_says_that_the_head_is_new(base: Path, call: Call) -> None:
    code, out, _ = call("plan", "gate-taylor", "--model", base, "--task", "masked-lm", "--json")
    assert code == 0 and any(MASKED_LM.head in note for note in json.loads(out)["notes"])


def test_only_the_columns_that_it_takes_are_wanted() -> None:
    """Those of instructions are refused, too, and named nowhere."""
    for row in ({"id": 1, "title": "t", "context": "c"}, {"instruction": "i", "output": "o"}):
        with pytest.raises(BadRecord) as caught:
            MASKED_LM.form.take(row)
        assert str(caught.value).endswith("; wanted text, content or sentence, which hold plain text")
