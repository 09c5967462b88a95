"""The names that users may rely on, pinned: a change here is a change of the interface."""

import ast
import importlib
import importlib.util
import inspect
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

import compresso
from compresso.errors import BudgetError, RecipeError
from compresso.formats.hf import save_checkpoint
from tests.conftest import Call
from tests.formats.narrow import UNEVEN, narrow_model

PUBLIC = [
    "Budget",
    "CostModel",
    "Plan",
    "Result",
    "allocate",
    "compare",
    "evaluate",
    "export",
    "fit",
    "gated",
    "inspect",
    "latency",
    "load",
    "measure",
    "plan",
    "run",
    "shrink_",
    "verify",
]
FUNCTIONS = [name for name in PUBLIC if name.islower()]
PRUNE_ONLY = {"stages": [{"magnitude_structured": {"keep": 0.9}}]}


def python(program: str, *arguments: str) -> str:
    """What a fresh interpreter prints."""
    ran = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_public_names() -> None:
    assert sorted(compresso.__all__) == compresso.__all__ == PUBLIC
    assert set(PUBLIC) <= set(dir(compresso))
    with pytest.raises(AttributeError, match="module 'compresso' has no attribute 'prune'"):
        _ = compresso.prune  # type: ignore[attr-defined]


def test_type_checkers_see_what_is_imported() -> None:
    """The imports for type checkers and the places that names are imported from say the same."""
    tree = ast.parse(Path(compresso.__file__).read_text("utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    told = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert told == {name: f"compresso.{home}" for name, home in compresso._HOME.items()}
    assert sorted(told) == PUBLIC


def test_no_module_hides_a_public_function() -> None:
    """Python sets a submodule as an attribute of its package: one named like a public function would replace it."""
    for module in pkgutil.walk_packages(compresso.__path__, "compresso."):
        if not module.name.endswith(("_process", "configuration_decilm")):  # programs that other processes run
            importlib.import_module(module.name)
    for name in FUNCTIONS:
        assert inspect.isfunction(getattr(compresso, name)), name


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_functions_are_typed_and_documented(name: str) -> None:
    """Every argument has a type, and a word in the docstring, which also names the errors."""
    function = getattr(compresso, name)
    signature = inspect.signature(function)
    assert signature.return_annotation is not signature.empty
    said = inspect.getdoc(function) or ""
    assert "Raises" in said
    for one in signature.parameters.values():
        assert one.annotation is not one.empty, one
        assert re.search(rf"\b{one.name}\b", said), one


def test_importing_compresso_imports_nothing_heavy() -> None:
    loaded = python("import compresso, sys; print(*sys.modules)").split()
    assert {"torch", "transformers", "numpy", "peft"}.isdisjoint(loaded)


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose layers have widths of their own."""
    folder = tmp_path_factory.mktemp("public") / "native"
    save_checkpoint(narrow_model("llama", UNEVEN), UNEVEN, folder, layout="native")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import compresso; from transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM; import compresso",
        "import transformers; import compresso; from transformers import AutoModelForCausalLM",
        "import compresso; import peft; from transformers import AutoModelForCausalLM",
        "import compresso; import compresso.native; from transformers import AutoModelForCausalLM",
        "import compresso; from transformers.models.auto.modeling_auto import AutoModelForCausalLM",
        "import compresso; import transformers.generation.utils; from transformers import AutoModelForCausalLM",
        "import compresso; compresso.run; from transformers import AutoModelForCausalLM",
    ],
)
def test_transformers_opens_native_checkpoints_after_import(native: Path, imports: str) -> None:
    program = f"import sys; {imports}; print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)"
    assert python(program, str(native)).splitlines()[-1] == "CompressoLlamaForCausalLM"


@pytest.mark.slow
def test_a_config_needs_no_model_class(native: Path) -> None:
    program = (
        "import compresso, sys; from transformers import AutoConfig;"
        " print(AutoConfig.from_pretrained(sys.argv[1]).model_type, sum(map(repr(sys.meta_path).count, ['compresso'])))"
    )
    assert python(program, str(native)).splitlines()[-1] == "compresso_llama 0"  # and the hook is gone


def test_importing_compresso_registers_its_models() -> None:
    assert AutoConfig.for_model("compresso_llama", head_dim=8).model_type == "compresso_llama"


@pytest.mark.slow
@pytest.mark.usefixtures("quick_reopening")
def test_run_takes_the_budgets_of_the_command_line(tiny_folder: Path, tmp_path: Path) -> None:
    shares = {}
    for name, budget in {
        "keep": {"keep": 0.5},
        "parameters": {"parameters": "0.05M"},
        "macs": {"macs": 1.25},
        "sets": {"sets": ["stages.magnitude_structured.keep=0.5"]},
        "target": {"keep": 0.5, "target": "vllm:tp2"},
    }.items():
        result = compresso.run(
            PRUNE_ONLY, tiny_folder, output=tmp_path / name, quiet=True, allow_collapsed=True, **budget
        )  # type: ignore[arg-type]
        before, after = result.records["before"], result.records["after"]
        shares[name] = after["parameters"]["blocks"] / before["parameters"]["blocks"]
        planned = compresso.plan(PRUNE_ONLY, tiny_folder, **budget)["after"]  # type: ignore[arg-type]
        assert planned["parameters"] == after["parameters"]
        if name == "parameters":
            assert 48_000 < after["parameters"]["total"] <= 50_000
        if name == "macs":
            assert 0.75 < after["macs_per_token"] / before["macs_per_token"] <= 1 / 1.25
    assert 0.45 < shares["keep"] == shares["sets"] <= 0.5
    assert json.loads((tmp_path / "keep" / "records.json").read_text())["recipe"]["stages"][0]["magnitude_structured"][
        "keep"
    ] == pytest.approx(0.5)
    with pytest.raises(BudgetError, match="keep= and macs= are two budgets"):
        compresso.run(PRUNE_ONLY, tiny_folder, output=tmp_path / "none", keep=0.5, macs=2)
    knob = "stages.magnitude_structured.keep=0.6"
    for verb, more in ((compresso.run, {"output": tmp_path / "none"}), (compresso.plan, {})):
        with pytest.raises(BudgetError, match=rf"keep=0.5 and sets=\['{knob}'\] are two budgets; give one"):
            verb(PRUNE_ONLY, tiny_folder, keep=0.5, sets=[knob], **more)  # type: ignore[operator]


@pytest.mark.slow
@pytest.mark.usefixtures("quick_reopening")
def test_old_arguments_warn_and_name_the_new_ones(tiny_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.warns(DeprecationWarning, match="force= is deprecated and goes with compresso 0.3; give overwrite="):
        compresso.run(PRUNE_ONLY, tiny_folder, output=output, quiet=True, force=True)
    with pytest.warns(DeprecationWarning, match="force= is deprecated"):  # what it did: replace, and write
        compresso.run(PRUNE_ONLY, tiny_folder, output=output, quiet=True, force=True)
    with (
        pytest.warns(DeprecationWarning, match="stream= is deprecated and goes with compresso 0.3; give offload="),
        pytest.raises(RecipeError, match="cannot be offloaded"),
    ):
        compresso.run(PRUNE_ONLY, tiny_folder, output=tmp_path / "other", quiet=True, stream=True)


def untimed(facts: Any) -> Any:
    """The facts of a plan without the seconds, which depend on how busy the machine is."""
    if isinstance(facts, list):
        return [untimed(one) for one in facts]
    return {k: untimed(v) for k, v in facts.items() if "seconds" not in k} if isinstance(facts, dict) else facts


def test_commands_print_what_the_functions_return(call: Call, tiny_folder: Path) -> None:
    code, out, _ = call("plan", "magnitude-structured", "--model", tiny_folder, "--keep", 0.5, "--json")
    assert code == 0
    facts = compresso.plan("magnitude-structured", tiny_folder, keep=0.5)
    assert untimed(json.loads(out)) == untimed(json.loads(json.dumps(facts)))
    assert json.loads(call("inspect", tiny_folder, "--json")[1]) == compresso.inspect(tiny_folder)


def test_messages_and_docstrings_name_what_exists() -> None:
    """Every dotted name below `compresso` in a string of the package is a module, or a name in one."""
    for path in Path(compresso.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                for name in re.findall(r"(?<![\w/.-])compresso((?:\.[A-Za-z_]\w*)+)", node.value):
                    assert exists(f"compresso{name}"), f"{path.name} names compresso{name}"


def exists(dotted: str) -> bool:
    """Whether a dotted name can be imported, or is an attribute of what can."""
    module, _, attribute = dotted.rpartition(".")
    try:
        if importlib.util.find_spec(dotted) is not None:
            return True
    except ModuleNotFoundError:
        pass  # what stands above it is no package
    return hasattr(importlib.import_module(module), attribute)
