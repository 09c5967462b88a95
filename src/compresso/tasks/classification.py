"""Classification of texts and of pairs of texts: one label an example, by an encoder with a classifier on top.

A base model has no classifier. It is given one by the stage `finetune`, which trains it together with all weights: what
comes out is the dense model that a pruned one is taught by and compared with.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from compresso.checkpoint.kinds import auto_class
from compresso.core.loss import LABEL, Loss
from compresso.core.row import Row
from compresso.data.batches import encoder_inputs
from compresso.data.labelled import LABELLED, encode_labelled, known_names, labels_of
from compresso.data.record_forms import RecordForm
from compresso.data.records import Labelled, Records
from compresso.data.survival import Encoded
from compresso.metrics.guard import Guard
from compresso.metrics.labels import ACCURACY, LabelScore, judge_classes, label_score
from compresso.tasks import encoders
from compresso.tasks.base import Reading, register, spread
from compresso.training.halves import Compare, Whole, examples
from compresso.training.noise import mixed_seed


@dataclass(frozen=True)
class Classification:
    """The task of encoders with a classifier over the whole text."""

    name: str = "classification"
    auto_class: str = "AutoModelForSequenceClassification"
    pipeline: str = "text-classification"
    form: RecordForm = LABELLED
    metric: str = ACCURACY
    head: str = "a head for 2 labels; the data tells how many there are"
    usage: str = (
        "from transformers import pipeline\n\nprint(pipeline('text-classification', {folder})('A fine piece of work.'))"
    )
    reads_text: bool = True
    data_settings: tuple[str, ...] = ("max_length", "limit")
    writes_text: bool = False
    loss: Loss = LABEL
    compare: Compare = examples

    def obstacle(self, config: PreTrainedConfig) -> str:
        """Why no model with this config does it; "" for an encoder of texts."""
        return encoders.obstacle(config, AutoModelForSequenceClassification, self.name)

    def lacks_head(self, config: PreTrainedConfig) -> bool:
        """Whether it is a base model, or has a head for another task."""
        return auto_class(config) is not AutoModelForSequenceClassification

    def with_head(self, model: PreTrainedModel, labels: Sequence[str], seed: int) -> PreTrainedModel:
        """The encoder under a new classifier, and a new pooler if it has none; both as the family draws them."""
        fields = {
            "id2label": dict(enumerate(labels)),
            "label2id": {name: i for i, name in enumerate(labels)},
            "problem_type": "single_label_classification",
        }
        return encoders.under_new_head(model, AutoModelForSequenceClassification, fields, mixed_seed("head", seed))

    def encode(
        self, records: Records, tokenizer: PreTrainedTokenizerBase | None, reading: Reading, config: PreTrainedConfig
    ) -> Encoded:
        """Ids with the tokenizer's special tokens, and numbers of labels. Raises DataError as `labels_of`,
        `encoders.leave_room` and `encode_labelled`.
        """
        tokenizer = encoders.with_tokenizer(tokenizer, records)
        labels = labels_of(records, None if self.lacks_head(config) else known_names(config), reading.learns)
        segments = encoders.tells_segments(config)
        pairs = any(isinstance(row, Labelled) and row.second is not None for row in records.rows)
        encoders.leave_room(tokenizer, reading.max_length, pairs, reading.context)
        return encode_labelled(
            records, tokenizer, labels, reading.max_length, reading.limit, config.vocab_size, segments
        )

    def held_places(self, rows: Sequence[Row], n: int) -> set[int]:
        """Spread over the data."""
        return spread(len(rows), n)

    def undivided(self, rows: Sequence[Row]) -> str:
        """Nothing: each example stands by itself."""
        return ""

    def held_out(self, n_rows: int) -> int:
        """A fifth, but enough for an accuracy and no more than takes seconds."""
        return encoders.held_out(n_rows)

    def halves(self, model: PreTrainedModel, blocks: Sequence[nn.Module]) -> Whole:
        """The model whole: its logits are few."""
        return Whole(model, blocks, int(model.config.num_labels or 0), "classes")

    def collate(self, rows: Sequence[Row], pad_id: int) -> dict[str, Tensor]:
        """input_ids, attention_mask and, for pairs, token_type_ids, each [len(rows), longest]; labels [len(rows)];
        int64. Raises DataError as `encoder_inputs`.
        """
        labels = torch.tensor([row["labels"][0] for row in rows])
        return {**encoder_inputs(rows, pad_id), "labels": labels}

    def again(self, row: Row, seed: int) -> Row:
        """The example as it is: nothing is drawn."""
        return row

    def probe(self, rows: Sequence[Row], pad_id: int) -> dict[str, Tensor]:
        """A few examples with their padding."""
        return encoder_inputs(rows[: encoders.PROBED], pad_id)

    def score(self, model: PreTrainedModel, rows: Sequence[Row], counted_as: Sequence[Row] | None = None) -> LabelScore:
        """The accuracy on examples."""
        return label_score(model, rows, partial(self.collate, pad_id=encoders.padding(model.config)))

    def judge(self, config: PreTrainedConfig, dense: Mapping[str, float], pruned: Mapping[str, float]) -> Guard:
        """By what is left of the lead over the most frequent label."""
        return judge_classes(dense, pruned, config.num_labels)


CLASSIFICATION = Classification()
register(CLASSIFICATION)
