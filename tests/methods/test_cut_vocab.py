"""Tokens leave model, tokenizer and data together: what is left computes what it computed, and numbers about text stay
comparable.

The oracle is the dense model: its logits on kept tokens, its own encoding of every text.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from compresso.arch.base import arch_for
from compresso.core.plan import Plan
from compresso.core.row import Row
from compresso.data import nano
from compresso.errors import BudgetError, CheckpointError, DataError
from compresso.job import Job
from compresso.loading import load
from compresso.methods.cut_vocab import CutVocab
from compresso.methods.distill import Distill
from compresso.metrics.divergence import divergence, divergences, reference
from compresso.metrics.held import held_loss
from compresso.runner.final_evaluation import shared_windows
from compresso.runner.options import with_options
from compresso.runner.run import run
from tests.conftest import SHORT, Call
from tests.methods.conftest import MakeJob

CONTRACT = {"most": 60}
"""For the contract of stages: its examples use all tokens."""

TEXTS = ["The name of the cat is Tom.", "Tom has a cat. The cat has a name.", "A name is a name."]
"""Written with a handful of the embedded tokenizer's 1024 tokens."""


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """A tiny model with the embedded tokenizer and rows of TEXTS; the held-out row has a token that no other has."""
    tokenizer = AutoTokenizer.from_pretrained(nano.path())
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, 0, parameter.shape[1] ** -0.5)

    def rows(texts: list[str]) -> list[Row]:
        return [Row(input_ids=[*ids, 1], labels=[*ids, 1]) for ids in tokenizer(texts)["input_ids"]]

    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def original(dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        dense = LlamaForCausalLM(LlamaConfig.from_dict(json.loads(dense_config)))
        dense.load_state_dict(state)
        return dense.to(device, dtype).eval()

    dense_config = config.to_json_string(use_diff=False)
    return Job(
        model=model,
        arch=arch_for(config),
        tokenizer=tokenizer,
        rows=rows(TEXTS),
        held=rows(["The cat is a name", "The cat zebra"]),
        plan=Plan(),
        records={},
        identity={},
        seed=0,
        out=tmp_path,
        pad_id=2,
        quiet=True,
        original=original,
    )


def dense_of(job: Job) -> PreTrainedModel:
    assert job.original is not None
    return job.original(torch.float32, torch.device("cpu"))


def test_model_tokenizer_and_rows_stay_one(job: Job) -> None:
    dense, before = dense_of(job), list(job.rows)
    after = CutVocab()(job)
    kept = after.plan.kept["vocab"]
    assert after.tokenizer is not None and job.tokenizer is not None
    assert len(after.tokenizer) == after.model.config.vocab_size == after.model.lm_head.out_features == len(kept) < 500
    assert (
        (after.model.config.eos_token_id, after.pad_id)
        == (after.tokenizer.eos_token_id, after.tokenizer.pad_token_id)
        == (1, 2)
    )
    for text, old, new in zip(TEXTS, before, after.rows, strict=True):
        assert [kept[i] for i in new["input_ids"]] == old["input_ids"]
        assert after.tokenizer(text)["input_ids"] == new["input_ids"][:-1]
        with torch.no_grad():
            found = after.model(torch.tensor([new["input_ids"]])).logits
            torch.testing.assert_close(
                found, dense(torch.tensor([old["input_ids"]])).logits[..., list(kept)], atol=1e-5, rtol=1e-5
            )
    records = after.records["cut_vocab"]
    assert records["tokens"] == [len(kept), 1024] and records["units_kept"]["vocab"] == f"{len(kept)}/1024"
    assert records["text_left_whole"] == 1 and records["kept_share_of_blocks"] == 1
    assert records["tokens_used"] == len({i for row in before for i in row["input_ids"]})
    assert json.loads(json.dumps(records, allow_nan=False)) == records


def test_held_out_examples_are_spelled_and_counted(job: Job) -> None:
    after = CutVocab()(job)
    assert after.tokenizer is not None and job.tokenizer is not None
    assert after.dense_held == job.held and len(after.held) == 2
    assert after.records["cut_vocab"]["examples_spelled_anew"] == {"training": 0, "held": 1}
    assert after.records["cut_vocab"]["examples_dropped"] == {"training": 0, "held": 0}
    zebra = after.held[1]["input_ids"]
    assert after.tokenizer.decode(zebra) == job.tokenizer.decode(job.held[1]["input_ids"])
    assert len(zebra) > len(job.held[1]["input_ids"])


def test_losses_are_about_the_same_text_in_the_same_unit(job: Job) -> None:
    after = CutVocab()(job)
    plain, counted = held_loss(after.model, after.held), held_loss(after.model, after.held, counted_as=after.dense_held)
    assert counted.nats == plain.nats and counted.tokens == held_loss(dense_of(job), job.held).tokens
    assert counted.examples_sha256 == held_loss(dense_of(job), job.held).examples_sha256
    assert counted.mean == pytest.approx(plain.mean * sum(plain.tokens) / sum(counted.tokens))


def test_divergence_is_over_the_tokens_that_both_have(job: Job) -> None:
    """By hand: the dense model's distribution, normalised over kept tokens, is exactly the smaller model's."""
    dense, after = dense_of(job), CutVocab(most=300)(job)
    kept = after.plan.kept["vocab"]
    windows = shared_windows(job.held, kept)
    assert windows and all(set(window) <= set(kept) for window in windows)
    found = {one.name: one for one in divergence(after.model, reference(dense, windows, corpus="x"), kept=kept)}
    with torch.no_grad():
        probabilities = torch.cat([dense(torch.tensor([window])).logits[0, :-1].softmax(-1) for window in windows])
    assert found["kl"].value < 1e-6
    assert found["removed_mass"].value == pytest.approx(
        float(1 - probabilities[:, list(kept)].sum(-1).mean()), abs=1e-6
    )
    assert found["top1_agreement"].value == pytest.approx(
        float(torch.isin(probabilities.argmax(-1), torch.tensor(kept)).double().mean()), abs=1e-9
    )
    assert f"{len(kept)} of 1024" in str(found["kl"].protocol["tokens"])
    with torch.no_grad():
        after.model.lm_head.weight[3] += 1
        moved = divergence(after.model, reference(dense, windows, corpus="x"), kept=kept)[0].value
        new = {old: i for i, old in enumerate(kept)}
        logits = torch.cat([after.model(torch.tensor([[new[i] for i in window]])).logits[0, :-1] for window in windows])
    by_hand = divergences(probabilities[:, list(kept)].log(), logits.log_softmax(-1)).mean()
    assert moved == pytest.approx(float(by_hand), rel=1e-4) and moved > 1e-3
    with pytest.raises(DataError, match="hold tokens that the model does not have"):
        divergence(after.model, reference(dense, [row["input_ids"] for row in job.held], corpus="x"), kept=kept)
    with pytest.raises(DataError, match="wanted the same"):
        divergence(after.model, reference(dense, windows, corpus="x"))


def test_the_most_used_tokens_stay_under_a_limit(job: Job) -> None:
    loose = CutVocab()(job)
    few = CutVocab(threshold=0.05)(replace(job, model=dense_of(job)))
    assert set(few.plan.kept["vocab"]) < set(loose.plan.kept["vocab"])
    assert few.records["cut_vocab"]["text_left_whole"] < 1
    assert few.records["cut_vocab"]["examples_spelled_anew"]["training"] > 0


def test_filling_up_to_a_multiple(job: Job) -> None:
    after = CutVocab(multiple_of=64)(job)
    assert after.model.config.vocab_size % 64 == 0
    assert after.tokenizer is not None and after.tokenizer(TEXTS[0])["input_ids"] == after.rows[0]["input_ids"][:-1]


def test_distillation_follows(job: Job) -> None:
    """The teacher loses the same tokens, so the loss before the first update is that of equal models."""
    after = Distill(steps=1, batch=2, micro_batch=2, rank=2)(CutVocab()(job))
    assert after.records["distill"]["curve"]["loss"][0] == pytest.approx(0, abs=1e-5)


def test_without_a_tokenizer_examples_with_a_removed_token_are_dropped(make_job: MakeJob) -> None:
    job = make_job()
    after = CutVocab(most=60)(job)
    kept = after.plan.kept["vocab"]
    staying = [row for row in job.rows if set(row["input_ids"]) <= set(kept)]
    assert [[kept[i] for i in row["input_ids"]] for row in after.rows] == [row["input_ids"] for row in staying]
    assert after.records["cut_vocab"]["examples_dropped"]["training"] == len(job.rows) - len(staying) > 0
    with pytest.raises(DataError, match="hold tokens that left and have no spelling"):
        CutVocab(most=3)(make_job())
    with pytest.raises(DataError, match=r"of \d+ training examples hold tokens.*more than 20%.*--allow-dropped"):
        CutVocab(most=30)(replace(make_job(), allow_dropped=False))


def test_bad_limits_and_meaningful_tokens_are_refused(job: Job) -> None:
    with pytest.raises(BudgetError, match=r"most=100 tokens, but 259 of 1024 must be kept"):
        CutVocab(most=100)(job)
    mask = torch.ones(1024)
    mask[1] = 0
    with pytest.raises(CheckpointError, match=r"gives the tokens \[1\] a meaning"):
        job.without({"vocab": mask}, "hand")
    assert job.model.config.vocab_size == 1024 and job.model.lm_head.out_features == 1024


# Whole runs


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "domain.jsonl"
    path.write_text("".join(json.dumps({"text": TEXTS[i % 3] + f" {i}"}) + "\n" for i in range(40)))
    return path


def recipe(*sets: str) -> dict[str, object]:
    return with_options("contextual/vocab", model=str(nano.path()), max_steps=2, sets=[*SHORT, *sets])


@pytest.mark.slow
def test_a_run_writes_a_checkpoint_that_others_open(
    tiny_folder: Path, text_file: Path, tmp_path: Path, quick_reopening: None
) -> None:
    """Without updates the text is the dense model's wherever removed tokens play no part; tokenizer, ids and plan
    agree.
    """
    result = run(recipe("stages.recover.lr=0"), tiny_folder, text_file, output=tmp_path / "out", quiet=True)
    tokenizer, model = AutoTokenizer.from_pretrained(result.folder), AutoModelForCausalLM.from_pretrained(result.folder)
    dense_tokenizer, dense = (
        AutoTokenizer.from_pretrained(tiny_folder),
        AutoModelForCausalLM.from_pretrained(tiny_folder),
    )
    kept = json.loads((result.folder / "plan.json").read_text())["kept"]["vocab"]
    assert len(tokenizer) == model.config.vocab_size == len(kept) < 1024
    old, new = (t(TEXTS[0], return_tensors="pt")["input_ids"] for t in (dense_tokenizer, tokenizer))
    assert [kept[i] for i in new[0]] == old[0].tolist()
    with torch.no_grad():
        torch.testing.assert_close(model(new).logits, dense(old).logits[..., kept], atol=1e-5, rtol=1e-5)
    config = json.loads((result.folder / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (0, 1, 2)
    pruned = result.records["report"]["models"][1]
    names = {one["name"]: one["value"] for one in pruned["measurements"]}
    assert names["kl"] < 1e-6 and names["removed_mass"] > 0
    assert "kl" not in pruned["not_measured"]
    assert load(result.folder).tokenizer is not None


@pytest.mark.slow
def test_a_resumed_run_goes_on_in_the_new_vocabulary(
    tiny_folder: Path, text_file: Path, tmp_path: Path, quick_reopening: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = recipe("stages.recover.lr=0.01")
    whole = run(raw, tiny_folder, text_file, output=tmp_path / "whole", quiet=True)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="cut off"):
        patch.setattr("compresso.stage.tuning.attached", lambda *_: (_ for _ in ()).throw(RuntimeError("cut off")))
        run(raw, tiny_folder, text_file, output=tmp_path / "again", quiet=True)
    again = run(raw, tiny_folder, text_file, output=tmp_path / "again", quiet=True, resume=True)
    assert again.plan == whole.plan
    assert (
        again.tokenizer is not None
        and whole.tokenizer is not None
        and again.tokenizer.get_vocab() == whole.tokenizer.get_vocab()
    )
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    assert again.records["after"] == whole.records["after"]


def test_bad_input_is_one_line_and_exit_2(call: Call, tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    short, empty = tmp_path / "short.jsonl", tmp_path / "empty.jsonl"
    short.write_text('{"text": "The cat."}\n')
    empty.write_text('{"text": ""}\n')
    arguments = ("run", "contextual/vocab", "--model", tiny_folder, "--output", tmp_path / "out")
    cases = {
        "less than one window of 256": ("--data", short, "--set", "data.held=0"),
        "nothing to learn": ("--data", empty),
        "most=7 tokens, but 259 of 1024 must be kept": (
            "--data",
            text_file,
            "--set",
            "stages.cut_vocab.most=7",
            "--set",
            "data.pack=false",
        ),
        "needs data": (),
    }
    for message, more in cases.items():
        code, _, err = call(*arguments, *more)
        assert (code, err.count("\n")) == (2, 1), err
        assert message in err
        assert not (tmp_path / "out").exists()
    tokenizer = json.loads((tiny_folder / "tokenizer.json").read_text())
    tokenizer["model"]["dropout"] = 0.1
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    code, _, err = call(
        *arguments[:2], "--model", folder, "--output", tmp_path / "out", "--data", text_file, "--set", "data.pack=false"
    )
    assert (code, err.count("\n")) == (2, 1) and "dropout=0.1 draws its encodings" in err


def test_other_stages_do_not_take_tokens(call: Call, tiny_folder: Path) -> None:
    code, _, err = call(
        "plan",
        "magnitude-structured",
        "--model",
        tiny_folder,
        "--set",
        "stages.magnitude_structured.kinds=[channel, vocab]",
    )
    assert (code, err.count("\n")) == (2, 1) and "which only the stage 'cut_vocab' removes" in err
