"""Every stage on every family, and its other knobs on four of them: a cell of the table runs and its result computes
the same once reopened, or it refuses in one line with a cure; the refusals are written down here, one by one.
"""

import re
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

import compresso
from compresso.data import nano
from compresso.errors import CompressoError
from compresso.stage import card, cards

TOKENS = {"vocab_size": 1024, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SIZES = {**TOKENS, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 128}
ROTARY = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 48}
FAMILIES: Mapping[str, Callable[[], PreTrainedConfig]] = {
    "llama": partial(LlamaConfig, **ROTARY, head_dim=8),
    "mistral": partial(MistralConfig, **ROTARY, head_dim=8),
    "qwen2": partial(Qwen2Config, **ROTARY),
    "qwen3": partial(Qwen3Config, **ROTARY, head_dim=8, tie_word_embeddings=True),
    "phi3": partial(Phi3Config, **ROTARY),
    "gemma2": partial(Gemma2Config, **ROTARY, head_dim=8),
    "gemma3": partial(Gemma3TextConfig, **ROTARY, head_dim=8),
    "gpt2": partial(GPT2Config, **TOKENS, n_embd=32, n_layer=3, n_head=4, n_positions=128, n_inner=48),
    "gpt_neox": partial(GPTNeoXConfig, **SIZES, intermediate_size=48),
    "opt": partial(OPTConfig, **SIZES, ffn_dim=48, word_embed_proj_dim=32),
}
LOOKS = {"batches": 1, "batch": 4, "micro_batch": 4}
STEPS = {"batch": 4, "micro_batch": 4}
LORA = {**STEPS, "rank": 2, "alpha": 4, "lr": 1e-3}
SWEPT = {"calibration": {"examples": 4, "batch": 4}}
BOTH = ["head", "channel"]
Stages = list[dict[str, dict[str, Any]]]


def score(kinds: list[str], **knobs: Any) -> Stages:
    return [{"gate_taylor": {"keep": 0.7, "kinds": kinds, **LOOKS, **knobs}}]


def drop(kinds: list[str], **knobs: Any) -> Stages:
    return [{"drop_layers": {"drop": 1, "kinds": kinds, **LOOKS, **knobs}}]


def gates(kinds: list[str], **knobs: Any) -> Stages:
    phases = {"tune": 0, "ramp": 1, "hold": 1}
    return [{"learn_gates": {"keep": 0.7, "kinds": kinds, **phases, **LORA, "score_batches": 1, **knobs}}]


