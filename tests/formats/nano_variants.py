"""Pruned variants of the embedded model, and their greedy continuation by transformers:
what engines are compared with.
"""

import functools

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from compresso.arch.base import arch_for
from compresso.core.budget import Budget
from compresso.core.cost import CostModel
from compresso.core.plan import Plan
from compresso.data import nano
from compresso.edit.shrink import shrink_
from compresso.solve.allocate import allocate

TEXTS = ("### Instruction:\nSort these numbers: 7 3 12 5", "The fox lives in the forest. It's 42 years old, and the")


@functools.cache
def nano_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(nano.path())


def pruned_nano(keep: float = 1.0, attention: tuple[int, ...] = (), mlp: tuple[int, ...] = ()) -> PreTrainedModel:
    """The embedded model in float32, without the named layers' attention and FFN, cut at random to a share of its block
    parameters.
    """
    model = AutoModelForCausalLM.from_pretrained(nano.path(), dtype=torch.float32).eval()
    arch = arch_for(model.config)
    layers = range(model.config.num_hidden_layers)
    gone = {"attention": attention, "mlp": mlp}
    if attention or mlp:
        plan = Plan(
            {name: tuple(one for one in layers if one not in without) for name, without in gone.items() if without}
        )
        shrink_(model, arch.axes(model), plan)
    if keep < 1.0:
        axes = arch.axes(model)
        generator = torch.Generator().manual_seed(3)
        scores = {axis.name: torch.rand(axis.size, generator=generator) for axis in axes}
        budget = Budget(keep=keep, kinds=("head", "channel"))
        shrink_(model, axes, allocate(axes, scores, CostModel(axes, arch.weights(model)), budget))
    return model


@torch.no_grad()
def greedy(model: PreTrainedModel, ids: list[int], new_tokens: int) -> tuple[list[int], torch.Tensor]:
    """The likeliest next tokens, one after the other, and the probabilities before each [new_tokens, vocabulary]."""
    found, rows = list(ids), []
    for _ in range(new_tokens):
        rows.append(model(input_ids=torch.tensor([found]), use_cache=False).logits[0, -1].float().softmax(-1))
        found.append(int(rows[-1].argmax()))
    return found[len(ids) :], torch.stack(rows)
