"""`compresso latency`: tables of tiny models by made-up clocks, budgets that they tell, and what is refused."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.arch.conftest import CONFIGS
from tests.conftest import Call
from transformers import AutoModel, AutoModelForCausalLM

import compresso
from compresso.arch.base import arch_for
from compresso.arch.costs import cost_of, shape_facts
from compresso.checkpoint.load import meta_model
from compresso.checkpoint.source import open_source
from compresso.commands.latency import spaced
from compresso.core.latency_table import Conditions, LatencyTable
from compresso.core.measures import Measures
from compresso.core.plan import Plan
from compresso.engines import file_times
from compresso.engines.file_times import OnnxTimer
from compresso.errors import ArchError, BudgetError, CompressoError, DataError, RecipeError
from compresso.metrics import module_latency
from compresso.metrics.forwards import TOKENS, Forwards, timed_forwards
from compresso.metrics.module_latency import latin, split, time_modules
from compresso.metrics.shaped import ShapedModels
from compresso.runner.measured_budget import machine_here

DECODE = Conditions("torch", "decode", 1, 24, "float32")


@pytest.fixture(scope="module")
def table(tiny_folder: Path) -> LatencyTable:
    """Of the tiny model, by hand: 3 layers, 4 key/value heads, 48 channels; 10 + 3 x (4 + 6) = 40 ms."""
    model = meta_model(open_source(tiny_folder))
    return LatencyTable(
        model=shape_facts(arch_for(model.config), model),
        machine=machine_here(),
        conditions=DECODE,
        fixed=10.0,
        attention={0: 0.0, 1: 1.5, 2: 2.0, 4: 4.0},
        ffn={0: 0.0, 12: 2.5, 24: 3.0, 48: 6.0},
    )


@pytest.fixture
def file(table: LatencyTable, tmp_path: Path) -> Path:
    path = tmp_path / "latency.json"
    path.write_text(table.to_json())
    return path


class Made:
    """Moments of a clock by which each layer's attention takes 1 ms a head and its FFN .1 ms a channel."""

    def __init__(self, shapes: Sequence[Sequence[tuple[int, int]]]) -> None:
        self.shapes = shapes

    def __call__(self, widths: Sequence[tuple[int, int]]) -> list[float]:
        now, moments = 5.0, [0.0]
        for heads, channels in widths:
            moments += [now, now + heads, now + heads + channels / 10]
            now = moments[-1]
        return [*moments, now + 2.0]


def test_every_level_is_timed_in_every_layer() -> None:
    shapes = latin([0, 1, 2, 4], [0, 12, 24, 36, 48], 30)
    for layer in range(1, 30):
        assert {widths[layer][0] for widths in shapes} == {0, 1, 2, 4}
        assert {widths[layer][1] for widths in shapes} == {0, 12, 24, 36, 48}
    assert all(widths[0][0] for widths in shapes)  # a cache begins with the first attention


def test_parts_and_rest_add_up_to_the_forward() -> None:
    widths = [(4, 48), (0, 12), (2, 0)]
    parts, rest = split(Made([widths])(widths), 3)
    assert [ms for part in parts for ms in part] == pytest.approx([4, 4.8, 0, 1.2, 2, 0])
    assert rest == pytest.approx(5 + 2)
    with pytest.raises(ArchError, match="noted 3 moments where 11 were wanted"):
        split([0.0, 1.0, 2.0], 3)


