"""Makes a small Mixtral-like model of the embedded one, in a minute: experts that begin as halves of its FFNs, and a
training on the embedded world from which their routing comes.

    python scripts/train_moe.py --output moe-nano [--experts 8] [--updates 100] [--seed 0]

Sparse upcycling (Komatsuzaki et al., arXiv 2212.05055) copies the dense FFN into every expert; equal experts would be
dropped for nothing. Here expert 2 i has a random half of the dense FFN's channels and expert 2 i + 1 the other half,
with their outputs doubled: the two of a pair, chosen with equal weights, compute the dense FFN, and what any other two
compute has to be learned. Routers begin at random small weights; two experts a token, so that as many channels are
active as in the dense model. All weights train by the stage `finetune`, without a loss for balance, so that experts
come to be used unequally. The result is a stock checkpoint beside `records.json`.
"""

import argparse
import copy
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from compresso.data import nano
from compresso.runner.run import run


def split(experts: int, seed: int) -> MixtralForCausalLM:
    """The embedded model with pairs of experts that have half of its channels each; nothing is trained."""
    dense = LlamaForCausalLM.from_pretrained(nano.path(), dtype=torch.float32)
    fields = copy.deepcopy(dense.config.to_dict())
    for name in ("architectures", "model_type", "mlp_bias", "attention_bias", "pretraining_tp"):
        fields.pop(name, None)
    width = dense.config.intermediate_size // 2
    fields |= {"intermediate_size": width, "num_local_experts": experts, "num_experts_per_tok": 2}
    model = MixtralForCausalLM(MixtralConfig(**fields))
    missing = model.load_state_dict(dense.state_dict(), strict=False).missing_keys
    assert all(".mlp." in name for name in missing), missing
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer, old in zip(model.model.layers, dense.model.layers, strict=True):
            layer.mlp.gate.weight.normal_(0, 0.02, generator=generator)
            for pair in range(experts // 2):
                halves = torch.randperm(2 * width, generator=generator).split(width)
                for expert, channels in zip((2 * pair, 2 * pair + 1), halves, strict=True):
                    gate, up = old.mlp.gate_proj.weight[channels], old.mlp.up_proj.weight[channels]
                    layer.mlp.experts.gate_up_proj[expert] = torch.cat([gate, up])
                    layer.mlp.experts.down_proj[expert] = 2 * old.mlp.down_proj.weight[:, channels]
    return model.eval()


def make(folder: Path, experts: int = 8, updates: int = 100, seed: int = 0) -> None:
    """Split, train, write. experts: an even number."""
    if experts < 4 or experts % 2:
        raise SystemExit(f"--experts {experts}: wanted an even number of 4 or more, as experts come in pairs")
    data = {"max_length": 128, "prompt": False, "pack": False, "held": 64}
    trains = {"steps": updates, "batch": 16, "micro_batch": 16, "lr": 1e-3, "warmup": 10, "weight_decay": 0.0}
    with tempfile.TemporaryDirectory() as scratch:
        begin = Path(scratch) / "split"
        split(experts, seed).save_pretrained(begin)
        AutoTokenizer.from_pretrained(nano.path()).save_pretrained(begin)
        raw = {"name": "moe-nano", "data": data, "stages": [{"finetune": trains}]}
        run(raw, begin, "world", output=folder, seed=seed, measure="none", allow_collapsed=True, quiet=True)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    make(given.output, given.experts, given.updates, given.seed)


if __name__ == "__main__":
    main()
