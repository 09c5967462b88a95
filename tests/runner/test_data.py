"""What a run reads: it stops where too much is lost, says what was passed over everywhere, and checks tokens that do
not come from the data.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.conftest import Call
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import compresso
from compresso.data import nano
from compresso.data.prompt import collaborative_prompt
from compresso.errors import DataError, RecipeError
from compresso.runner import plan as planning
from compresso.runner.plan import plan
from compresso.runner.preflight import Prepared, prepare
from compresso.runner.recipe import build, read
from compresso.runner.run import run

Row = dict[str, Any]
ALPACA: list[Row] = [{"instruction": f"Say {i}", "input": "", "output": f"It is {i}."} for i in range(80)]
TALKS: list[Row] = [{**row, "system": "You are a pirate.", "history": [["One?", "Arr."]], "id": 7} for row in ALPACA]
TRAINS = {
    "name": "trains",
    "data": {"prompt": False, "held": 4},
    "stages": [{"recover": {"steps": "2 epochs", "batch": 16}}],
}
SWEEPS = {"name": "sweeps", "data": {"prompt": False, "held": 4}, "stages": [{"wanda": {"sparsity": 0.5}}]}
MISTRAL = (
    "{%- if messages[0].role == 'system' %}{%- set sys = messages[0].content %}{%- set rest = messages[1:] %}"
    "{%- else %}{%- set rest = messages %}{%- endif %}{{ bos_token }}{%- for m in rest %}{%- if m.role == 'user' %}"
    "{%- if loop.last and sys is defined %}{{ '[INST] ' + sys + '\n\n' + m.content + '[/INST]' }}"
    "{%- else %}{{ '[INST] ' + m.content + '[/INST]' }}{%- endif %}{%- else %}{{ ' ' + m.content + eos_token }}"
    "{%- endif %}{%- endfor %}"
)


@pytest.fixture
def rows(tmp_path: Path) -> Callable[..., Path]:
    """rows(rows): a file of them."""

    def _rows(given: list[Row], name: str = "d.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in given))
        return path

    return _rows


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """small(context=.., **of_tokenizer): a tiny model in a folder, its tokenizer changed."""

    def _small(context: int = 1024, vocab: int = 1024, **changed: Any) -> Path:
        folder = tmp_path_factory.mktemp("models") / "small"
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=vocab, max_position_embeddings=context)).save_pretrained(
            folder
        )
        tokenizer = AutoTokenizer.from_pretrained(nano.path())
        if special := changed.pop("special", None):
            tokenizer.add_special_tokens(special)
        for name, value in changed.items():
            setattr(tokenizer, name, value)
        tokenizer.save_pretrained(folder)
        return folder

    return _small


def prepared(raw: Row, model: Path, data: Path | str, output: Path, **options: Any) -> Prepared:
    given = {"layout": "auto", "seed": 0, "device": "cpu", "overwrite": False, "skip_bad": False} | options
    return prepare(raw, str(model), str(data), output=output / "out", **given)


def prompted(raw: Row) -> Row:
    return {**raw, "data": {**raw["data"], "prompt": True}}


def test_a_prompt_that_fills_the_context_stops_the_run_with_the_cure(
    small: Callable[..., Path], rows: Callable[..., Path], tmp_path: Path
) -> None:
    """A few short questions fit behind the prompt, most do not: training on those alone is not what was asked for."""
    tokenizer = AutoTokenizer.from_pretrained(nano.path())
    length = len(tokenizer(collaborative_prompt(False).text)["input_ids"])
    model = small(context=length + 32)
    data = rows(
        [{**row, "instruction": row["instruction"] + " please" * (40 if i % 10 else 0)} for i, row in enumerate(ALPACA)]
    )
    with pytest.raises(DataError) as raised:
        prepared(prompted(TRAINS), model, data, tmp_path)
    message = str(raised.value)
    assert message.startswith(
        "d.jsonl: 72 of 80 examples would be dropped, more than 20%: 72 whose prompt leaves no room"
    )
    assert "--set data.prompt=false" in message and f"no more than {length + 32} tokens" in message
    assert "--allow-dropped" in message and "max_length" not in message, "a longer example could not be read"
    allowed = prepared(prompted(TRAINS), model, data, tmp_path, allow_dropped=True)
    assert allowed.encoded is not None and allowed.encoded.stats.rows == 8
    assert allowed.said[0].startswith("d.jsonl: 72 of 80 examples are dropped")
    assert prepared(TRAINS, model, data, tmp_path).said == ()


def test_the_command_line_stops_and_goes_on_by_option(
    call: Call, small: Callable[..., Path], rows: Callable[..., Path], tmp_path: Path
) -> None:
    """Without --allow-dropped nothing is written; with it the run goes on to the next thing that is wrong."""
    data = rows([*ALPACA[:40], *({**row, "output": ""} for row in ALPACA[40:])])
    given = (
        "run",
        "shortgpt",
        "--model",
        small(),
        "--data",
        data,
        "--output",
        tmp_path / "out",
        "--set",
        "data.prompt=false",
    )
    code, _, error = call(*given)
    assert (
        code == 2 and "d.jsonl: 40 of 80 examples would be dropped, more than 20%: 40 with an empty response" in error
    )
    assert not (tmp_path / "out").exists()
    code, _, error = call(*given, "--allow-dropped", "--set", "data.held=40")
    assert code == 2 and "gives 40 examples, of which 40 are held out" in error


def test_a_plan_takes_the_option_that_it_names(
    call: Call, small: Callable[..., Path], rows: Callable[..., Path], tmp_path: Path
) -> None:
    data = rows([*ALPACA[:40], *({**row, "output": ""} for row in ALPACA[40:])])
    recipe = tmp_path / "recover.yaml"
    recipe.write_text("stages: [{recover: {steps: 2}}]\ndata: {prompt: false}\n")
    given = ("plan", recipe, "--model", small(), "--data", data, "--device", "h100")
    code, out, _ = call(*given)
    assert code == 0 and "To go on with what is left, give --allow-dropped\n" in out
    assert "allow_dropped" not in out
    code, out, _ = call(*given, "--allow-dropped")
    assert code == 0 and "A run would stop" not in out and "40 of 80 examples are dropped" in out


@pytest.mark.usefixtures("quick_reopening")
def test_what_became_of_the_data_stands_on_the_terminal_and_in_every_file(
    small: Callable[..., Path], rows: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = rows([*TALKS, {**TALKS[0], "output": "", "history": []}, {**TALKS[1], "output": "so " * 600}])
    with caplog.at_level(logging.WARNING):
        result = run(SWEEPS, small(context=256), data, output=tmp_path / "out", allow_collapsed=True)
    said = [
        "d.jsonl: 1 of 82 examples is dropped: 1 with an empty response",
        "1 example is cut at 256 tokens",
        "columns passed over: id (82 rows)",
        "wanda: calibration on the 77 examples that there are, of the 128 it asks for",
    ]
    told = [record.getMessage() for record in caplog.records]
    for sentence in said:
        assert sum(sentence in one for one in told) == 1, "said once"
    used = result.records["data"]
    assert used["passed_over"] == {"id": 82}
    assert used["columns"] == {"instruction": 82, "output": 82, "system": 82, "history": 81}
    assert (used["kind"], used["examples"]["n"], used["examples"]["empty"]) == ("chat", 82, 1)
    for name in ("README.md", "report.html"):
        text = (tmp_path / "out" / name).read_text()
        for sentence in (*said, "81 of 82 examples", "instruction, output, system, history"):
            assert sentence in text, (name, sentence)


def test_earlier_turns_and_system_texts_are_trained_on(
    small: Callable[..., Path], rows: Callable[..., Path], tmp_path: Path
) -> None:
    ready = prepared(TRAINS, small(), rows(TALKS), tmp_path)
    assert ready.encoded is not None and ready.tokenizer is not None
    text = ready.tokenizer.decode(ready.encoded.rows[0]["input_ids"])
    assert text.index("You are a pirate.") < text.index("One?") < text.index("Arr.") < text.index("Say 0")


@pytest.mark.parametrize("prompt", [False, True])
def test_a_template_that_moves_system_texts_starts_a_run(
    small: Callable[..., Path], rows: Callable[..., Path], tmp_path: Path, prompt: bool
) -> None:
    model = small(chat_template=MISTRAL)
    ready = prepared(prompted(TRAINS) if prompt else TRAINS, model, rows(ALPACA), tmp_path)
    assert ready.encoded is not None and ready.encoded.stats.rows == 80
    assert [sentence for sentence in ready.said if "keeps no system text" in sentence] == (
        ["the model's chat template keeps no system text: the collaborative prompt stands in the first user turn"]
        if prompt
        else []
    )


def test_a_plan_says_what_survives_and_what_an_epoch_is(
    small: Callable[..., Path],
    rows: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(planning, "matmul_rate", lambda device: 1e9)
    data = rows([*ALPACA, *({**row, "output": ""} for row in ALPACA[:40])])
    facts = plan(TRAINS, str(small()), data=str(data))
    found = facts["data"]
    assert (found["survive"], found["examples"]["n"], found["held"], found["train"]) == (80, 120, 4, 76)
    assert found["epochs"] == [{"stage": "recover", "batch": 16, "updates_an_epoch": 5, "updates": 10}]
    assert found["stops"].startswith("d.jsonl: 40 of 120 examples would be dropped")
    assert found["examples"]["tokens"] > found["examples"]["response_tokens"] > 0
    json.dumps(facts, allow_nan=False)
    from compresso.commands.plan_table import show

    show(facts, as_json=False)
    shown = capsys.readouterr().out
    assert "80 of 120 records survive at 512 tokens" in shown
    assert "recover: an epoch is 5 updates of 16 rows; it takes 10 updates" in shown
    assert "A run would stop: d.jsonl: 40 of 120" in shown
    assert found["stops"].endswith("To go on with what is left, give allow_dropped=True")
    assert plan(TRAINS, str(small()), data=str(data), allow_dropped=True)["data"]["stops"] is None
    assert plan(TRAINS, str(small()))["data"] is None
    with pytest.raises(RecipeError, match="uses no data, but --data"):
        plan({"name": "n", "stages": [{"magnitude_structured": {}}]}, str(small()), data=str(data))


def test_ready_windows_run_without_a_tokenizer(
    small: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small()
    for path in model.glob("token*"):
        path.unlink()
    save_file({"input_ids": torch.arange(64 * 16).reshape(64, 16) % 1000}, tmp_path / "w.safetensors")
    ready = prepared(SWEEPS, model, tmp_path / "w.safetensors", tmp_path)
    assert ready.tokenizer is None and ready.encoded is not None and ready.encoded.stats.rows == 64
    monkeypatch.setattr("compresso.runner.output.reopen_and_compare", lambda *_, **__: 0.0)
    result = run(SWEEPS, model, tmp_path / "w.safetensors", output=tmp_path / "o", allow_collapsed=True, quiet=True)
    assert result.tokenizer is None and result.records["data"]["kind"] == "window"
    save_file({"input_ids": torch.full((64, 16), 1024)}, tmp_path / "high.safetensors")
    with pytest.raises(DataError, match=r"row 1 holds id 1024, the vocabulary has 1024"):
        prepared(SWEEPS, model, tmp_path / "high.safetensors", tmp_path)


@pytest.mark.usefixtures("quick_reopening")
def test_a_padding_token_without_a_row_is_replaced_and_said(
    small: Callable[..., Path], rows: Callable[..., Path], tmp_path: Path
) -> None:
    vocab = len(AutoTokenizer.from_pretrained(nano.path()))
    model = small(vocab=vocab, special={"pad_token": "[PAD]"})
    lengths = [{"instruction": f"Say {i}", "output": "It is " + "so " * (i % 7)} for i in range(80)]
    ready = prepared(TRAINS, model, rows(lengths), tmp_path)
    (said,) = ready.said
    assert said.startswith(f"the padding token '[PAD]' has the id {vocab}, and the embedding {vocab} rows")
    raw = {**TRAINS, "stages": [{"recover": {"steps": 2, "batch": 4, "micro_batch": 4}}]}
    run(raw, model, rows(lengths), output=tmp_path / "o", allow_collapsed=True, quiet=True)
    assert isinstance(compresso.load(tmp_path / "o").generate("Say 1", max_new_tokens=2), str)


@pytest.mark.parametrize("recipe", [TRAINS, {"name": "bare", "stages": [{"magnitude_structured": {"keep": 0.8}}]}])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"special": {"bos_token": "<begin>"}}, "the tokenizer's beginning token '<begin>' has the id"),
        (
            {
                "special": {"additional_special_tokens": ["<|im|>"]},
                "chat_template": "{{ '<|im|>' + messages[0].content }}",
            },
            "a token that the chat template writes has the id",
        ),
    ],
)
def test_tokens_of_the_tokenizers_own_without_a_row_are_refused_before_weights_are_read(
    small: Callable[..., Path], rows: Callable[..., Path], tmp_path: Path, recipe: Row, changed: Row, message: str
) -> None:
    vocab = len(AutoTokenizer.from_pretrained(nano.path()))
    texts = rows([{"text": "Once upon a time. " * 40}] * 80)
    with pytest.raises(DataError) as raised:
        given = {"layout": "auto", "seed": 0, "device": "cpu", "overwrite": False, "skip_bad": False}
        data = str(texts) if recipe is TRAINS else None
        prepare(recipe, str(small(vocab=vocab, **changed)), data, output=tmp_path / "out", **given)
    assert str(raised.value).startswith(message) and f"the embedding {vocab} rows" in str(raised.value)


def test_data_in_the_output_is_refused_as_a_folder_and_as_a_pattern(
    small: Callable[..., Path], rows: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    rows(ALPACA, "out/d.jsonl")
    for name in ("out", "out/*.jsonl", "out/d.jsonl"):
        with pytest.raises(DataError, match="which the run replaces"):
            prepared(TRAINS, small(), tmp_path / name, tmp_path, overwrite=True)


def test_folders_and_patterns_are_named_without_their_folder(
    small: Callable[..., Path], rows: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "shards").mkdir()
    rows(ALPACA[:40], "shards/a.jsonl")
    rows(ALPACA[40:], "shards/b.jsonl")
    for name, wanted in (("shards", "shards"), ("shards/*.jsonl", "*.jsonl")):
        ready = prepared(TRAINS, small(), tmp_path / name, tmp_path)
        assert ready.recipe.data.source == wanted and ready.encoded is not None and ready.encoded.stats.n == 80
        assert str(tmp_path) not in json.dumps(ready.origin())


@pytest.mark.parametrize("on", [False, True])
def test_a_recipe_may_learn_what_is_asked(
    on: bool, small: Callable[..., Path], rows: Callable[..., Path], tmp_path: Path
) -> None:
    """As the script of LoRAPrune does, and so its recipe."""
    raw = {**TRAINS, "data": {**TRAINS["data"], "train_on_inputs": on}}  # type: ignore[dict-item]
    encoded = prepared(raw, small(), rows(ALPACA), tmp_path).encoded
    assert encoded is not None
    assert all((row["labels"] == row["input_ids"]) is on for row in encoded.rows)
    assert build(read("loraprune/paper")).data.train_on_inputs and not build(read("loraprune")).data.train_on_inputs


@pytest.mark.parametrize(("rows", "few"), [(12, True), (63, True), (64, False)])
def test_more_held_out_than_learned_from_is_said(rows: int, few: bool, tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"instruction": f"Count to {n}.", "output": f"{n}"}) + "\n" for n in range(rows))
    )
    held = 8 if rows < 32 else 32
    found = compresso.plan("gate-taylor", tiny_folder, data=path, sets=[f"data.held={held}"])["data"]
    told = [note for note in found["notes"] if "are held out, more than stay to learn from; lower data.held" in note]
    assert len(told) == few and found["held"] == held