VARIANTS: Mapping[str, Stages] = {
    "magnitude_structured": [{"magnitude_structured": {"keep": 0.7}}],
    "filter_pruning": [{"filter_pruning": {"keep": 0.7}}],
    "magnitude_structured of hidden": [{"magnitude_structured": {"keep": 0.7, "kinds": ["hidden"]}}],
    "gate_taylor": score(BOTH),
    "gate_taylor uniform": score(BOTH, layout="uniform"),
    "gate_taylor of channels": score(["channel"], layout="uniform"),
    "gate_taylor of hidden": score(["channel", "hidden"], layout="uniform"),
    "gate_taylor of layers": score(["layer"]),
    "gate_taylor of macs": score(["channel"], keep=0.9, layout="uniform", of="macs"),
    "gate_taylor of kv": score(["head"], keep=0.5, of="kv", layout="uniform"),
    "minitron": [{"minitron": {"keep": 0.7, **LOOKS}}],
    "minitron of all": [{"minitron": {"keep": 0.6, "kinds": ["head", "channel", "hidden", "layer"], **LOOKS}}],
    "minitron candidates": [{"minitron": {"keep": 0.7, "candidates": 2, "candidate_batches": 1, **LOOKS}}],
    "contextual": [{"contextual": {"keep": 0.7, "layout": "uniform", **LOOKS}}],
    "contextual of heads": [{"contextual": {"keep": 0.7, "kinds": BOTH, **LOOKS}}],
    "contextual_thresholds": [
        {"contextual_thresholds": {"linear": 1e-4, "activation": 1e-4, "windows": 4, **STEPS, "steps": 1}}
    ],
    "cut_vocab": [{"cut_vocab": {"most": 700}}],
    "cut_vocab then gate_taylor": [{"cut_vocab": {"most": 700}}, *score(["channel"], layout="uniform")],
    "drop_layers": drop(["layer"]),
    "drop_layers in a run": drop(["layer"], score="angular"),
    "drop_layers by loss": drop(["layer"], score="perplexity"),
    "drop_layers of attention": drop(["attention"]),
    "drop_layers of mlp": drop(["mlp"], score="random"),
    "drop_layers of parts": drop(["attention", "mlp"], drop=2, score="reverse"),
    "drop_experts": [{"drop_experts": {"keep": 0.75, "score": "reap", **LOOKS}}],
    "keep_layers": [{"keep_layers": {"layers": [0, 2]}}],
    "llm_pruner": [{"llm_pruner": {"keep": 0.7, "batch": 4, "micro_batch": 4}}],
    "llm_pruner uniform": [{"llm_pruner": {"keep": 0.7, "layout": "uniform", "batch": 4, "micro_batch": 4}}],
    "llm_pruner channel": [{"llm_pruner": {"ratio": 0.25, "scope": "channel", "batch": 4, "micro_batch": 4}}],
    "llm_pruner layer": [{"llm_pruner": {"ratio": 0.3, "scope": "layer", "batch": 4, "micro_batch": 4}}],
    "loraprune": [{"loraprune": {"keep": 0.8, "steps": 2, "spared": 0.0, "every": 1, **LORA}}],
    "loraprune of channels": [
        {"loraprune": {"keep": 0.8, "kinds": ["channel"], "layout": "uniform", "steps": 2, "spared": 0.0, **LORA}}
    ],
    "lorashear": [
        {
            "lorashear": {
                "keep": 0.8,
                "unprunable": 0.0,
                "batches": 1,
                "tune": 1,
                "shrink": 2,
                "periods": 1,
                **LORA,
            }
        }
    ],
    "learn_gates": gates(["head", "channel", "hidden"]),
    "learn_gates uniform": gates(["channel"], layout="uniform"),
    "learn_gates projected": gates(BOTH, constraint="projection", start="score", finish="hard", noise="example"),
    "bonsai": [{"bonsai": {"keep": 0.8, "masks": 10, "round_share": 0.2, **LOOKS}}],
    "bonsai of channels": [
        {"bonsai": {"keep": 0.8, "kinds": ["channel"], "layout": "uniform", "masks": 10, "round_share": 0.2, **LOOKS}}
    ],
    "evopress": [{"evopress": {"keep": 0.8, "search": "dp", "finalists": 1, "texts": 2, **LOOKS}}],
    "evopress of layers": [
        {"evopress": {"keep": 0.7, "kinds": ["layer"], "search": "dp", "finalists": 1, "texts": 2, **LOOKS}}
    ],
    "sparse_finetune": [
        {"magnitude": {"sparsity": 0.5}},
        {"sparse_finetune": {"steps": 2, "batch": 4, "micro_batch": 4, "kl_weight": 0.5}},
    ],
    "homodistil": [{"homodistil": {"keep": 0.8, "of": "blocks", "kinds": ["channel"], "cuts": 1, **STEPS, "steps": 2}}],
    "homodistil of all": [
        {
            "homodistil": {
                "keep": 0.8,
                "of": "blocks",
                "kinds": ["head", "channel", "hidden"],
                "cuts": 2,
                **STEPS,
                "steps": 3,
            }
        }
    ],
    "ristretto": [
        {"ristretto": {"keep": 0.8, "search": "dp", "beginnings": 2, "judge_rows": 2, "texts": 2, "steps": 3, **LOOKS}}
    ],
    "ziplm": [{"ziplm": {"keep": 0.8, "search": {"evaluations": 4}, "examples": 8, "judge_rows": 2, "steps": 3}}],
    "repair": [*score(["channel"], layout="uniform"), {"repair": {"examples": 8, "batch": 4}}],
    "magnitude": [{"magnitude": {"sparsity": 0.5}}],
    "wanda": [{"wanda": {"sparsity": 0.5, **SWEPT}}],
    "sparsegpt": [{"sparsegpt": {"pattern": "2:4", **SWEPT}}],
    "owl": [{"owl": {"sparsity": 0.6, **SWEPT}}],
    "besa": [{"besa": {"sparsity": 0.5, **SWEPT}}],
    "besa of rows": [{"besa": {"per": "row", "bits": 4, "reference": "model", **SWEPT}}],
    "e_sparse": [{"e_sparse": {"block": 8, **SWEPT}}],
    "svd": [{"svd": SWEPT}],
    "svd updated": [{"svd": {"moments": "updated", "keep": 0.5, **SWEPT}}],
    "svd then its factors": [{"svd": SWEPT}, {"recover": {"train": "factors", "steps": 2, **LORA}}],
    "svd plain": [{"svd": {"whiten": "none", "keep": 0.5, **SWEPT}}],
    "rtn": [{"rtn": {"bits": 4, "group": 16}}],
    "gptq": [{"gptq": {"bits": 4, "group": 16, **SWEPT}}],
    "awq": [{"awq": {"bits": 4, "group": 16, **SWEPT}}],
    "smoothquant": [{"smoothquant": SWEPT}],
    "qat": [{"qat": {"steps": 2, **STEPS}}],
    "qat pruned": [
        {"qat": {"steps": 2, **STEPS, "weight_bits": 8, "channels_kept": 0.5, "heads_kept": 0.5, "inputs": "learned"}}
    ],
    "skip_in_prefill": [{"skip_in_prefill": {"skip": 0.3, **LOOKS}}],
    "slicegpt": [{"slicegpt": {"only_if_smaller": False, "examples": 8, "batch": 4}}],
    "slicegpt then recover": [
        {"slicegpt": {"only_if_smaller": False, "examples": 8, "batch": 4}},
        {"recover": {"steps": 1, **LORA}},
    ],
    "context_gates": [{"context_gates": {"keep_context": 0.5, "steps": 1, **STEPS}}],
    "context_gates alone": [{"context_gates": {"keep_context": 0.5, "steps": 1, "train": "gates", **STEPS}}],
    "recover": [{"recover": {"steps": 1, **LORA}}],
    "distill": [*score(["channel"], layout="uniform"), {"distill": {"steps": 1, **LORA}}],
    "distill cached": [
        *score(["channel"], layout="uniform"),
        {"distill": {"steps": 1, **LORA, "teacher": "cached", "teacher_top": 16}},
    ],
    "token_distill": [*score(["channel"], layout="uniform"), {"token_distill": {"steps": 1, **STEPS, "lr": 1e-3}}],
    "finetune": [{"finetune": {"steps": 1, **STEPS}}],
}

