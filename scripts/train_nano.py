"""Trains the nano model that is shipped in `compresso/data/nano`: tokenizer, model, log and scores, from nothing but a
seed.

    python scripts/train_nano.py --output src/compresso/data/nano --force

All training text comes from the embedded world (`compresso.data.world`) and from `nano_english.txt` beside this script,
which gives the tokenizer and the model some ordinary English. Matrices are trained with Muon (orthogonalised momentum),
embeddings and norms with AdamW; both hold float32 weights, and a copy in bf16 computes. The rate is flat for the first
half and falls linearly to zero in the second. Rows of `--row` tokens hold whole documents, `<s> ... </s>` each, and
later ones see earlier ones, so that the model also learns to answer after other text.

Text counts with weight `TEXT_WEIGHT`, the answer of an instruction with 1, the rest of it with `CONTEXT_WEIGHT`.
"""

import argparse
import copy
import json
import math
import os
import platform
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from compresso.data import world
from compresso.data.prompt import body
from compresso.metrics.choices import choice_accuracy
from compresso.metrics.perplexity import every_token, perplexity

TEXT_WEIGHT, CONTEXT_WEIGHT = 0.5, 0.1
LONG_EVERY = 8
ENGLISH = Path(__file__).with_name("nano_english.txt")
FRESH_SEED = 900_001


