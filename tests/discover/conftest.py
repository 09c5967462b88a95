"""Tiny models nobody described, and a knife: entries cut out of a copy by nothing but the discovered ownership."""

import copy
import functools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    BertConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    OPTConfig,
    Phi3Config,
    ViTConfig,
)

from compresso.core.axis import Kind
from compresso.discover.found import Found

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SHORT = {"max_position_embeddings": 16}
IDS = torch.randint(2, 64, (2, 7), generator=torch.Generator().manual_seed(5))
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))


class Block(nn.Module):
    """Tokens mixed by a fixed average over the past, channels by a gated unit."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate, self.up = nn.RMSNorm(24, eps=1e-2), nn.Linear(24, 40), nn.Linear(24, 40)
        self.down = nn.Linear(40, 24)

    def forward(self, x: Tensor) -> Tensor:
        table = torch.ones(x.shape[1], x.shape[1], device=x.device).tril() / x.shape[1]
        seen = table @ self.norm(x)
        return x + self.down(torch.sigmoid(self.gate(seen)) * self.up(seen).tanh())


class Toy(nn.Module):
    """A gated network without attention and convolutions, with a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.stack, self.norm = (
            nn.Embedding(64, 24),
            nn.ModuleList(Block() for _ in range(3)),
            nn.RMSNorm(24, eps=1e-2),
        )
        self.head = nn.Linear(24, 64, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.stack:
            x = block(x)
        return self.head(self.norm(x))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: AutoModelForCausalLM.from_config(
        GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=16, vocab_size=64, bos_token_id=1, eos_token_id=2)
    ),
    "opt": lambda: AutoModelForCausalLM.from_config(
        OPTConfig(
            **TEXT,
            **SHORT,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            ffn_dim=48,
            word_embed_proj_dim=32,
        )
    ),
    "gpt_neox": lambda: AutoModelForCausalLM.from_config(GPTNeoXConfig(**SIZES, **TEXT, **SHORT)),
    "bert": lambda: AutoModelForMaskedLM.from_config(BertConfig(**SIZES, **TEXT, **SHORT)),
    "vit": lambda: AutoModelForImageClassification.from_config(ViTConfig(**SIZES, image_size=16, patch_size=8)),
    "phi3": lambda: AutoModelForCausalLM.from_config(Phi3Config(**SIZES, **TEXT, **SHORT, num_key_value_heads=2)),
    "gemma2": lambda: AutoModelForCausalLM.from_config(
        Gemma2Config(**SIZES, **TEXT, **SHORT, num_key_value_heads=2, head_dim=8)
    ),
    "toy": Toy,
}


@functools.cache
def _original(name: str) -> nn.Module:
    generator = torch.Generator().manual_seed(len(name))
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
            if parameter.ndim == 1:
                parameter += 0.7
    return model


@pytest.fixture
def undescribed() -> Callable[[str], nn.Module]:
    """A fresh copy of a tiny model with weights, biases and norms far from their defaults."""
    return lambda name: copy.deepcopy(_original(name))


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    result = model(PIXELS if getattr(model, "main_input_name", "") == "pixel_values" else IDS)
    return result if isinstance(result, Tensor) else result.logits


def mask_(model: nn.Module, found: Found, mask: Tensor) -> nn.Module:
    """Multiply where the axis' gates say so."""
    for gate in found.gates:
        module, values = (
            model.get_submodule(gate.module),
            mask if gate.unit is None else mask[gate.unit : gate.unit + 1],
        )
        values = values.repeat_interleave(gate.width)
        if gate.side == "input":
            module.register_forward_pre_hook(lambda _m, args, v=values: (args[0] * v, *args[1:]))
        else:
            module.register_forward_hook(lambda _m, _args, out, v=values: out * v)
    return model


@torch.no_grad()
def cut_(model: nn.Module, found: Found, kept: Sequence[int]) -> nn.Module:
    """Take every entry of the other units out of every parameter, and tell the modules their new widths."""
    keep = torch.tensor(sorted(kept))
    for owner in found.owners:
        name, _, leaf = owner.param.rpartition(".")
        module = model.get_submodule(name)
        old = model.get_parameter(owner.param)
        index = torch.isin(owner.unit_of, keep).nonzero()[:, 0]
        new = nn.Parameter(old.index_select(owner.dim, index))
        for other in model.modules():  # tied parameters stay tied
            for key, value in list(other._parameters.items()):
                if value is old:
                    setattr(other, key, new)
        if leaf == "weight" and type(module).__name__ == "Conv1D":
            module.nx, module.nf = new.shape
    for name in found.norms:
        norm = model.get_submodule(name)
        norm.weight *= (found.size / len(keep)) ** 0.5
        for eps in {"eps", "variance_epsilon"} & set(vars(norm)):
            setattr(norm, eps, getattr(norm, eps) * found.size / len(keep))
        if isinstance(norm, nn.RMSNorm):
            norm.normalized_shape = (len(keep),)
    if found.kind == Kind.HEAD:
        for module in model.get_submodule(found.container).modules():
            _tell_heads_(module, found.size, len(keep))
    return model


def _tell_heads_(module: nn.Module, before: int, after: int) -> None:
    """What stock attentions remember about their head count."""
    for field in ("num_heads", "num_attention_heads", "all_head_size", "split_size"):
        if hasattr(module, field):
            setattr(module, field, getattr(module, field) * after // before)
    if hasattr(module, "qkv_proj"):  # Phi-3 splits by the config's counts
        module.config = copy.deepcopy(module.config)
        module.config.num_attention_heads = module.config.num_attention_heads * after // before
        module.num_key_value_heads = module.num_key_value_heads * after // before
