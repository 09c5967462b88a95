"""The gate for code: each field and file that transformers would act upon is refused in one line, and none of the code
runs.

`ran` is the canary: every piece of code in these folders creates it. That the canary sings is tested too, with the
trust that compresso never gives.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    TOKENIZER_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    dynamic_module_utils,
)

import compresso
from compresso.arch.base import arch_for
from compresso.checkpoint.code import refuse_code, trusted
from compresso.checkpoint.load import load_model, meta_model
from compresso.checkpoint.source import open_source
from compresso.checkpoint.tokenizer import load_tokenizer
from compresso.data import nano
from compresso.engines import vllm as vllm_engine
from compresso.engines.parity import Format, Reference, reference_of
from compresso.engines.transformers import PLAIN, REMOTE
from compresso.engines.vllm import VLLM, Vllm
from compresso.errors import CheckpointError, ExportError
from compresso.formats.hf import save_checkpoint
from compresso.formats.vllm_deci import DECI_CLASS, save_vllm_deci
from tests.formats.nano_variants import nano_tokenizer, pruned_nano

IDS = torch.arange(4)
TINY = {
    "vocab_size": 1024,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
OURS = {"AutoConfig": "modeling_compresso.CompressoLlamaConfig"}
VLLM_WITHOUT_TRUST = Vllm("vLLM", Format.CHECKPOINT, "")
ZEROS = Reference(IDS, torch.zeros(4, 1024), IDS)
CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer_config.json"
FIELDS: list[tuple[str, dict[str, Any], str]] = [
    (CONFIG, {"auto_map": {"AutoConfig": 7}}, r"auto_map names code to run \(7\)"),
    (CONFIG, {"auto_map": "strange.X"}, "auto_map names code"),
    (CONFIG, {"text_config": {"auto_map": OURS}}, r"text_config\.auto_map names code"),
    (CONFIG, {"parts": [{"deep": {"auto_map": {"AutoConfig": "strange.X"}}}]}, r"parts\.0\.deep\.auto_map names code"),
    (CONFIG, {"custom_pipelines": {"x": {"impl": "strange.X", "pt": ["AutoModel"]}}}, "custom_pipelines names code"),
    (CONFIG, {"custom_generate": "owner/repo"}, r"custom_generate names code to run \(owner/repo\)"),
    (CONFIG, {"configuration_files": ["config.4.0.0.json"]}, "configuration_files names other files"),
    (CONFIG, {"tokenizer_class": "RagTokenizer"}, "tokenizer_class is RagTokenizer, which is no tokenizer"),
    (
        CONFIG,
        {"attn_implementation": "owner/kernel"},
        r"attn_implementation names a kernel of the hub \(owner/kernel\)",
    ),
    (CONFIG, {"_attn_implementation": "paged|owner/kernel@v1:run"}, "_attn_implementation names a kernel"),
    (
        CONFIG,
        {"attn_implementation": {"": "sdpa", "text_config": "owner/kernel"}},
        "attn_implementation names a kernel",
    ),
    (
        CONFIG,
        {"text_config": {"attn_implementation": "owner/kernel"}},
        r"text_config\.attn_implementation names a kernel",
    ),
    (CONFIG, {"experts_implementation": "sonicmoe"}, "experts_implementation is sonicmoe"),
    (CONFIG, {"_experts_implementation": {"text_config": "owner/kernel"}}, "_experts_implementation is owner/kernel"),
    (CONFIG, {"use_kernels": True}, "use_kernels is True"),
    (CONFIG, {"kernel_config": {"RMSNorm": "owner/kernel:RMSNorm"}}, "kernel_config is"),
    (
        CONFIG,
        {"text_config": {"quantization_config": {"quant_method": "mxfp4"}}},
        r"text_config\.quantization_config says that the weights are quantised by mxfp4, which imports code",
    ),
    (GENERATION, {"auto_map": {"AutoConfig": "strange.X"}}, "auto_map names code"),
    (GENERATION, {"custom_generate": "custom_generate"}, "custom_generate names code"),
    (TOKENIZER, {"x": {"auto_map": {"AutoTokenizer": [None, "strange.X"]}}}, r"x\.auto_map names code"),
    (
        TOKENIZER,
        {"tokenizer_class": "AutoModelForCausalLM"},
        "tokenizer_class is AutoModelForCausalLM, which is no tokenizer",
    ),
    (TOKENIZER, {"gguf_file": "../other.gguf"}, r"gguf_file names other files to read \(\.\./other\.gguf\)"),
    (
        TOKENIZER,
        {"fast_tokenizer_files": ["tokenizer.4.json", "../tokenizer.5.json"]},
        "fast_tokenizer_files names a file that may lie outside",
    ),
    (
        TOKENIZER,
        {"fast_tokenizer_files": ["/etc/tokenizer.5.json"]},
        "fast_tokenizer_files names a file that may lie outside",
    ),
    ("processor_config.json", {"x": {"auto_map": {"AutoProcessor": "strange.X"}}}, r"x\.auto_map names code"),
    ("audio_tokenizer_config.json", {"x": {"auto_map": {"AutoModel": "strange.X"}}}, r"x\.auto_map names code"),
]
"""A file, what is written into it, and what the refusal says."""

WITH_TRUST: list[tuple[str, dict[str, Any]]] = [
    (CONFIG, {"AutoConfig": "strange.X", "AutoModelForCausalLM": "strange.X", "AutoTokenizer": ["strange.X", None]}),
    (CONFIG, {"AutoModelForCausalLM": "owner/repo--strange.X"}),
    (CONFIG, OURS | {"AutoModelForCausalLM": "strange.X"}),
    (CONFIG, {"AutoConfig": "owner/repo--modeling_compresso.CompressoLlamaConfig"}),
    (CONFIG, {"AutoConfig": "modeling_compresso.torch"}),
    (TOKENIZER, {"AutoTokenizer": [None, "strange.X"]}),
    (TOKENIZER, {"AutoTokenizer": ["strange.X", None]}),
    (TOKENIZER, OURS),
    ("processor_config.json", {"AutoProcessor": "strange.X"}),
    ("preprocessor_config.json", {"AutoImageProcessor": "strange.X"}),
    ("video_preprocessor_config.json", {"AutoVideoProcessor": "strange.X"}),
]
"""A file and its auto_map, which is followed with trust alone, as transformers has a class for the model type."""


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """Exists once code of a folder ran."""
    return tmp_path / "ran"


@pytest.fixture
def folder(tmp_path: Path, ran: Path) -> Path:
    """A tiny LLaMA with a tokenizer and a file of code that nothing names."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(nano.path()).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "strange.py").write_text(f"open({str(ran)!r}, 'w')\nclass X: pass\n")
    return tmp_path / "model"