LEFT_OUT = {"recover_knowledge"}
"""Needs two named sources of data, and is tested with them in tests/methods."""
PATCHES = ("skip_in_prefill", "slicegpt", "context_gates alone")
"""Change how a model runs and none of its weights."""

NO_HEAD_DIM = ("gpt2", "gpt_neox", "opt")
"""Configs that take the width of a head from the hidden size, so that heads cannot leave."""
LAYER_NORM = ("gpt2", "gpt_neox", "opt")
GEMMA = ("gemma2", "gemma3")
LACKING = {
    **dict.fromkeys((*LAYER_NORM, *GEMMA), frozenset({"hidden"})),
    **dict.fromkeys(NO_HEAD_DIM, frozenset({"hidden", "query"})),
}
"""Kinds of units that a family does not have."""
Cells = Mapping[str, tuple[str, ...]]
REFUSED: Mapping[str, Cells] = {
    r"the context of a .* cannot be pruned; wanted one of llama": dict.fromkeys(
        ("context_gates", "context_gates alone"), ("phi3", "gemma2", "gemma3", "opt")
    ),
    r"kinds: \[channel\]": dict.fromkeys(
        (
            "magnitude_structured",
            "gate_taylor",
            "gate_taylor uniform",
            "gate_taylor of kv",
            "contextual of heads",
            "learn_gates",
            "learn_gates projected",
            "bonsai",
            "homodistil of all",
            "ristretto",
            "ziplm",
        ),
        NO_HEAD_DIM,
    )
    | dict.fromkeys(("loraprune", "lorashear"), ("gpt_neox", "opt")),
    r"Stage 'llm_pruner' has no kinds to leave out: take one that has": dict.fromkeys(
        ("llm_pruner", "llm_pruner uniform"), NO_HEAD_DIM
    ),
    r"is a Conv1D, .* prune this model by its weights or gradients": dict.fromkeys(
        ("loraprune", "loraprune of channels", "lorashear"), ("gpt2",)
    ),
    r"linears of a gpt2 are Conv1D, .* give train: lora": {"svd then its factors": ("gpt2",)},
    r"no units of the kinds hidden; it has .*: name some of those": {
        "magnitude_structured of hidden": (*LAYER_NORM, *GEMMA),
    },
    r"hidden, and the model has none that can leave; give scope: block": {"llm_pruner channel": (*LAYER_NORM, *GEMMA)},
    r"cannot be sliced: wanted norms that lie before one sub-layer each, of llama": dict.fromkeys(
        ("slicegpt", "slicegpt then recover"), ("phi3", "gpt_neox", *GEMMA)
    ),
    r"keep some in every layer, or drop whole layers": dict.fromkeys(
        ("drop_layers of attention", "drop_layers of mlp", "drop_layers of parts", "evopress"),
        (*NO_HEAD_DIM, *GEMMA, "phi3"),
    ),
    r"has no experts that could leave; use a stage that removes heads, channels or layers": {
        "drop_experts": tuple(FAMILIES)
    },
}
"""What refuses, by what its message has to say. Llama, Mistral, Qwen2 and Qwen3 run whatever there is."""
SHAPES = ("llama", "phi3", "gemma2", "gpt2")
"""Families for the second and later variants of a stage: plain linears, fused ones, norms behind sub-layers, Conv1D."""
FIRST = {tuple(stages[-1]): variant for variant, stages in reversed(VARIANTS.items())}.values()
"""The first variant of each stage, which runs on every family."""
CELLS = [
    (variant, name)
    for variant in VARIANTS
    for name in FAMILIES
    if variant in FIRST or name in SHAPES or any(name in cells.get(variant, ()) for cells in REFUSED.values())
]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with a tiny model of a family, whose weights are large enough to tell units apart."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("families") / name
            model = AutoModelForCausalLM.from_config(FAMILIES[name]())
            generator = torch.Generator().manual_seed(3)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() == 2:
                        parameter.normal_(0, 0.2, generator=generator)
            model.save_pretrained(made[name])
            AutoTokenizer.from_pretrained(nano.path()).save_pretrained(made[name])
        return made[name]

    return folder


