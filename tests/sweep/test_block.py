"""Edits that visit whole blocks: what they are shown, that they may learn, and that nothing depends on where weights
and activations lie or on where a run was cut off.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.sweep.test_sweep import SIZES, ids
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from compresso.arch.base import Arch, arch_for
from compresso.checkpoint.source import open_source
from compresso.errors import NumericError, RecipeError
from compresso.observe.folds import squares
from compresso.sweep.activation_store import Place
from compresso.sweep.block import BlockEdit, BlockVisit, Reference
from compresso.sweep.journal import Journal
from compresso.sweep.offload import Offloaded
from compresso.sweep.sweep import sweep
from compresso.sweep.targets import Groups, Where, chosen

MAKE: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, sliding_window=4, query_pre_attn_scalar=4)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            hidden_size=16,
            word_embed_proj_dim=16,
            ffn_dim=24,
            num_hidden_layers=3,
            num_attention_heads=4,
            vocab_size=32,
            max_position_embeddings=64,
        )
    ),
}
BATCHES = [ids(), ids(2, 7, 1)]


def made(name: str = "llama") -> tuple[PreTrainedModel, Arch]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MAKE[name]().eval()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    return model, arch_for(model.config)


def last_linears(model: PreTrainedModel, arch: Arch) -> Groups:
    return chosen(model, arch, Where(modules=("*.down_proj", "*.fc2")[int(model.config.model_type == "opt") :][:1]))


def error_of(visit: BlockVisit) -> Tensor:
    """How far the block is from its dense outputs."""
    return torch.stack(
        [
            (visit.run(batch) - dense).square().mean()
            for batch, dense in zip(visit.batches(), visit.dense_outputs(), strict=True)
        ]
    ).mean()


def reconstructed(model: PreTrainedModel, steps: int = 2) -> Callable[[BlockVisit], Mapping[str, Any]]:
    """Zeros the smaller half of one linear and lets what is left learn the dense outputs."""

    def edit(visit: BlockVisit) -> Mapping[str, Any]:
        name = visit.groups[0].names[0]
        weight = model.get_parameter(f"{name}.weight")
        assert torch.is_grad_enabled() and not any(p.requires_grad for p in visit.block.parameters())
        left = weight.abs() > weight.abs().median()
        weight.requires_grad_(True)
        weight.data.mul_(left)
        with torch.no_grad():
            before = float(error_of(visit))
        adam = torch.optim.Adam([weight], lr=0.01)
        for _ in range(steps):
            adam.zero_grad()
            error_of(visit).backward()
            assert weight.grad is not None
            weight.grad.mul_(left)
            adam.step()
        with torch.no_grad():
            return {name: {"before": before, "after": float(error_of(visit))}}

    return edit


def run(
    name: str, reference: Reference = Reference.BLOCK, steps: int = 2, **how: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    model, arch = made(name)
    found = sweep(
        model, arch, last_linears(model, arch), BATCHES, None, BlockEdit(reconstructed(model, steps), reference), **how
    )
    return found, model.state_dict()


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("reference", Reference)
def test_a_few_steps_bring_a_block_nearer_to_its_dense_outputs(name: str, reference: Reference) -> None:
    dense, _ = made(name)
    found, edited = run(name, reference, steps=10)
    assert len(found) == 3
    assert all(facts["after"] < 0.9 * facts["before"] for facts in found.values())
    changed = {key for key, tensor in dense.state_dict().items() if not torch.equal(tensor, edited[key])}
    assert changed == {f"{linear}.weight" for linear in found}


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("fold", [None, squares])
def test_an_edit_sees_what_the_edited_model_reads_and_the_dense_one_outputs(name: str, fold: Any) -> None:
    seen: dict[Reference, list[tuple[list[Tensor], list[Tensor]]]] = {}
    models: list[PreTrainedModel] = []
    for reference in Reference:
        model, arch = made(name)

        def halve(
            visit: BlockVisit, model: PreTrainedModel = model, reference: Reference = reference
        ) -> dict[str, Any]:
            assert set(visit.seen) == ({visit.groups[0].names[0]} if fold else set())
            batches, outputs = [b.hidden.clone() for b in visit.batches()], [d.clone() for d in visit.dense_outputs()]
            seen.setdefault(reference, []).append((batches, outputs))
            model.get_parameter(f"{visit.groups[0].names[0]}.weight").data.mul_(0.5)
            return {}

        sweep(model, arch, last_linears(model, arch), BATCHES, fold, BlockEdit(halve, reference))
        models.append(model)
    reads, outputs = states_of(models[0]), states_of(made(name)[0])
    for layer in range(3):
        for reference in Reference:
            for mine, plain in zip(seen[reference][layer][0], reads[layer][0], strict=True):
                torch.testing.assert_close(mine, plain)
        for mine, plain in zip(seen[Reference.MODEL][layer][1], outputs[layer][1], strict=True):
            torch.testing.assert_close(mine, plain)
        of_dense_block = [block_of(made(name)[0], layer, reads, i) for i in range(len(BATCHES))]
        for mine, plain in zip(seen[Reference.BLOCK][layer][1], of_dense_block, strict=True):
            torch.testing.assert_close(mine, plain)
    assert not torch.allclose(seen[Reference.BLOCK][1][1][0], seen[Reference.MODEL][1][1][0])


def states_of(model: PreTrainedModel) -> list[tuple[list[Tensor], list[Tensor]]]:
    """What each block reads and outputs in a plain pass, by layer and batch."""
    found: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in range(3)]
    for layer, block in enumerate(arch_for(model.config).blocks(model)):

        def note(_: nn.Module, args: Any, kwargs: Any, given: Any, layer: int = layer) -> None:
            found[layer][0].append(args[0] if args else kwargs["hidden_states"])
            found[layer][1].append(given[0] if isinstance(given, tuple) else given)

        block.register_forward_hook(note, with_kwargs=True)
    with torch.no_grad():
        for batch in BATCHES:
            model(input_ids=batch, use_cache=False)
    return found


def block_of(model: PreTrainedModel, layer: int, reads: list[tuple[list[Tensor], list[Tensor]]], batch: int) -> Tensor:
    """What a model's block outputs when it reads other states than its own."""
    block, given = arch_for(model.config).blocks(model)[layer], list[Tensor]()

    def replace(_: nn.Module, args: Any, kwargs: Any) -> Any:
        states = reads[layer][0][batch]
        return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

    block.register_forward_pre_hook(replace, with_kwargs=True)
    block.register_forward_hook(lambda _, __, out: given.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(input_ids=BATCHES[batch], use_cache=False)
    return given[0]


@pytest.mark.parametrize("reference", Reference)
@pytest.mark.parametrize("stop", [0, 1])
def test_a_sweep_killed_in_any_block_goes_on_to_the_same_bytes(tmp_path: Path, reference: Reference, stop: int) -> None:
    whole = run("llama", reference)
    model, arch = made()

    def killed(visit: BlockVisit) -> Mapping[str, Any]:
        if visit.layer == stop:
            raise KeyboardInterrupt
        return reconstructed(model)(visit)

    with pytest.raises(KeyboardInterrupt):
        sweep(
            model,
            arch,
            last_linears(model, arch),
            BATCHES,
            None,
            BlockEdit(killed, reference),
            journal=Journal(tmp_path, {}),
        )
    assert len(list(tmp_path.glob("step-*"))) == stop
    again = run("llama", reference, journal=Journal(tmp_path, {}))
    assert again[0] == whole[0] and equal(again[1], whole[1])
    read = run("llama", reference, journal=Journal(tmp_path, {}))  # all from the journal
    assert read[0] == whole[0] and equal(read[1], whole[1])


@pytest.mark.parametrize("reference", Reference)
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_where_activations_lie_changes_nothing(tmp_path: Path, reference: Reference, place: Place) -> None:
    whole, other = run("gemma2", reference), run("gemma2", reference, place=place, scratch=tmp_path / "s")
    assert whole[0] == other[0] and equal(whole[1], other[1])
    assert not (tmp_path / "s").exists()


@pytest.mark.slow
@pytest.mark.parametrize("reference", Reference)
@pytest.mark.parametrize("name", MAKE)
def test_weights_on_disk_give_the_same_bytes_also_resumed(tmp_path: Path, reference: Reference, name: str) -> None:
    made(name)[0].save_pretrained(tmp_path / "model")
    whole = run(name, reference)

    def offloaded() -> dict[str, Any]:
        where = Offloaded(open_source(tmp_path / "model"), torch.float32, torch.device("cpu"))
        groups = last_linears(where.model, arch_for(where.model.config))
        edit = BlockEdit(reconstructed(where.model), reference)
        journal = Journal(tmp_path / "journal", {})
        found = sweep(
            where.model, arch_for(where.model.config), groups, BATCHES, None, edit, journal=journal, offloaded=where
        )
        assert all(torch.equal(where.store[key], whole[1][key]) for key, _ in where.model.named_parameters())
        assert all(parameter.is_meta for parameter in where.model.parameters())
        return found

    assert offloaded() == whole[0]
    for step in (1, 2):
        shutil.rmtree(tmp_path / "journal" / f"step-{step:06d}")
    assert offloaded() == whole[0]
    json.dumps(whole[0])


def test_gradients_are_left_as_they_were_and_learned_masks_leave_weights_alone() -> None:
    model, arch = made()
    model.get_parameter("model.layers.1.mlp.up_proj.weight").requires_grad_(False)
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients: list[Tensor] = []

    def masked(visit: BlockVisit) -> dict[str, Any]:
        dense = visit.block.get_parameter("mlp.up_proj.weight")
        mask = torch.full_like(dense, 0.5).requires_grad_(True)
        batch, wanted = visit.batch(0), visit.dense_output(0)
        loss = (visit.run(batch, {"mlp.up_proj.weight": dense * mask}) - wanted).square().sum()
        gradients.append(torch.autograd.grad(loss, mask)[0])
        torch.testing.assert_close(visit.run(batch), wanted)
        visit.block.get_parameter("mlp.down_proj.weight").requires_grad_(True)
        (visit.run(batch) - wanted + 1).sum().backward()
        return {}

    sweep(model, arch, last_linears(model, arch), BATCHES, None, BlockEdit(masked))
    assert len(gradients) == 3 and all(bool(gradient.any()) for gradient in gradients)
    assert equal(model.state_dict(), weights)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == required
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("fold", [None, squares])
@pytest.mark.parametrize("reference", Reference)
def test_a_visit_costs_the_forwards_that_it_says(reference: Reference, fold: Any) -> None:
    model, arch = made()
    runs: list[int] = []
    for i, block in enumerate(arch.blocks(model)):
        block.register_forward_hook(lambda *_, i=i: runs.append(i))
    groups = {layer: here for layer, here in last_linears(model, arch).items() if layer}
    sweep(model, arch, groups, BATCHES[:1], fold, BlockEdit(lambda _: {}, reference))
    extra = [1, 1] if reference is Reference.MODEL and fold else [1]
    assert runs[3:] == [0, *extra, 1, *(2 for _ in extra)]


def test_what_cannot_be_is_refused() -> None:
    model, arch = made()
    groups = last_linears(model, arch)
    with pytest.raises(RecipeError, match="true_sequential to false"):
        sweep(model, arch, groups, BATCHES, None, BlockEdit(lambda _: {}), true_sequential=True)

    def overflow(visit: BlockVisit) -> dict[str, Any]:
        visit.block.get_parameter("mlp.down_proj.weight").data[0, 0] = float("nan")
        return {}

    with pytest.raises(NumericError, match=r"layers\.0\.mlp\.down_proj\.weight was made NaN"):
        sweep(model, arch, groups, BATCHES, None, BlockEdit(overflow))
