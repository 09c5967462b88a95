"""A job on a tiny LLaMA with random examples: enough for every method's mechanics, in seconds."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compresso.arch.base import arch_for
from compresso.core.plan import Plan
from compresso.job import Job

MakeJob = Callable[..., Job]


@pytest.fixture
def make_job(tmp_path: Path) -> MakeJob:
    """make_job(seed=0, tied=True, folder="work"): a fresh job; equal arguments give equal jobs."""

    def make(seed: int = 0, tied: bool = True, folder: str = "work") -> Job:
        config = LlamaConfig(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=8,
            intermediate_size=48,
            vocab_size=64,
            pad_token_id=0,
            tie_word_embeddings=tied,
        )
        generator = torch.Generator().manual_seed(7)
        model = LlamaForCausalLM(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
        dense = copy.deepcopy(model)
        # a learnable language: the next token is the last one plus one
        starts = torch.randint(1, 64, (40,), generator=generator).tolist()
        rows = [[(start + i) % 63 + 1 for i in range(12)] for start in starts]
        examples = [{"input_ids": row, "labels": row} for row in rows]
        return Job(
            model=model,
            arch=arch_for(config),
            tokenizer=None,
            rows=examples[4:],
            held=examples[:4],
            plan=Plan(),
            records={},
            identity={},
            seed=seed,
            out=tmp_path / folder,
            quiet=True,
            original=lambda dtype, device: copy.deepcopy(dense).to(device, dtype),
        )

    return make