@pytest.fixture(scope="module")
def dense(family: Callable[[str], Path]) -> Callable[[str], dict[str, torch.Tensor]]:
    """The weights that a family's model had."""
    return cache(lambda name: AutoModelForCausalLM.from_pretrained(family(name), dtype=torch.float32).state_dict())


def refusal(variant: str, name: str) -> str | None:
    """What a cell is expected to say, as a pattern; None where it runs."""
    return next((cure for cure, cells in REFUSED.items() if name in cells.get(variant, ())), None)


def test_the_table_is_whole() -> None:
    assert len(VARIANTS) >= 30 and len(FAMILIES) >= 10
    for cells in REFUSED.values():
        assert cells.keys() <= VARIANTS.keys() and all(set(names) <= FAMILIES.keys() for names in cells.values())
    assert {next(iter(stage)) for stages in VARIANTS.values() for stage in stages} >= {*cards()} - LEFT_OUT


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "name"), CELLS)
@pytest.mark.usefixtures("quick_reopening", "no_charts")
def test_a_stage_runs_on_a_family_or_says_what_would(
    variant: str,
    name: str,
    family: Callable[[str], Path],
    dense: Callable[[str], dict[str, torch.Tensor]],
    instructions: Path,
    tmp_path: Path,
) -> None:
    stages, wanted = VARIANTS[variant], refusal(variant, name)
    data = {"max_length": 32, "held": 4, "prompt": False, "pack": False, "limit": 16}
    raw = {"name": "cell", "data": data, "stages": stages}
    reads = any("data" in card(stage).needs for knobs in stages for stage in knobs)
    try:
        result = compresso.run(
            raw,
            family(name),
            instructions if reads else None,
            output=tmp_path / "out",
            measure="none",
            allow_collapsed=True,
            quiet=True,
        )
    except CompressoError as error:
        assert wanted is not None, f"a refusal that is not expected: {error}"
        assert "\n" not in str(error) and re.search(wanted, str(error)), str(error)
        assert not (tmp_path / "out").exists()
        return
    assert wanted is None, "it ran, and was expected to refuse"

    kinds = {kind for knobs in stages for stage in knobs.values() for kind in stage.get("kinds", ())}
    if variant in ("minitron", "minitron candidates"):
        kinds = {"channel", "hidden"}
    if variant == "bonsai":
        kinds = {"head", "query", "channel"}
    lacking = [facts["lacking_kinds"] for facts in result.records["stages"].values() if "lacking_kinds" in facts]
    assert bool(lacking) == bool(kinds & LACKING.get(name, frozenset())), lacking

    changed, before = result.model.cpu().state_dict(), dense(name)
    assert (
        variant in PATCHES
        or any(
            tensor.shape != before[key].shape or not torch.equal(tensor, before[key])
            for key, tensor in changed.items()
            if key in before
        )
        or changed.keys() != before.keys()
    )
    ids = torch.arange(3, 40).unsqueeze(0)
    opened = (
        compresso.load(tmp_path / "out", dtype=torch.float32).model
        if result.records["patches"]
        else AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    )
    with torch.no_grad():
        logits, again = (model.eval()(input_ids=ids).logits for model in (result.model, opened))
    torch.testing.assert_close(again, logits, rtol=0, atol=1e-4)
