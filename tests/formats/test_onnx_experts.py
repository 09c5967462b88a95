"""Mixtures of experts in ONNX graphs: what transformers computes, in both engines, prompt and cached steps.

Oracles: transformers' own loop over the experts that were hit; not-a-number in an expert that no token chose, which any
product with it would show.
"""

import copy
import functools
import importlib.util
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel
from transformers.models.deepseek_v2 import modeling_deepseek_v2

from compresso.arch.base import arch_for
from compresso.commands.export import export
from compresso.core.plan import Plan
from compresso.edit.shrink import shrink_
from compresso.engines.transformers_process import continued
from compresso.errors import ExportError
from compresso.formats.onnx import quiet, save_onnx
from compresso.formats.onnx_experts import by_expert, experts_apart, mend_splits, translations
from compresso.formats.onnx_rotary import real_numbers, turned
from tests.arch.conftest import MIXTURES, _original
from tests.native.test_modeling_moe import CONFIGS, PLANS, written

pytest.importorskip("onnxscript", reason="onnxscript: not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime: not installed")
from compresso.engines.onnx_runtime import OnnxModel
from compresso.engines.openvino import OpenVinoModel

no_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino: not installed")
ENGINES = [OnnxModel, pytest.param(OpenVinoModel, marks=no_openvino)]
IDS = torch.randint(2, 97, (9,), generator=torch.Generator().manual_seed(3))


def states_of(model: nn.Module) -> dict[str, int]:
    """Which tensor lies under each name."""
    return {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}


@torch.no_grad()
@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("tokens", [1, 9])
def test_experts_that_are_taken_apart_compute_what_the_loop_does(name: str, tokens: int) -> None:
    model = copy.deepcopy(_original(name))
    assert model.config._experts_implementation == "eager"
    states, ids = states_of(model), IDS[:tokens].unsqueeze(0)
    wanted = model(input_ids=ids).logits
    with experts_apart(model):
        found = model(input_ids=ids).logits
        assert not any(parameter.dim() == 3 for parameter in model.parameters())
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert states_of(model) == states


def two_layers(name: str) -> PreTrainedModel:
    """A tiny model of two layers, of which one expert of each group has left a mixture."""
    model = copy.deepcopy(_original(name))
    axes = arch_for(model.config).axes(model)
    experts = next(axis for axis in axes if axis.name == "layers.3.experts")
    each = experts.size // experts.groups
    left = tuple(unit for unit in range(experts.size) if unit % each != 1)
    shrink_(model, axes, Plan({"layers": (1, 3), experts.name: left}))
    model.set_experts_implementation("grouped_mm")
    return model