def make_tokenizer(vocabulary: int, seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with single digits; it adds `<s>` before a text and nothing after it, and loses no character."""
    tokenizer = Tokenizer(models.BPE())
    splits = [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [
        *world.documents(6000, seed),
        *(body(r["instruction"], r["input"]) + r["output"] for r in world.instructions(6000, seed)),
    ]
    tokenizer.train_from_iterator(texts + 40 * ENGLISH.read_text().splitlines(), trainer)
    start = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", start)]),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def make_model(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> LlamaForCausalLM:
    """A small LLaMA: tied embeddings, grouped queries, nothing that a stock config does not say."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.02,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(args.seed)
    return LlamaForCausalLM(config)


def encoded(
    tokenizer: PreTrainedTokenizerFast, n: int, seed: int, instruction_share: float
) -> list[tuple[list[int], list[float]]]:
    """`n` documents as (tokens with both ends, loss weight of each token), in random order."""
    rng = random.Random(seed)
    english = ENGLISH.read_text().splitlines()
    n_instructions = round(n * instruction_share)
    texts = list(world.documents(n - n_instructions, seed))
    for i in rng.sample(range(len(texts)), len(texts) // 25):
        texts[i] = " ".join(rng.sample(english, rng.choice((1, 2, 3))))
    records = list(world.instructions(n_instructions, seed + 1))

    def ids(batch: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch(batch, add_special_tokens=False)]

    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    made = [([start, *t, end], [0.0, *[TEXT_WEIGHT] * (len(t) + 1)]) for t in ids(texts)]
    asked, answered = ids([body(r["instruction"], r["input"]) for r in records]), ids([r["output"] for r in records])
    for question, answer in zip(asked, answered, strict=True):
        weights = [0.0, *[CONTEXT_WEIGHT] * len(question), *[1.0] * (len(answer) + 1)]
        made.append(([start, *question, *answer, end], weights))
    rng.shuffle(made)
    return made


def packed(documents: list[tuple[list[int], list[float]]], length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of whole documents [rows, length], each filled from a small pool with whatever still fits; padding has
    weight 0.
    """
    pool: list[tuple[list[int], list[float]]] = []
    rows, weights = [], []
    source = iter(documents)
    while True:
        while len(pool) < 64 and (item := next(source, None)) is not None:
            pool.append(item)
        if len(pool) < 64:  # the rest would make rows with much padding
            return np.asarray(rows, dtype=np.int64), np.asarray(weights, dtype=np.float32)
        row, weight = pool.pop(0)
        row, weight = list(row), list(weight)
        while (fit := next((i for i, d in enumerate(pool) if len(row) + len(d[0]) <= length), None)) is not None:
            more = pool.pop(fit)
            row += more[0]
            weight += more[1]
        rows.append(row + [pad] * (length - len(row)))
        weights.append(weight + [0.0] * (length - len(row)))


def batches(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches (tokens [rows, row], weights [rows, row]), made in portions from seeds that never repeat.

    Of `LONG_EVERY` batches, one has rows four times as long (and a quarter as many), so that the model knows long
    contexts too.
    """
    portion = 0
    while True:
        documents = encoded(tokenizer, 20_000, args.seed * 1_000_003 + 2 * portion, args.instruction_share)
        cut = len(documents) // LONG_EVERY
        made: list[tuple[Tensor, Tensor]] = []
        for some, factor in ((documents[:cut], 4), (documents[cut:], 1)):
            n_rows = args.rows // factor
            rows, weights = packed(some, args.row * factor, tokenizer.pad_token_id)
            for i in range(0, len(rows) - n_rows + 1, n_rows):
                made.append((torch.from_numpy(rows[i : i + n_rows]), torch.from_numpy(weights[i : i + n_rows])))
        random.Random(portion).shuffle(made)
        yield from made
        portion += 1


def causal_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float,
    **_: object,
) -> tuple[Tensor, None]:
    """Plain causal attention over whole rows; on CPUs its backward is several times faster than the fused one."""
    batch, heads, length, width = query.shape
    groups = key.shape[1]
    grouped = (query * scaling).reshape(batch * groups, heads // groups * length, width)
    later = torch.full((length, length), -math.inf, dtype=query.dtype).triu(1).repeat(heads // groups, 1)
    weights = torch.baddbmm(later, grouped, key.reshape(batch * groups, length, width).transpose(1, 2)).softmax(-1)
    mixed = torch.bmm(weights, value.reshape(batch * groups, length, width)).view(batch, heads, length, width)
    return mixed.transpose(1, 2).contiguous(), None


def weighted_loss(model: LlamaForCausalLM, tokens: Tensor, weights: Tensor) -> Tensor:
    """Mean of -log p of each next token, weighted; the logarithm in float32."""
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    wanted = weights[:, 1:].flatten()
    return (losses * wanted).sum() / wanted.sum()


def optimizers(model: LlamaForCausalLM, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon on the matrices inside the layers, AdamW on the embedding and the norms;
    `model` holds the float32 weights.
    """
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    return [
        torch.optim.Muon(matrices, lr=args.muon_rate, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(others, lr=args.adam_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate(step: int, steps: int) -> float:
    """Flat after a short warm-up, then straight down to zero over the second half."""
    return min(1.0, (step + 1) / 20) * min(1.0, 2 * (1 - step / steps))


def scores(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, n: int, seed: int) -> dict[str, object]:
    """Accuracy on `n` fresh held-out items of each task, and perplexity on fresh documents."""
    model.eval()
    result = choice_accuracy(model, tokenizer, [item for task in world.TASKS for item in world.items(task, n, seed)])
    texts = list(world.documents(max(50, 2 * n), seed))
    protocol = every_token("world", "fresh", 256)
    ppl = perplexity(model, tokenizer, texts, protocol, batch_size=16)
    model.train()
    return {
        "mean_accuracy": sum(result.tasks.values()) / len(result.tasks),
        "accuracy": result.tasks,
        "chance": {task: world.chance(task) for task in world.TASKS},
        "items_per_task": n,
        "perplexity": {
            "value": ppl.value,
            "n_tokens": ppl.n_tokens,
            "seq_len": protocol.seq_len,
            "n_texts": ppl.n_texts,
            "protocol": protocol.settings(),
        },
        "seed": seed,
    }


def save(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path, force: bool, extra: dict[str, str]
) -> None:
    """Writes the checkpoint in bf16 beside `output`, then puts each file in its place; other files there (code, notes)
    stay.
    """
    output.mkdir(parents=True, exist_ok=True)
    if (output / "model.safetensors").exists() and not force:
        raise SystemExit(f"{output} already holds a model; pass --force to replace it")
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".nano-") as beside:
        folder = Path(beside)
        shipped = LlamaForCausalLM(copy.deepcopy(model.config)).to(torch.bfloat16)
        shipped.load_state_dict(model.state_dict())
        shipped.config.dtype = torch.bfloat16
        shipped.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for name, text in extra.items():
            (folder / name).write_text(text)
        for file in sorted(folder.iterdir()):
            file.chmod(0o644)
            file.replace(output / file.name)


def main() -> None:
    """Trains, scores and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--force", action="store_true", help="replace a model that is there")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2282)
    parser.add_argument(
        "--minutes", type=float, help="set --steps by the clock: twice the steps done in half of these minutes"
    )
    parser.add_argument("--rows", type=int, default=32, help="rows a step")
    parser.add_argument("--row", type=int, default=128, help="tokens a row")
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--ffn", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument(
        "--instruction-share", type=float, default=0.7, help="share of instructions among the documents"
    )
    parser.add_argument("--muon-rate", type=float, default=0.02)
    parser.add_argument("--adam-rate", type=float, default=4e-3)
    parser.add_argument("--evaluate-every", type=int, default=200, help="steps between short evaluations")
    parser.add_argument("--items", type=int, default=400, help="fresh items a task for the final scores")
    parser.add_argument(
        "--keep-every", type=int, default=0, help="also save the model every so many steps (0: only at the end)"
    )
    parser.add_argument(
        "--polite", type=int, default=0, metavar="THREADS", help="use so many threads, but one while others are busy"
    )
    args = parser.parse_args()

    tokenizer = make_tokenizer(args.vocabulary, args.seed)
    model = make_model(tokenizer, args)
    AttentionInterface.register("plain_causal", causal_attention)
    AttentionMaskInterface.register("plain_causal", lambda *_, **__: None)
    worker = LlamaForCausalLM._from_config(copy.deepcopy(model.config), attn_implementation="plain_causal").to(
        torch.bfloat16
    )
    worker.load_state_dict(model.state_dict())
    pairs = list(zip(model.parameters(), worker.parameters(), strict=True))
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"{n_parameters:,} parameters, vocabulary {len(tokenizer)}", flush=True)
    opts = optimizers(model, args)
    base_rates = [group["lr"] for opt in opts for group in opt.param_groups]
    log: list[dict[str, object]] = []
    started, tokens_seen, recent = time.perf_counter(), 0, []
    training = 0.0

    def finish(step: int, n_items: int) -> None:
        command = shlex.join(["python", "scripts/train_nano.py", *sys.argv[1:]])
        made = {
            **scores(model_for_scores(model), tokenizer, n_items, FRESH_SEED),
            "parameters": n_parameters,
            "step": step,
            "steps": args.steps,
            "tokens": tokens_seen,
            "wall_seconds": round(time.perf_counter() - started),
            "tokens_per_second": round(tokens_seen / training),
            "threads": torch.get_num_threads(),
            "training_seed": args.seed,
            "command": command,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }
        lines = "".join(json.dumps(entry) + "\n" for entry in log)
        save(
            model,
            tokenizer,
            args.output,
            args.force or step < args.steps or bool(args.keep_every),
            {
                "training_log.jsonl": lines,
                "scores.json": json.dumps(made, indent=2) + "\n",
            },
        )
        print(json.dumps(made["accuracy"]), made["mean_accuracy"], flush=True)

    if (args.output / "model.safetensors").exists() and not args.force:
        raise SystemExit(f"{args.output} already holds a model; pass --force to replace it")
    stream = batches(tokenizer, args)
    timed = args.minutes is not None
    if timed:
        args.steps = 10**9
    step = -1
    while (step := step + 1) < args.steps:
        if timed and time.perf_counter() - started > 30 * args.minutes:
            # the rate has been flat so far, as it would have been with this number of steps from the start
            args.steps, timed = 2 * step, False
            print(f"--steps {args.steps}", flush=True)
        tokens, weights = next(stream)
        begun = time.perf_counter()
        factor = rate(step, args.steps)
        for group, base in zip((g for opt in opts for g in opt.param_groups), base_rates, strict=True):
            group["lr"] = base * factor
        loss = weighted_loss(worker, tokens, weights)
        if not math.isfinite(loss.item()):
            raise SystemExit(f"loss is {loss.item()} at step {step}; lower --muon-rate")
        loss.backward()
        for weight, working in pairs:
            weight.grad, working.grad = working.grad.float(), None
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
        with torch.no_grad():
            for weight, working in pairs:
                working.copy_(weight)
        training += time.perf_counter() - begun
        tokens_seen += int((tokens != tokenizer.pad_token_id).sum())
        recent.append(loss.item())
        if (step + 1) % 20 == 0 or step + 1 == args.steps:
            if args.polite:
                torch.set_num_threads(1 if os.getloadavg()[0] > torch.get_num_threads() + 1 else args.polite)
            entry: dict[str, object] = {
                "step": step + 1,
                "loss": round(sum(recent) / len(recent), 4),
                "tokens": tokens_seen,
            }
            entry |= {"rate": round(factor, 4), "seconds": round(time.perf_counter() - started, 1)}
            recent.clear()
            if (step + 1) % args.evaluate_every == 0 and step + 1 < args.steps:
                short = scores(model_for_scores(model), tokenizer, 100, step)
                entry["accuracy"] = short["accuracy"]
                entry["perplexity"] = short["perplexity"]["value"]
            log.append(entry)
            print(json.dumps(entry), flush=True)
        if args.keep_every and (step + 1) % args.keep_every == 0 and step + 1 < args.steps:
            finish(step + 1, 50)
    finish(args.steps, args.items)


def model_for_scores(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The model as it will be shipped: rounded to bf16, and computed in float32."""
    shipped = LlamaForCausalLM(copy.deepcopy(model.config))
    shipped.load_state_dict({name: tensor.to(torch.bfloat16).float() for name, tensor in model.state_dict().items()})
    return shipped


if __name__ == "__main__":
    main()
