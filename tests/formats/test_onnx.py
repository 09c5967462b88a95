"""ONNX graphs in ONNX Runtime: what transformers computes, prompt and cached steps, whatever the widths."""

import copy
import functools
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from compresso.arch.base import LayerShape
from compresso.core.plan import Plan
from compresso.edit.shrink import shrink_
from compresso.engines.transformers_process import continued
from compresso.errors import ExportError
from compresso.formats import onnx as module
from compresso.formats.onnx import save_onnx
from tests.arch.conftest import _original
from tests.arch.test_laws import described

pytest.importorskip("onnxscript", reason="onnxscript: not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime: not installed")
from compresso.engines.onnx_runtime import OnnxModel
from compresso.engines.openvino import OpenVinoModel

pytestmark = pytest.mark.slow  # each export takes seconds
no_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino: not installed")
ENGINES = [OnnxModel, pytest.param(OpenVinoModel, marks=no_openvino)]
IDS = torch.randint(2, 128, (9,), generator=torch.Generator().manual_seed(3))


def pruned_or_not(name: str, pruned: bool) -> tuple[PreTrainedModel, list[LayerShape]]:
    """A tiny model, and the widths of its layers. Pruned: a layer without attention, one without FFN, and other widths
    in every layer.
    """
    model = copy.deepcopy(_original(name))
    arch, axes = described(model)
    if pruned:
        kept = {"layers.3.heads": (0,), "attention": (0, 1, 3), "mlp": (0, 2, 3), "layers.0.channels": (2, 3, 5, 7, 11)}
        shrink_(model, axes, Plan(kept))
    return model, arch.shapes(model)


Exported = Callable[[str, bool], tuple[PreTrainedModel, Path]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """exported(name, pruned): a model and its folder in float32, which tests share, for an export takes seconds."""

    @functools.cache
    def once(name: str, pruned: bool) -> tuple[PreTrainedModel, Path]:
        model, shapes = pruned_or_not(name, pruned)
        folder = tmp_path_factory.mktemp("onnx") / name
        save_onnx(model, shapes, folder)
        return model, folder

    return once


@pytest.mark.parametrize(
    ("name", "pruned"),
    [("llama_gqa", True), ("llama_mha", False), ("mistral", True), ("qwen3", True), ("phi3", True), ("gpt2", False)],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_prompt_chunks_and_tokens_are_those_of_transformers(
    name: str, pruned: bool, engine: type[OnnxModel], exported: Exported
) -> None:
    model, folder = exported(name, pruned)
    graph = engine(folder, threads=1)
    logits, greedy = continued(model, IDS)
    whole, cache = graph(IDS.unsqueeze(0), graph.empty())
    torch.testing.assert_close(whole[0], logits, atol=1e-4, rtol=1e-4)
    assert graph.greedy(IDS, len(greedy)).tolist() == greedy.tolist()
    pieces, past = list[torch.Tensor](), graph.empty()
    for chunk in (IDS[:1], IDS[1:6], IDS[6:]):
        found, past = graph(chunk.unsqueeze(0), past)
        pieces.append(found)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-4, rtol=1e-4)
    assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(cache, past, strict=True))
    if pruned:
        assert [tensor.shape[1] for tensor in cache][-2:] == [1, 1] and cache[0].shape[1] > 1 and len(cache) == 2 * 3


def test_a_padded_row_computes_what_it_does_alone(exported: Exported) -> None:
    graph = OnnxModel(exported("llama_gqa", True)[1], threads=1)
    ids = torch.stack([IDS, torch.cat([torch.zeros(4, dtype=torch.long), IDS[:5]])])
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    both, past = graph(ids, graph.empty(2), mask)
    alone, own = graph(IDS[:5].unsqueeze(0), graph.empty())
    torch.testing.assert_close(both[1, 4:], alone[0], atol=1e-4, rtol=1e-4)
    one = torch.tensor([[7], [7]])
    both, _ = graph(one, past, torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1))
    torch.testing.assert_close(both[1], graph(one[:1], own)[0][0], atol=1e-4, rtol=1e-4)


def test_a_graph_does_not_tell_where_it_was_made(exported: Exported) -> None:
    """Neither by lines of source, which torch's exporter notes at each node, nor otherwise."""
    _, folder = exported("llama_mha", False)
    graph = (folder / "model.onnx").read_bytes()
    for place in (sys.prefix, str(Path(torch.__file__).parents[1]), str(Path.home()), ".py"):
        assert place.encode() not in graph


def test_eight_bits_make_the_file_smaller_and_move_the_logits_a_little(tmp_path: Path, exported: Exported) -> None:
    model, whole = exported("llama_mha", False)
    save_onnx(*pruned_or_not("llama_mha", False), tmp_path / "int8", dtype="int8")
    graph = OnnxModel(tmp_path / "int8", threads=1)
    logits, _ = continued(model, IDS)
    found, _ = graph(IDS.unsqueeze(0), graph.empty())
    assert 1e-4 < float((found[0] - logits).abs().max()) < 0.5 * float(logits.abs().max())
    small, large = ((folder / "model.onnx").stat().st_size for folder in (tmp_path / "int8", whole))
    assert small < 0.6 * large
    assert {path.name for path in (tmp_path / "int8").iterdir()} == {
        "model.onnx",
        "config.json",
        "generation_config.json",
    }


def test_large_weights_lie_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_APART", 1000)
    model, shapes = pruned_or_not("llama_mha", False)
    save_onnx(model, shapes, tmp_path / "onnx")
    graph = OnnxModel(tmp_path / "onnx", threads=1)
    assert (tmp_path / "onnx" / "model.onnx.data").stat().st_size > 100_000
    logits, _ = continued(model, IDS)
    torch.testing.assert_close(graph(IDS.unsqueeze(0), graph.empty())[0][0], logits, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(_original("llama_mha"))
    shapes = described(model)[0].shapes(model)
    with pytest.raises(ExportError, match="unknown dtype 'q4' of onnx; known: f32, int8"):
        save_onnx(model, shapes, tmp_path / "onnx", dtype="q4")
    model.model.forward = lambda *_, **__: 1 / 0  # type: ignore[assignment]
    with pytest.raises(ExportError, match="torch cannot write LlamaForCausalLM as ONNX: ") as caught:
        save_onnx(model, shapes, tmp_path / "onnx")
    assert str(caught.value).endswith(" as ONNX: ZeroDivisionError: division by zero")
    monkeypatch.setattr(module.importlib, "import_module", _absent)
    with pytest.raises(ExportError, match="ONNX needs onnxscript; pip install onnx onnxscript onnxruntime"):
        save_onnx(model, shapes, tmp_path / "onnx")
    assert not list(tmp_path.iterdir())


def _absent(name: str) -> None:
    raise ImportError(name)


def test_the_config_says_how_wide_each_cache_is(exported: Exported) -> None:
    cache = json.loads((exported("llama_gqa", True)[1] / "config.json").read_text())["compresso_cache"]
    assert cache == {"heads": [2, 2, 1], "head_dim": 8}