Exported = Callable[..., tuple[PreTrainedModel, Path]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """exported(name, dtype): a model and its folder, which tests share, for an export takes seconds."""

    @functools.cache
    def once(name: str, dtype: str = "f32") -> tuple[PreTrainedModel, Path]:
        model = two_layers(name)
        folder = tmp_path_factory.mktemp("onnx") / name
        save_onnx(model, arch_for(model.config).shapes(model), folder, dtype=dtype)
        return model, folder

    return once


def same_in(engine: type[OnnxModel], folder: Path, model: PreTrainedModel) -> OnnxModel:
    """The graph, after prompt, chunks, cached tokens and a batch were compared with the model."""
    graph = engine(folder, threads=1)
    logits, greedy = continued(model, IDS)
    whole, cache = graph(IDS.unsqueeze(0), graph.empty())
    torch.testing.assert_close(whole[0], logits, atol=1e-4, rtol=1e-4)
    assert graph.greedy(IDS, len(greedy)).tolist() == greedy.tolist()
    pieces, past = list[Tensor](), graph.empty()
    for chunk in (IDS[:1], IDS[1:6], IDS[6:]):
        found, past = graph(chunk.unsqueeze(0), past)
        pieces.append(found)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-4, rtol=1e-4)
    assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(cache, past, strict=True))
    both, _ = graph(torch.stack([IDS, IDS.flip(0)]), graph.empty(2))
    torch.testing.assert_close(both[0], logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(both[1], continued(model, IDS.flip(0))[0], atol=1e-4, rtol=1e-4)
    return graph


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("engine", ENGINES)
def test_prompt_chunks_and_tokens_are_those_of_transformers(
    name: str, engine: type[OnnxModel], exported: Exported
) -> None:
    model, folder = exported(name)
    same_in(engine, folder, model)
    assert model.config._experts_implementation == "grouped_mm"
    assert "grouped_mm" not in (folder / "config.json").read_text()


@pytest.mark.slow
def test_a_compressed_cache_has_two_widths(exported: Exported) -> None:
    """Of one head: the vector that all heads are made of, and the part with positions."""
    cache = json.loads((exported("moe_deepseek")[1] / "config.json").read_text())["compresso_cache"]
    assert cache == {"heads": [1, 1], "head_dim": 20, "value_dim": 8}


@pytest.mark.slow
@pytest.mark.parametrize("family", CONFIGS)
def test_layers_that_differ_are_written_too(family: str, tmp_path: Path) -> None:
    """One without its mixture, two without their attention, unequal numbers of experts, reopened as `native`."""
    model = written(family, PLANS["all of it"], tmp_path / "native")
    told = export(tmp_path / "native", tmp_path / "onnx", format="onnx")
    assert told["checked"] == "opened in ONNX Runtime" and told["difference"] < 1e-4 and told["same_tokens"] == 8
    if importlib.util.find_spec("openvino"):
        same_in(OpenVinoModel, tmp_path / "onnx", model)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_an_expert_that_no_token_chose_is_not_computed(engine: type[OnnxModel], tmp_path: Path) -> None:
    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=97,
        num_local_experts=5,
        num_experts_per_tok=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = MixtralForCausalLM(config).eval()
    logits, _ = continued(model, IDS[:1])
    experts: Any = model.get_submodule("model.layers.0.mlp.experts")
    chosen: list[Tensor] = []
    with experts.register_forward_pre_hook(lambda _, given: chosen.append(given[1])), torch.no_grad():
        model(input_ids=IDS[:1].unsqueeze(0))
    others = [number for number in range(5) if number not in chosen[0]]
    experts.gate_up_proj.data[others] = torch.nan
    assert len(others) == 3
    save_onnx(model, arch_for(config).shapes(model), tmp_path / "onnx")
    graph = engine(tmp_path / "onnx", threads=1)
    found, _ = graph(IDS[:1].unsqueeze(0), graph.empty())
    torch.testing.assert_close(found[0], logits, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_eight_bits_round_experts_like_other_matrices(engine: type[OnnxModel], exported: Exported) -> None:
    onnx = importlib.import_module("onnx")
    model, folder = exported("moe_mixtral", "int8")
    kept: list[Any] = list(onnx.load(folder / "model.onnx").graph.initializer)
    matrices = Counter(one.data_type for one in kept if tuple(one.dims) in ((64, 2 * 176), (176, 64)))
    assert matrices == {onnx.TensorProto.INT8: 2 * (6 + 5)}
    graph = engine(folder, threads=1)
    logits, _ = continued(model, IDS)
    found, past = graph(IDS.unsqueeze(0), graph.empty())
    assert 1e-4 < float((found[0] - logits).abs().max()) < 0.5 * float(logits.abs().max())
    assert graph(IDS[:1].unsqueeze(0), past)[0].isfinite().all()


def test_a_model_is_whole_again_after_an_export_that_failed(tmp_path: Path) -> None:
    model = two_layers("moe_mixtral")
    states, modules = states_of(model), dict(model.named_modules())
    model.model.rotary_emb.forward = lambda *_, **__: 1 / 0  # type: ignore[assignment]
    with pytest.raises(ExportError, match="torch cannot write MixtralForCausalLM as ONNX: ZeroDivisionError"):
        save_onnx(model, arch_for(model.config).shapes(model), tmp_path / "onnx")
    assert states_of(model) == states and dict(model.named_modules()) == modules
    assert model.config._experts_implementation == "grouped_mm" and not list(tmp_path.iterdir())


def test_states_are_turned_by_real_numbers_as_by_complex_ones_and_only_meanwhile() -> None:
    stock, model = modeling_deepseek_v2.apply_rotary_emb, _original("moe_deepseek_v2")
    generator = torch.Generator().manual_seed(5)
    queries, keys = (torch.randn(2, heads, 5, 8, generator=generator) for heads in (3, 1))
    angles = torch.polar(torch.ones(2, 5, 4), torch.randn(2, 5, 4, generator=generator))
    with pytest.raises(ZeroDivisionError), real_numbers(model):
        assert modeling_deepseek_v2.apply_rotary_emb is turned
        raise ZeroDivisionError
    assert modeling_deepseek_v2.apply_rotary_emb is stock
    for found, wanted in zip(turned(queries, keys, angles), stock(queries, keys, angles), strict=True):
        torch.testing.assert_close(found, wanted)
    with real_numbers(_original("moe_deepseek")):
        assert modeling_deepseek_v2.apply_rotary_emb is stock


class _Product(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        self.matrices = nn.ParameterList(torch.randn(4, 3) for _ in range(experts))

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        return by_expert(rows, counts, list(self.matrices))


@pytest.mark.slow
@pytest.mark.parametrize("counts", [(5,), (0, 3, 2), (5, 0)])
def test_pieces_may_be_empty_and_one_is_a_piece(counts: tuple[int, ...], tmp_path: Path) -> None:
    runtime = importlib.import_module("onnxruntime")
    torch.manual_seed(0)
    model, rows, given = _Product(len(counts)).eval(), torch.randn(5, 4), torch.tensor(counts)
    with quiet():
        program: Any = torch.onnx.export(
            model,
            (rows, given),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("rows")}, None),
            custom_translation_table=translations(),
            verbose=False,
        )
    mend_splits(program.model)
    program.save(str(tmp_path / "model.onnx"))
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"))
    names = [one.name for one in session.get_inputs()]
    numbers = torch.arange(len(counts)).repeat_interleave(given)
    wanted = torch.stack([row @ model.matrices[number] for row, number in zip(rows, numbers.tolist(), strict=True)])
    said = dict(zip(names, (rows.numpy(), given.numpy()), strict=False))
    found = session.run(None, said)[0]
    torch.testing.assert_close(torch.from_numpy(found), wanted.detach())
