"""Masked language modelling: tokens of plain texts that a model does not see, by an encoder with a decoder on top
(Devlin et al., arXiv 1810.04805, section 3.1).

15 % of the tokens are asked for; 80 % of these are seen as the mask, 10 % as another token, 10 % as they are
(`core/masking.py`). Training draws masks anew in every pass over the data, by the run's seed; held-out examples keep
those that their text alone decides, so that all models are asked the same.

A base model has no such head. It is given one by the stage `finetune`: as its family draws it, with the embedding as
the decoder, so that it adds a matrix [hidden, hidden], a norm and a bias; it is of use once it was trained.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from compresso.checkpoint.kinds import auto_class
from compresso.core.loss import MASKED_TOKEN, Loss
from compresso.core.row import Row
from compresso.data.batches import collate
from compresso.data.masked import PLAIN, encode_masked, redrawn
from compresso.data.record_forms import RecordForm
from compresso.data.records import Records
from compresso.data.survival import Encoded
from compresso.metrics.guard import Guard
from compresso.metrics.masked import PERPLEXITY, MaskedScore, judge_masked, masked_score
from compresso.tasks import encoders
from compresso.tasks.base import Reading, register, spread
from compresso.training.halves import Compare
from compresso.training.masked_halves import MaskedNetwork, masked_tokens
from compresso.training.noise import mixed_seed


@dataclass(frozen=True)
class MaskedLM:
    """The task of encoders that guess masked tokens."""

    name: str = "masked-lm"
    auto_class: str = "AutoModelForMaskedLM"
    pipeline: str = "fill-mask"
    form: RecordForm = PLAIN
    metric: str = PERPLEXITY
    head: str = "a new head whose decoder is the embedding"
    usage: str = (
        "from transformers import pipeline\n\nfill = pipeline('fill-mask', {folder})\n"
        "print(fill(f'A fine {fill.tokenizer.mask_token} of work.'))"
    )
    reads_text: bool = True
    data_settings: tuple[str, ...] = ("max_length", "pack", "limit")
    writes_text: bool = False
    loss: Loss = MASKED_TOKEN
    compare: Compare = masked_tokens

    def obstacle(self, config: PreTrainedConfig) -> str:
        """Why no model with this config does it; "" for an encoder of texts."""
        return encoders.obstacle(config, AutoModelForMaskedLM, self.name)

    def lacks_head(self, config: PreTrainedConfig) -> bool:
        """Whether it is a base model, or has a head for another task."""
        return auto_class(config) is not AutoModelForMaskedLM

    def with_head(self, model: PreTrainedModel, labels: Sequence[str], seed: int) -> PreTrainedModel:
        """The encoder under a new head with the embedding as its decoder; it has no use for a pooler."""
        return encoders.under_new_head(
            model, AutoModelForMaskedLM, {"tie_word_embeddings": True}, mixed_seed("head", seed)
        )

    def encode(
        self, records: Records, tokenizer: PreTrainedTokenizerBase | None, reading: Reading, config: PreTrainedConfig
    ) -> Encoded:
        """Ids with the tokenizer's special tokens, masked. Raises DataError as `encode_masked`."""
        tokenizer = encoders.with_tokenizer(tokenizer, records)
        return encode_masked(
            records, tokenizer, reading.max_length, reading.pack, reading.limit, int(config.vocab_size)
        )

    def held_places(self, rows: Sequence[Row], n: int) -> set[int]:
        """Spread over the data, so that every source of a mix is held out in its share."""
        return spread(len(rows), n)

    def undivided(self, rows: Sequence[Row]) -> str:
        """Nothing: each example stands by itself."""
        return ""

    def held_out(self, n_rows: int) -> int:
        """A fifth, but enough for a loss and no more than takes seconds."""
        return encoders.held_out(n_rows)

    def halves(self, model: PreTrainedModel, blocks: Sequence[nn.Module]) -> MaskedNetwork:
        """The model cut where logits are made."""
        return MaskedNetwork(model, blocks)

    def collate(self, rows: Sequence[Row], pad_id: int) -> dict[str, Tensor]:
        """input_ids, attention_mask and labels, each [len(rows), longest], int64. Raises DataError as `collate`."""
        batch = collate(rows, pad_id)
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": batch["labels"]}

    def again(self, row: Row, seed: int) -> Row:
        """The text with masks of this seed."""
        return redrawn(row, seed)

    def probe(self, rows: Sequence[Row], pad_id: int) -> dict[str, Tensor]:
        """A few examples with their padding."""
        batch = self.collate(rows[: encoders.PROBED], pad_id)
        return {name: value for name, value in batch.items() if name != "labels"}

    def score(
        self, model: PreTrainedModel, rows: Sequence[Row], counted_as: Sequence[Row] | None = None
    ) -> MaskedScore:
        """The loss on masked tokens, and how many of them are guessed."""
        return masked_score(model, rows, partial(self.collate, pad_id=encoders.padding(model.config)))

    def judge(self, config: PreTrainedConfig, dense: Mapping[str, float], pruned: Mapping[str, float]) -> Guard:
        """By the loss on masked tokens, against dense and against a uniform guess."""
        return judge_masked(int(config.vocab_size), dense.get("loss"), pruned.get("loss"))


MASKED_LM = MaskedLM()
register(MASKED_LM)
