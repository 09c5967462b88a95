"""Mean absolute activations of every linear, against sums taken by hand from the model's own hidden states."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compresso.observe.linear_uses import linear_uses


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=32,
        mlp_bias=True,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.3)
    return model


IDS = torch.randint(3, 32, (4, 10), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_they_are_the_means_by_hand() -> None:
    model = tiny()
    uses = linear_uses(model, [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}])
    mlp = model.model.layers[1].mlp
    seen: list[torch.Tensor] = []
    handle = mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1)))
    final = model.model(IDS).last_hidden_state.flatten(0, 1)
    handle.remove()
    (x,) = seen
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    found = uses["model.layers.1.mlp.gate_proj"]
    torch.testing.assert_close(found.inputs.float(), x.abs().mean(0))
    torch.testing.assert_close(found.outputs.float(), gate.abs().mean(0))
    assert found.unbiased is not None and found.activated is not None
    torch.testing.assert_close(found.unbiased.float(), (gate - mlp.gate_proj.bias).abs().mean(0))
    torch.testing.assert_close(found.activated.float(), torch.nn.functional.silu(gate).abs().mean(0))
    down = uses["model.layers.1.mlp.down_proj"]
    torch.testing.assert_close(down.inputs.float(), (torch.nn.functional.silu(gate) * up).abs().mean(0))
    assert (
        uses["model.layers.1.mlp.up_proj"].activated is None
        and uses["model.layers.1.self_attn.q_proj"].unbiased is None
    )
    torch.testing.assert_close(uses["lm_head"].inputs.float(), final.abs().mean(0))
    assert len(uses) == 2 * 7 + 1


def test_padding_and_the_split_into_batches_do_not_matter() -> None:
    model = tiny()
    whole = linear_uses(model, [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}])
    padded = torch.cat([IDS, torch.zeros(4, 3, dtype=torch.long)], dim=1)
    mask = torch.cat([torch.ones_like(IDS), torch.zeros(4, 3, dtype=torch.long)], dim=1)
    parts = linear_uses(model, [{"input_ids": padded[i : i + 1], "attention_mask": mask[i : i + 1]} for i in range(4)])
    for name, uses in whole.items():
        torch.testing.assert_close(parts[name].outputs, uses.outputs, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(parts[name].inputs, uses.inputs, rtol=1e-5, atol=1e-6)