@pytest.fixture
def native(tmp_path: Path) -> Path:
    """Layers of different widths, with the modelling file beside them."""
    model = pruned_nano(keep=0.7)
    save_checkpoint(model, arch_for(model.config).shapes(model), tmp_path / "native", tokenizer=nano_tokenizer())
    return tmp_path / "native"


def change(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | fields))


def custom_generate(folder: Path, ran: Path) -> None:
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(
        f"open({str(ran)!r}, 'w')\ndef generate(model, *a, **k): pass\n"
    )


def openings(folder: Path) -> dict[str, Callable[[], object]]:
    """Every way in which compresso opens a folder, by name; parity would start a process."""
    return {
        "open": lambda: open_source(folder),
        "open without weights": lambda: open_source(folder, weights=False),
        "load": lambda: compresso.load(folder),
        "parity": lambda: PLAIN.parity(folder, ZEROS),
        "parity with trust": lambda: REMOTE.parity(folder, ZEROS),
        "parity in vLLM": lambda: VLLM_WITHOUT_TRUST.parity(folder, ZEROS),
        "trusted": lambda: trusted(folder),
    }


def refused_everywhere(folder: Path, ran: Path, message: str) -> None:
    for name, opening in openings(folder).items():
        with pytest.raises(CheckpointError, match=message) as raised:
            opening()
        assert "\n" not in str(raised.value), name
        assert raised.value.exit_code == 2
        assert not ran.exists(), name