def test_levels_are_what_the_clock_says(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The models run for real, each layer noting its three moments; the clock is made up."""
    make = ShapedModels(open_source(tiny_folder), torch.float32, torch.device("cpu"))
    heads, channels = [0, 2, 4], [0, 24, 48]
    shapes = latin(heads, channels, 3)
    each, moments = 0, Made(shapes)
    noted: list[int] = []

    class Clock(module_latency.Stamps):
        def take(self) -> list[float]:
            nonlocal each
            noted.append(len(super().take()))
            turn, each = each // TOKENS, each + 1
            return moments(shapes[turn % len(shapes)])

    found = time_modules(make, (heads, channels), 3, DECODE, 2, stamps=Clock(torch.device("cpu")))
    assert set(noted) == {3 * 3 + 2}
    assert found.attention == pytest.approx({0: 0, 2: 2, 4: 4})
    assert found.ffn == pytest.approx({0: 0, 24: 2.4, 48: 4.8})
    assert found.fixed == pytest.approx(7) and found.measured == 3 * 2 * TOKENS


def test_shaped_models_have_the_widths_and_share_their_memory(tiny_folder: Path) -> None:
    source = open_source(tiny_folder)
    make = ShapedModels(source, torch.float32, torch.device("cpu"))
    widths = [(4, 48), (0, 12), (2, 0)]
    models = [make.model(widths), make.model([(1, 8)] * 3)]
    for model, wanted in zip(models, (widths, [(1, 8)] * 3), strict=True):
        shapes = arch_for(model.config).shapes(model)
        assert [(shape.kv_heads, shape.channels) for shape in shapes] == wanted
        assert model(torch.arange(5).unsqueeze(0)).logits.isfinite().all()
    assert models[0].lm_head.weight is models[0].model.embed_tokens.weight
    begins = [next(model.parameters()).untyped_storage().data_ptr() for model in models]
    assert begins[0] == begins[1]


def config_of(family: str, folder: Path) -> Path:
    """A config.json of a tiny model of a family, for its shapes."""
    config = CONFIGS[family]()
    named = (AutoModelForCausalLM if config.model_type != "bert" else AutoModel)._model_mapping[type(config)]
    config.architectures = [named.__name__]
    config.save_pretrained(folder)
    return folder / "config.json"


@pytest.mark.parametrize("family", ["gpt2", "opt_post_norm", "llama_biased", "gpt_neox", "bert_bare"])
def test_a_sub_layer_whose_last_unit_a_bias_holds_leaves_as_a_whole(family: str, tmp_path: Path) -> None:
    """And the layers behind the first ones are not there, or do nothing where a family keeps their norms."""
    make = ShapedModels(open_source(config_of(family, tmp_path), weights=False), torch.float32, torch.device("cpu"))
    for widths in ([(4, 176), (0, 12), (2, 0), (0, 0)], [(1, 8), (4, 1)]):
        model = make.model(widths)
        shapes = [(shape.kv_heads, shape.channels) for shape in arch_for(model.config).shapes(model)]
        gone = [] if len(shapes) == len(widths) else [(0, 0)] * (4 - len(widths))
        assert shapes == [*widths, *gone]
        assert len(gone) == 0 or family in ("opt_post_norm", "bert_bare")
        assert next(iter(model(torch.arange(5).unsqueeze(0)).values())).isfinite().all()


@pytest.mark.parametrize(("family", "phase"), [("gpt2", "decode"), ("opt", "prefill"), ("bert_bare", "prefill")])
def test_biased_families_are_timed(family: str, phase: str, tmp_path: Path) -> None:
    found = compresso.latency(
        config_of(family, tmp_path), context=24, levels=2, rounds=1, phase=phase, output=tmp_path / "t.json", quiet=True
    )
    assert set(found.attention) == {0, 2, 4} and set(found.ffn) == {0, 88, 176}
    assert LatencyTable.from_json((tmp_path / "t.json").read_text()) == found


@pytest.mark.parametrize("engine", ["torch", "onnxruntime", "llama.cpp"])
def test_an_encoder_decodes_nothing_and_only_torch_times_it(
    engine: str, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was made")

    monkeypatch.setattr("compresso.commands.latency.ShapedModels", refuse)
    code, out, error = call("latency", config_of("bert_bare", tmp_path), "--engine", engine, "--context", 24)
    assert (code, out, len(error.splitlines())) == (2, "", 1)
    cure = f"--engine {engine} times causal language models; give --engine torch --phase prefill"
    assert ("it decodes nothing: give --phase prefill" if engine == "torch" else cure) in error
    CONFIGS["vit"]().save_pretrained(tmp_path / "vit")
    for option, value in (("context", 24), ("phase", "prefill"), ("batch", 2)):
        with pytest.raises(ArchError, match=f"{option}=.*{value}.*: vit sees pictures, .* leave {option}= out"):
            compresso.latency(tmp_path / "vit" / "config.json", **{option: value}, quiet=True)


def test_a_decoded_token_stands_at_the_context_and_a_prefill_reads_it(tiny_folder: Path) -> None:
    make = ShapedModels(open_source(tiny_folder), torch.float32, torch.device("cpu"))
    model = make.model([(4, 48)] * 3)
    seen: list[tuple[int, int]] = []

    def see(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        seen.append((kwargs["input_ids"].shape[1], output.past_key_values.get_seq_length()))

    model.register_forward_hook(see, with_kwargs=True)
    clock = lambda work: (work(), 0.002)[1]  # noqa: E731
    times = timed_forwards({"a": model}, DECODE, 2, clock=clock)
    assert times == {"a": [2.0] * (2 * TOKENS)}
    read, *decoded = seen
    assert read == (24 - 3 * TOKENS // 2, 24 - 3 * TOKENS // 2)
    assert [length for _, length in decoded] == list(range(19, 19 + 3 * TOKENS))
    seen.clear()
    timed_forwards({"a": model}, Conditions("torch", "prefill", 2, 24, "float32"), 1, clock=clock)
    assert seen == [(24, 24)] * 2
    with pytest.raises(DataError, match="--context 2000: the model reads 1024 tokens"):
        Forwards(model, Conditions("torch", "prefill", 1, 2000, "float32"), 1)


def test_a_table_is_written_and_printed(tiny_folder: Path, tmp_path: Path, call: Call) -> None:
    """Small, but for real: whatever a clock says is not negative, and the table reads as it was returned."""
    path = tmp_path / "table.json"
    options = ("--context", 24, "--levels", 2, "--rounds", 1, "--output", path)
    code, out, _ = call("latency", tiny_folder, *options)
    assert code == 0 and "key/value heads" in out and "48 channels" in out
    found = LatencyTable.from_json(path.read_text())
    assert set(found.attention) == {0, 2, 4} and set(found.ffn) == {0, 24, 48}
    assert found.machine == machine_here() and found.conditions == DECODE
    again = compresso.latency(tiny_folder, context=24, levels=2, rounds=1, output=path, quiet=True)
    assert LatencyTable.from_json(path.read_text()) == again != found or again.created == found.created
    assert spaced(3, 6) == [0, 1, 2, 3]


def test_whole_files_are_fitted(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine whose time is a sum over the layers that it is given: the table tells the sum's terms."""

    class Engine(OnnxTimer):
        def write(self, model: Any, tokenizer: Any, path: Path, dtype: str) -> None:
            shapes = arch_for(model.config).shapes(model)
            path.write_text(json.dumps([(one.kv_heads, one.channels) for one in shapes]))

        def times(self, paths: Sequence[Path], *_: Any) -> list[list[float]]:
            widths = [json.loads(path.read_text()) for path in paths]
            return [[3 + sum(0.5 * h + 0.2 * (h > 0) + 0.01 * n for h, n in one)] for one in widths]

        def missing(self) -> str | None:
            return None

    monkeypatch.setitem(file_times.TIMERS, "onnxruntime", Engine())
    found = compresso.latency(tiny_folder, engine="onnxruntime", context=24, rounds=1, quiet=True)
    assert found.how == "fitted" and found.conditions.dtype == "f32"
    assert found.error == pytest.approx(0, abs=1e-4)
    dense = [(4, 48)] * 3
    assert found.milliseconds(dense) == pytest.approx(3 + 3 * (2.0 + 0.2 + 0.48), rel=1e-3)
    assert found.milliseconds([(2, 24)] * 3) == pytest.approx(3 + 3 * (1.0 + 0.2 + 0.24), rel=1e-2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"engine": "tourch"}, "engine='tourch' is unknown; did you mean 'torch'?"),
        ({"phase": "walk"}, "phase='walk' is unknown"),
        ({"batch": 0}, "batch=0: wanted at least 1"),
        ({"levels": 0}, "levels=0: wanted at least 1"),
        ({"rounds": 0}, "rounds=0: wanted at least 1"),
        ({"context": 0}, "context=0: wanted at least 1"),
        ({"dtype": "q8_0"}, "dtype='q8_0' is unknown to torch"),
        ({"engine": "llama.cpp", "dtype": "float32"}, "dtype='float32' is unknown to llama.cpp"),
        ({"context": 4096}, "context=4096: the model reads 1024 tokens"),
        ({"output": "no/such/folder/table.json"}, "is no file that can be written"),
    ],
)  # fmt: skip
def test_what_cannot_be_timed_is_said_in_one_line(tiny_folder: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(CompressoError) as caught:
        compresso.latency(tiny_folder, **{"context": 24, "levels": 1, "rounds": 1, "quiet": True} | options)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_an_engine_that_is_not_here_is_said(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compresso.engines.llama_cpp.missing", lambda: "node is not installed")
    with pytest.raises(CompressoError, match=r"engine='llama.cpp' cannot be timed: node is not installed"):
        compresso.latency(tiny_folder, engine="llama.cpp", context=24, quiet=True)


def test_a_file_that_is_no_table_is_not_replaced(tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text("{}")
    with pytest.raises(CompressoError, match="exists and is no latency table"):
        compresso.latency(tiny_folder, context=24, output=path, quiet=True)
    assert path.read_text() == "{}"


def milliseconds(folder: Path, table: LatencyTable, plan: Plan) -> float:
    model = meta_model(open_source(folder))
    return float(cost_of(arch_for(model.config), model, Measures(table)).of(plan).count("milliseconds"))


KNOBS: dict[str, dict[str, Any]] = {
    "magnitude_structured": {},
    "gate_taylor": {"batches": 1, "batch": 4},
    "llm_pruner": {"batch": 2, "scope": "global"},
    "drop_layers": {"batches": 1, "batch": 4},
    "learn_gates": {"max_steps": 3, "batch": 4, "kinds": ["head", "channel"]},
}
"""Short runs."""
ONLY = {"name": "mine", "stages": [{"magnitude_structured": {}}]}


@pytest.mark.parametrize(
    ("stage", "budget"),
    [
        ("magnitude_structured", {"milliseconds": 27.0}),
        ("gate_taylor", {"speedup": "1.5x"}),
        ("llm_pruner", {"speedup": 1.25}),
        ("drop_layers", {"milliseconds": 31.0}),
        ("learn_gates", {"milliseconds": 32.0}),
    ],
)
@pytest.mark.slow
def test_a_budget_of_time_is_met_and_told(
    stage: str,
    budget: dict[str, Any],
    tiny_folder: Path,
    instructions: Path,
    file: Path,
    table: LatencyTable,
    tmp_path: Path,
    quick_reopening: None,
) -> None:
    data = {"held": 4, "prompt": False, "limit": 40}
    done = compresso.run(
        {"name": "mine", "data": data, "stages": [{stage: KNOBS[stage]}]},
        tiny_folder,
        None if stage == "magnitude_structured" else instructions,
        output=tmp_path / "out",
        latency_table=file,
        allow_collapsed=True,
        measure="quick",
        quiet=True,
        **budget,
    )
    wanted = budget.get("milliseconds") or 40 / float(str(budget["speedup"]).rstrip("x"))
    spent = milliseconds(tiny_folder, table, done.plan)
    assert spent <= wanted + 1e-6
    assert spent > wanted - 11  # a whole layer is the coarsest unit of all
    dense, pruned = done.records["report"]["models"]
    told = {(one["name"], one["how"]): one for one in pruned["measurements"] if one["name"].startswith("decode_ms")}
    assert told["decode_ms/batch1", "estimated"]["value"] == pytest.approx(spent)
    measured = told["decode_ms/batch1", "measured"]
    assert measured["value"] > 0 and measured["protocol"]["context"] == 24
    assert {one["how"] for one in dense["measurements"] if one["name"].startswith("decode_ms")} == {
        "estimated",
        "measured",
    }
    assert done.records["recipe"]["cost"]["latency"] == table.to_dict()
    again = compresso.plan(tmp_path / "out" / "recipe.yaml", tiny_folder)
    assert any("of milliseconds stay" in note for note in again["notes"])


def refused(recipe: str, folder: Path, **options: Any) -> str:
    with pytest.raises(BudgetError) as caught:
        compresso.plan(recipe, folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_no_table_is_named_once_and_in_plain_words(tiny_folder: Path, tmp_path: Path) -> None:
    def said(text: str) -> str:
        file = tmp_path / "other.json"
        file.write_text(text)
        return refused("gate-taylor", tiny_folder, latency_table=file, speedup=1.5).partition("other.json'")[2]

    wanted = ": not a latency table; wanted what `compresso.latency(output=...)` writes"
    assert said('{"format": 1, "recipe": {}, "stages": {}}') == wanted
    assert said('{"format": 1, "kind": "latency"}') == f"{wanted} ('conditions' is missing)"
    cure = "; `compresso.latency(output=...)` writes one"
    assert said('{"a": 1}\n{"a": 2}\n') == f" is no latency table: another value begins at line 2, column 1{cure}"
    assert said("") == f" is no latency table: it is empty{cure}"


def test_targets_out_of_reach_are_refused(tiny_folder: Path, file: Path) -> None:
    def said(**options: Any) -> str:
        return refused("gate-taylor", tiny_folder, latency_table=file, **options)

    assert "the dense model takes 40 ms already" in said(milliseconds=41.0)
    floor = said(milliseconds=5.0)
    assert "milliseconds=5" in floor and "below its floor of 10 ms: 10 ms of embeddings and head" in floor
    assert "below its floor of 10 ms" in said(speedup="8x")
    assert "wanted at least 1" in said(speedup="0.5")
    assert "wanted at least 1" in said(speedup="fast")
    assert "positive number" in said(milliseconds=-1.0)
    assert "two budgets" in said(milliseconds=20.0, keep=0.5)
    assert "two budgets" in said(milliseconds=20.0, speedup="2x")
    assert "two budgets" in said(milliseconds=20.0, bytes_at_context=128)
    assert "is what milliseconds= and speedup= are counted by" in said(keep=0.5)
    assert "measured time and needs latency_table=" in refused("gate-taylor", tiny_folder, milliseconds=20.0)
    assert "measured time and needs latency_table=" in refused("gate-taylor", tiny_folder, speedup=1.5)


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("model", {"layers": 4}, "another model: layers is 4 in it, 3 here"),
        ("model", {"hidden_size": 64}, "another model: hidden_size is 64 in it, 32 here"),
        ("model", {"channels": "48,48,12"}, "another model: channels is 48,48,12 in it, 48 here"),
        ("machine", {"threads": 99}, "another machine: threads is 99 in it"),
        ("machine", {"hardware": "an abacus"}, "another machine: hardware is an abacus in it"),
        ("machine", {"device": "cuda:0"}, "another machine: device is cuda:0 in it, cpu here"),
    ],
)
def test_another_table_is_refused_by_its_field(
    part: str, change: dict[str, Any], said: str, tiny_folder: Path, table: LatencyTable, tmp_path: Path
) -> None:
    told = table.to_dict()
    path = tmp_path / "other.json"
    path.write_text(json.dumps(told | {part: {**told[part], **change}}))
    assert said in refused("gate-taylor", tiny_folder, milliseconds=30.0, latency_table=path)
    raw = {  # the same table in a recipe of somebody's own
        "name": "mine",
        "cost": {"latency": json.loads(path.read_text())},
        "stages": [{"magnitude_structured": {"keep": 0.8, "of": "milliseconds"}}],
    }
    with pytest.raises(BudgetError, match="another"):
        compresso.plan(raw, tiny_folder)


@pytest.mark.parametrize("text", [b"", b"{}", b"[1]", b"\xff\xfe", b'{"kind": "latency", "format": 1}'])
def test_a_damaged_table_is_refused(text: bytes, tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged.json"
    path.write_bytes(text)
    assert "compresso.latency" in refused("gate-taylor", tiny_folder, milliseconds=30.0, latency_table=path)
    assert "is no file" in refused("gate-taylor", tiny_folder, milliseconds=30.0, latency_table=tmp_path / "none")


@pytest.mark.parametrize("cost", [{}, [], {"speed": 1}, {"context": 0}, {"context": 1.5}, {"latency": {}}])
def test_a_recipe_with_a_wrong_cost_is_refused(cost: Any, tiny_folder: Path) -> None:
    with pytest.raises(RecipeError, match="cost: "):
        compresso.plan({"name": "mine", "cost": cost, "stages": ["magnitude_structured"]}, tiny_folder)


def test_a_stage_that_takes_what_the_table_does_not_tell_is_refused(tiny_folder: Path, file: Path) -> None:
    said = refused(
        "magnitude-structured",
        tiny_folder,
        milliseconds=30.0,
        latency_table=file,
        sets=["stages.magnitude_structured.kinds=[head, hidden]"],
    )
    assert "units of hidden" in said


@pytest.mark.parametrize("keep", [0.33, 0.8])
def test_bytes_at_a_context_are_a_budget(keep: float, tiny_folder: Path, tmp_path: Path, quick_reopening: None) -> None:
    """float32 weights, and two bytes for each of the 3 x 4 x 2 x 8 entries of a token."""
    done = compresso.run(
        ONLY,
        tiny_folder,
        output=tmp_path / "out",
        keep=keep,
        bytes_at_context=4096,
        allow_collapsed=True,
        measure="none",
        quiet=True,
    )

    def size(counts: dict[str, Any]) -> float:
        return 4 * counts["parameters"]["total"] + 4096 * counts["kv_bytes_per_token"]

    assert done.records["before"]["kv_bytes_per_token"] == 3 * 4 * 2 * 8 * 2
    before, after = size(done.records["before"]), size(done.records["after"])
    assert keep * before * 0.93 < after <= keep * before
    assert done.records["recipe"]["cost"] == {"context": 4096, "weight_bytes": 4.0, "cache_bytes": 2.0}


def test_without_such_a_budget_recipes_and_identities_stay_as_they_were(tiny_folder: Path) -> None:
    from compresso.runner.options import with_options
    from compresso.runner.recipe import build

    assert "cost" not in build(with_options("gate-taylor", model=str(tiny_folder), keep=0.5)).to_dict()
