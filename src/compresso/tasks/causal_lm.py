"""Causal language modelling: the next token of texts and of responses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from compresso.checkpoint.kinds import head_on_decoder, is_causal
from compresso.core.loss import NEXT_TOKEN, Loss
from compresso.core.row import Row
from compresso.data.batches import collate
from compresso.data.columns import TEXTS
from compresso.data.instructions import encode
from compresso.data.record_forms import RecordForm
from compresso.data.records import Records
from compresso.data.survival import Encoded
from compresso.metrics.guard import Guard, judge
from compresso.metrics.held import HeldLoss, held_loss
from compresso.tasks.base import DEFAULT, Reading, register, spread, tasks
from compresso.tasks.pictures import seen_by
from compresso.training.halves import Compare, Network, next_tokens

_PROBED = 128


@dataclass(frozen=True)
class CausalLM:
    """The task of decoders."""

    name: str = DEFAULT
    auto_class: str = "AutoModelForCausalLM"
    pipeline: str = "text-generation"
    form: RecordForm = TEXTS
    metric: str = "held/perplexity"
    head: str = "none"
    usage: str = "import compresso\n\nmodel = compresso.load({folder})\nprint(model.complete('Once upon a time'))"
    reads_text: bool = True
    data_settings: tuple[str, ...] = ("max_length", "prompt", "pack", "limit", "train_on_inputs")
    writes_text: bool = True
    loss: Loss = NEXT_TOKEN
    compare: Compare = next_tokens

    def obstacle(self, config: PreTrainedConfig) -> str:
        """Why no model with this config does it; "" for a decoder."""
        if is_causal(config):
            return ""
        if able := seen_by(config):
            return f"({config.model_type}) is no causal language model, it sees pictures; give --task {able[0]}"
        if named := head_on_decoder(config):
            return (
                f"({config.model_type}) is a decoder with another head, {named}, and no causal language model; give the"
                " checkpoint that writes text"
            )
        others = [f"--task {name}" for name, task in tasks().items() if name != DEFAULT and not task.obstacle(config)]
        if others:
            return (
                f"({config.model_type}) is an encoder of texts and no causal language model; give a task that it can"
                f" do: {', '.join(others[:-1])}{' or ' if others[:-1] else ''}{others[-1]}"
            )
        return (
            f"({config.model_type}) is not a causal language model, and no task here takes it; shrink it from Python"
            " with compresso.shrink_ and write it with compresso.formats.hf"
        )

    def lacks_head(self, config: PreTrainedConfig) -> bool:
        """Never: a decoder is opened with its head."""
        return False

    def with_head(self, model: PreTrainedModel, labels: Sequence[str], seed: int) -> PreTrainedModel:
        """The model as it is."""
        return model

    def encode(
        self, records: Records, tokenizer: PreTrainedTokenizerBase | None, reading: Reading, config: PreTrainedConfig
    ) -> Encoded:
        """Ids and labels: of responses, or of every token of a text. Raises DataError as `encode`."""
        return encode(
            records,
            tokenizer,
            max_length=reading.max_length,
            prompt_on=reading.prompt,
            pack=reading.pack,
            limit=reading.limit,
            vocab_size=config.vocab_size,
            skip_bad=bool(reading.skip_bad),
            context=reading.context,
            on_inputs=reading.on_inputs,
        )

    def held_places(self, rows: Sequence[Row], n: int) -> set[int]:
        """Spread over the data, so that every source of a mix is held out in its share."""
        return spread(len(rows), n)

    def undivided(self, rows: Sequence[Row]) -> str:
        """Nothing: each example stands by itself."""
        return ""

    def held_out(self, n_rows: int) -> int:
        """Enough tokens for a loss."""
        return 32

    def halves(self, model: PreTrainedModel, blocks: Sequence[nn.Module]) -> Network:
        """The model cut where logits are made."""
        return Network(model, blocks)

    def collate(self, rows: Sequence[Row], pad_id: int) -> dict[str, Tensor]:
        """input_ids, attention_mask and labels, each [len(rows), longest], int64."""
        batch = collate(rows, pad_id)
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": batch["labels"]}

    def again(self, row: Row, seed: int) -> Row:
        """The example as it is: nothing is drawn."""
        return row

    def probe(self, rows: Sequence[Row], pad_id: int) -> dict[str, Tensor]:
        """The beginning of the first example."""
        return {"input_ids": torch.tensor([rows[0]["input_ids"][:_PROBED]])}

    def score(self, model: PreTrainedModel, rows: Sequence[Row], counted_as: Sequence[Row] | None = None) -> HeldLoss:
        """The loss on examples, for their perplexity."""
        return held_loss(model, rows, counted_as=counted_as)

    def judge(self, config: PreTrainedConfig, dense: Mapping[str, float], pruned: Mapping[str, float]) -> Guard:
        """By perplexity against dense and the loss itself; broken texts warn."""
        return judge(
            vocabulary=int(config.vocab_size),
            dense_loss=dense.get("loss"),
            pruned_loss=pruned.get("loss"),
            dense_degenerate=dense.get("degenerate"),
            pruned_degenerate=pruned.get("degenerate"),
            texts=int(pruned.get("texts", 0)),
        )


CAUSAL_LM = CausalLM()
register(CAUSAL_LM)