@pytest.fixture(autouse=True)
def vllm_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as the gate; a process that is started fails."""
    monkeypatch.setattr(vllm_engine, "missing", lambda: None)
    monkeypatch.setattr(vllm_engine, "_python", lambda: "false")


@pytest.mark.parametrize(
    ("file", "fields", "message"), FIELDS, ids=[f"{file}-{number}" for number, (file, *_) in enumerate(FIELDS)]
)
def test_a_field_that_names_code_is_refused_by_file_and_field(
    file: str, fields: dict[str, Any], message: str, folder: Path, ran: Path
) -> None:
    change(folder / file, fields)
    refused_everywhere(folder, ran, f"{file}: {message}")
    if file == CONFIG:
        with pytest.raises(CheckpointError, match=message):
            open_source(folder / file)


@pytest.mark.parametrize(
    ("file", "mapped"), WITH_TRUST, ids=[f"{file}-{number}" for number, (file, _) in enumerate(WITH_TRUST)]
)
def test_an_auto_map_is_passed_over_where_transformers_has_a_class_and_refused_with_trust(
    file: str, mapped: dict[str, Any], folder: Path, ran: Path
) -> None:
    wanted = load_model(open_source(folder)).state_dict()
    tokens = load_tokenizer(open_source(folder))("the house").input_ids
    change(folder / file, {"auto_map": mapped})
    source = open_source(folder)
    found = load_model(source).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert load_tokenizer(source)("the house").input_ids == tokens
    meta_model(open_source(folder / CONFIG))
    message = f"{file}: auto_map names code to run"
    with pytest.raises(CheckpointError, match=message):
        trusted(folder)
    with pytest.raises(CheckpointError, match=message):
        VLLM_WITHOUT_TRUST.parity(folder, ZEROS)
    for engine in (REMOTE, VLLM):
        parity = engine.parity(folder, ZEROS)
        assert parity.opens == "not checked" and f"this folder/{message}" in parity.reason
    assert not ran.exists()


@pytest.mark.slow
def test_a_folder_with_an_auto_map_opens_in_a_fresh_process_and_is_written_without_it(
    folder: Path, ran: Path, tmp_path: Path
) -> None:
    for file, mapped in (WITH_TRUST[0], WITH_TRUST[6], WITH_TRUST[8]):
        change(folder / file, {"auto_map": mapped})
    source = open_source(folder)
    model, tokenizer = load_model(source), load_tokenizer(source)
    assert PLAIN.parity(folder, reference_of(model, IDS)).opens == "yes"
    save_checkpoint(model, arch_for(model.config).shapes(model), tmp_path / "written", tokenizer=tokenizer)
    for written in (tmp_path / "written").glob("*.json"):
        assert "strange" not in written.read_text(), written.name
    assert trusted(tmp_path / "written") is False
    assert not ran.exists()


@pytest.mark.parametrize("kind", ["x", "llama"])
def test_an_auto_map_is_refused_with_the_cure_where_transformers_has_no_class(
    kind: str, folder: Path, ran: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model type it does not know; and of a tokenizer, where nothing but the code says what it is."""
    if kind == "x":
        change(folder / CONFIG, {"model_type": "x", "auto_map": WITH_TRUST[0][1]})
        for opening in (lambda: open_source(folder), lambda: refuse_code(folder)):
            with pytest.raises(CheckpointError, match=r"auto_map.*Convert the model|convert the model"):
                opening()
    else:
        change(folder / TOKENIZER, {"tokenizer_class": "X", "auto_map": {"AutoTokenizer": ["strange.X", None]}})
        holds = type(TOKENIZER_MAPPING).__contains__
        monkeypatch.setattr(
            type(TOKENIZER_MAPPING), "__contains__", lambda at, key: at is not TOKENIZER_MAPPING and holds(at, key)
        )
        with pytest.raises(CheckpointError, match=r"tokenizer of model .* never run\. Write tokenizer\.json"):
            load_tokenizer(open_source(folder))
    assert not ran.exists()


