"""Classification of pictures: one label a picture, by a vision transformer with a classifier on top (Dosovitskiy et
al., arXiv 2010.11929; Touvron et al., arXiv 2012.12877).

A model without a classifier is given one by the stage `finetune`. Training sees each picture mirrored in half of all
passes and moved by up to an eighth of its side, drawn by the run's seed; held-out pictures are seen as they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from compresso.checkpoint.kinds import auto_class
from compresso.core.loss import LABEL, Loss
from compresso.core.row import Row
from compresso.data.augmentations import Augmentation
from compresso.data.labelled import known_names, labels_of
from compresso.data.labelled_pictures import PICTURED, encode_pictured
from compresso.data.record_forms import RecordForm
from compresso.data.records import Records
from compresso.data.survival import Encoded
from compresso.metrics.guard import Guard
from compresso.metrics.labels import ACCURACY, LabelScore, judge_classes, label_score
from compresso.tasks import encoders, pictures
from compresso.tasks.base import Reading, register, spread
from compresso.training.halves import Compare, Whole
from compresso.training.noise import mixed_seed

DRAWN = Augmentation(flip=0.5, shift=0.25)
"""Of training pictures; a shift of 1/4 of the half side is an eighth of the side."""


@dataclass(frozen=True)
class ImageClassification:
    """The task of models with a classifier over the whole picture."""

    name: str = "image-classification"
    auto_class: str = "AutoModelForImageClassification"
    pipeline: str = "image-classification"
    form: RecordForm = PICTURED
    metric: str = ACCURACY
    head: str = "a head for 2 labels; the data tells how many there are"
    usage: str = "from transformers import pipeline\n\nprint(pipeline('image-classification', {folder})('picture.png'))"
    reads_text: bool = False
    data_settings: tuple[str, ...] = ("limit",)
    writes_text: bool = False
    loss: Loss = LABEL
    compare: Compare = pictures.whole_pictures

    def obstacle(self, config: PreTrainedConfig) -> str:
        """Why no model with this config does it; "" for one of pictures."""
        return pictures.obstacle(config, AutoModelForImageClassification, self.name, "ViT")

    def lacks_head(self, config: PreTrainedConfig) -> bool:
        """Whether it is a base model, or has a head for another task."""
        return auto_class(config) is not AutoModelForImageClassification

    def with_head(self, model: PreTrainedModel, labels: Sequence[str], seed: int) -> PreTrainedModel:
        """The model under a new classifier, drawn as the family draws it; it has no use for a pooler."""
        fields = {
            "id2label": dict(enumerate(labels)),
            "label2id": {name: i for i, name in enumerate(labels)},
            "problem_type": "single_label_classification",
        }
        return encoders.under_new_head(model, AutoModelForImageClassification, fields, mixed_seed("head", seed))

    def encode(
        self, records: Records, tokenizer: PreTrainedTokenizerBase | None, reading: Reading, config: PreTrainedConfig
    ) -> Encoded:
        """Pictures in the model's size, numbers of labels. Raises DataError as `labels_of` and `encode_pictured`."""
        inputs = pictures.inputs_of(reading, records)
        labels = labels_of(records, None if self.lacks_head(config) else known_names(config), reading.learns)
        return encode_pictured(records, inputs, labels, reading.limit, reading.skip_bad)

    def held_places(self, rows: Sequence[Row], n: int) -> set[int]:
        """Spread over the data."""
        return spread(len(rows), n)

    def undivided(self, rows: Sequence[Row]) -> str:
        """Nothing: each example stands by itself."""
        return ""

    def held_out(self, n_rows: int) -> int:
        """A fifth of the pictures, but enough for an accuracy and no more than takes seconds."""
        return encoders.held_out(n_rows)

    def halves(self, model: PreTrainedModel, blocks: Sequence[nn.Module]) -> Whole:
        """The model whole: its logits are few."""
        return Whole(model, blocks, int(model.config.num_labels or 0), "classes")

    def collate(self, rows: Sequence[Row], pad_id: int) -> dict[str, Tensor]:
        """pixel_values [len(rows), 3, height, width], float32; labels [len(rows)], int64. Raises DataError for no
        rows.
        """
        values = pictures.pixel_values(rows)
        return {"pixel_values": values, "labels": torch.tensor([row["labels"][0] for row in rows])}

    def again(self, row: Row, seed: int) -> Row:
        """The picture as one pass sees it."""
        return pictures.drawn_anew(row, DRAWN, seed)

    def probe(self, rows: Sequence[Row], pad_id: int) -> dict[str, Tensor]:
        """A few pictures."""
        return {"pixel_values": pictures.pixel_values(rows[: encoders.PROBED])}

    def score(self, model: PreTrainedModel, rows: Sequence[Row], counted_as: Sequence[Row] | None = None) -> LabelScore:
        """The accuracy on examples."""
        return label_score(model, rows, lambda some: self.collate(some, 0))

    def judge(self, config: PreTrainedConfig, dense: Mapping[str, float], pruned: Mapping[str, float]) -> Guard:
        """By what is left of the lead over the most frequent label."""
        return judge_classes(dense, pruned, config.num_labels)


IMAGE_CLASSIFICATION = ImageClassification()
register(IMAGE_CLASSIFICATION)