@pytest.mark.parametrize("kind", ["folder", "empty", "file", "link", "link to nothing"])
def test_custom_generate_is_always_refused(kind: str, folder: Path, ran: Path, tmp_path: Path) -> None:
    match kind:
        case "folder":
            custom_generate(folder, ran)
        case "empty":
            (folder / "custom_generate").mkdir()
        case "file":
            (folder / "custom_generate").write_text("x")
        case _:
            if kind == "link":
                (tmp_path / "elsewhere").mkdir()
                custom_generate(tmp_path / "elsewhere", ran)
            (folder / "custom_generate").symlink_to(tmp_path / "elsewhere" / "custom_generate")
    refused_everywhere(folder, ran, "custom_generate holds code that replaces `generate`")
    (folder.parent / "link").symlink_to(folder)
    refused_everywhere(folder.parent / "link", ran, "custom_generate holds code")


@pytest.mark.slow
def test_the_canary_sings_where_trust_is_given(folder: Path, ran: Path) -> None:
    """In a process of its own: without the gate, both kinds of code would run."""
    opens = "import sys, transformers as t; t.{}.from_pretrained(sys.argv[1], trust_remote_code=True)"
    custom_generate(folder, ran)
    home = {"HF_MODULES_CACHE": str(folder.parent / "modules"), "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [sys.executable, "-c", opens.format("AutoModelForCausalLM"), folder], env=home, check=True, capture_output=True
    )
    assert ran.exists()
    ran.unlink()
    change(folder / CONFIG, {"model_type": "strange", "auto_map": {"AutoConfig": "strange.X"}})
    subprocess.run(
        [sys.executable, "-c", opens.format("AutoConfig"), folder], env=home, check=False, capture_output=True
    )
    assert ran.exists()


@pytest.mark.parametrize(
    "fields",
    [
        {"custom_generate": None, "use_kernels": False, "quantization_config": None},
        {"auto_map": {}},
        {"attn_implementation": "sdpa"},
        {"_attn_implementation": {"": "eager"}},
        {"experts_implementation": "batched_mm"},
        {"tokenizer_class": "LlamaTokenizerFast"},
        {"tokenizer_class": "ATokenizerOfTomorrow"},
        {"fast_tokenizer_files": ["tokenizer.json"]},
    ],
)
def test_what_runs_nothing_opens(fields: dict[str, Any], folder: Path, ran: Path) -> None:
    """Beside a file of code that no field names."""
    change(folder / CONFIG, fields)
    source = open_source(folder)
    load_model(source)
    load_tokenizer(source)
    assert trusted(folder) is False
    assert not ran.exists()


def test_what_came_after_opening_is_refused_when_it_is_read(folder: Path, ran: Path) -> None:
    """As the teacher of a distillation is read long after the run began."""
    source = open_source(folder)
    custom_generate(folder, ran)
    for read in (load_model, load_tokenizer):
        with pytest.raises(CheckpointError, match="custom_generate"):
            read(source)


@pytest.mark.slow
def test_a_fresh_process_looks_for_itself(folder: Path, ran: Path) -> None:
    from compresso.formats.reopen import reopen_and_compare

    model = LlamaForCausalLM.from_pretrained(folder)
    custom_generate(folder, ran)
    with pytest.raises(ExportError, match="custom_generate holds code"):
        reopen_and_compare(folder, model, IDS.unsqueeze(0), 1e-3)
    assert not ran.exists()


def test_a_config_as_deep_as_its_file_is_long(folder: Path) -> None:
    deep: dict[str, Any] = {"auto_map": {"AutoConfig": "strange.X"}}
    for _ in range(40):
        deep = {"a": [deep]}
    change(folder / GENERATION, deep)
    with pytest.raises(CheckpointError, match=r"a\.0\.a\.0\..* names code to run") as raised:
        refuse_code(folder)
    assert len(str(raised.value)) < 600


def test_our_own_folder_opens_without_a_look_at_its_file(
    native: Path, ran: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers is not asked for a class from a folder at all, whatever lies there."""

    def refuse(*arguments: object, **_: object) -> None:
        raise AssertionError(f"code of a folder was asked for: {arguments}")

    for function in ("get_class_from_dynamic_module", "get_cached_module_file", "get_class_in_module"):
        for name, module in list(sys.modules.items()):
            if name.startswith("transformers.") and function in vars(module):
                monkeypatch.setattr(module, function, refuse)
    assert dynamic_module_utils.get_cached_module_file is refuse
    wanted = compresso.load(native).model(input_ids=IDS.unsqueeze(0)).logits
    assert trusted(native)
    code = native / "modeling_compresso.py"
    code.write_text(f"open({str(ran)!r}, 'w')\n" + code.read_text())
    torch.testing.assert_close(compresso.load(native).model(input_ids=IDS.unsqueeze(0)).logits, wanted)
    assert not ran.exists()


@pytest.mark.parametrize("what", ["changed", "absent", "link", "folder"])
def test_our_own_file_is_trusted_byte_for_byte(what: str, native: Path, ran: Path, tmp_path: Path) -> None:
    assert trusted(native)
    code = native / "modeling_compresso.py"
    same = code.read_bytes()
    code.unlink()
    match what:
        case "changed":
            code.write_bytes(same + f"\nopen({str(ran)!r}, 'w')\n".encode())
        case "link":
            (tmp_path / "same.py").write_bytes(same)
            code.symlink_to(tmp_path / "same.py")
        case "folder":
            code.mkdir()
            (code / "__init__.py").write_text(f"open({str(ran)!r}, 'w')\n")
    with pytest.raises(CheckpointError, match="is not the file that this version of compresso writes, and is not run"):
        trusted(native)
    for engine in (REMOTE, VLLM):
        parity = engine.parity(native, ZEROS)
        assert parity.opens == "not checked"
        assert parity.reason.startswith("this folder/modeling_compresso.py is not the file")
    assert not ran.exists()


def test_a_cached_repository_s_links_are_its_own_files(native: Path, tmp_path: Path) -> None:
    """As the hub's cache stores a native checkpoint: each file a link into blobs."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "c0ffee", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(native.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(blobs / str(number))
    open_source(snapshot)
    assert trusted(snapshot)


def test_the_class_for_vllm_is_trusted_where_it_was_written_for_it_alone(tmp_path: Path) -> None:
    model = pruned_nano(keep=0.7)
    save_vllm_deci(model, arch_for(model.config).shapes(model), tmp_path / "deci")
    assert trusted(tmp_path / "deci", DECI_CLASS)
    with pytest.raises(CheckpointError, match=r"auto_map names code to run \(configuration_decilm\.DeciLMConfig\)"):
        trusted(tmp_path / "deci")


def test_fields_of_the_list_are_fields_that_transformers_reads(folder: Path) -> None:
    """So that a name which changes there is noticed here."""
    change(folder / CONFIG, {"attn_implementation": "eager", "experts_implementation": "eager"})
    config = PreTrainedConfig.from_pretrained(folder)
    assert (config._attn_implementation, config._experts_implementation) == ("eager", "eager")
    assert type(AutoModelForCausalLM.from_pretrained(folder).config) is LlamaConfig
