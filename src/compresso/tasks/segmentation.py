"""Semantic segmentation: a class for each pixel, by MobileViT with DeepLabV3's head (arXiv 2110.02178, section 4.3) or
SegFormer (arXiv 2105.15203), trained as the code of arXiv 2309.02617 trains its segmenters.

The loss is OHEM's cross-entropy (`core/segments.py`); training sees pictures enlarged by .5 to 2, cut, mirrored in half
of all passes, turned by up to 5 degrees, and with colours changed by up to a half. Departures: pictures keep the
model's size, so that a smaller one is filled up with its mirror image, whose pixels are passed over; a cut without any
pixel that has a class is drawn anew. A model without a head is given one by the stage `finetune`. A batch norm of the
head sees one place a picture: micro-batches hold at least two.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModelForSemanticSegmentation, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from compresso.checkpoint.kinds import auto_class
from compresso.core.loss import PIXEL, Loss
from compresso.core.losses import IGNORED
from compresso.core.row import Row
from compresso.data.augmentations import IGNORED as NO_CLASS
from compresso.data.augmentations import Augmentation
from compresso.data.label_maps import MAPPED, encode_mapped
from compresso.data.labelled import known_names
from compresso.data.record_forms import RecordForm
from compresso.data.records import Records
from compresso.data.survival import Encoded
from compresso.metrics.guard import Guard
from compresso.metrics.label_guard import judge_labels
from compresso.metrics.segments import GUESS, MIOU, SegmentScore, segment_score
from compresso.tasks import encoders, pictures
from compresso.tasks.base import Reading, register, spread
from compresso.training.halves import Compare
from compresso.training.noise import mixed_seed
from compresso.training.pixel_halves import Pixels, pixels

DRAWN = Augmentation(flip=0.5, scale=(0.5, 2.0), rotate=5.0, jitter=0.5)
"""Of training pictures."""
_DRAWS = 8
"""Of a training picture, until a pixel with a class is in sight."""
PASSED_OVER = 255
"""The number in a label map that is no class, where a config says none."""


@dataclass(frozen=True)
class Segmentation:
    """The task of models with a class for each pixel."""

    name: str = "segmentation"
    auto_class: str = "AutoModelForSemanticSegmentation"
    pipeline: str = "image-segmentation"
    form: RecordForm = MAPPED
    metric: str = MIOU
    head: str = "a head for 2 classes; the data tells how many there are"
    usage: str = "from transformers import pipeline\n\nprint(pipeline('image-segmentation', {folder})('picture.png'))"
    reads_text: bool = False
    data_settings: tuple[str, ...] = ("limit",)
    writes_text: bool = False
    loss: Loss = PIXEL
    compare: Compare = pixels

    def obstacle(self, config: PreTrainedConfig) -> str:
        """Why no model with this config does it; "" for one that has such a head."""
        return pictures.obstacle(config, AutoModelForSemanticSegmentation, self.name, "MobileViT")

    def lacks_head(self, config: PreTrainedConfig) -> bool:
        """Whether it is a base model, or has a head for another task."""
        return auto_class(config) is not AutoModelForSemanticSegmentation

    def with_head(self, model: PreTrainedModel, labels: Sequence[str], seed: int) -> PreTrainedModel:
        """The model under a new head, drawn as the family draws it."""
        fields = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
        return encoders.under_new_head(model, AutoModelForSemanticSegmentation, fields, mixed_seed("head", seed))

    def encode(
        self, records: Records, tokenizer: PreTrainedTokenizerBase | None, reading: Reading, config: PreTrainedConfig
    ) -> Encoded:
        """Pictures and label maps in the model's size. Raises DataError as `encode_mapped`."""
        inputs = pictures.inputs_of(reading, records)
        fields = ("semantic_loss_ignore_index", "loss_ignore_index")
        passed_over = next((int(getattr(config, name)) for name in fields if hasattr(config, name)), PASSED_OVER)
        names = None if self.lacks_head(config) else known_names(config)
        return encode_mapped(records, inputs, passed_over, names, reading.limit, reading.skip_bad, reading.learns)

    def held_places(self, rows: Sequence[Row], n: int) -> set[int]:
        """Spread over the data."""
        return spread(len(rows), n)

    def undivided(self, rows: Sequence[Row]) -> str:
        """Nothing: each example stands by itself."""
        return ""

    def held_out(self, n_rows: int) -> int:
        """A fifth of the pictures, but enough for a score and no more than takes seconds."""
        return min(encoders.held_out(n_rows), 64)

    def halves(self, model: PreTrainedModel, blocks: Sequence[nn.Module]) -> Pixels:
        """The model whole, with the logits of each pixel."""
        return Pixels(model, blocks, int(model.config.num_labels or 0))

    def collate(self, rows: Sequence[Row], pad_id: int) -> dict[str, Tensor]:
        """pixel_values [len(rows), 3, height, width], float32; labels [len(rows), height, width], int64, -100 for none.
        Raises DataError for no rows.
        """
        values = pictures.pixel_values(rows)
        labels = torch.stack([pictures.classes_of(row) for row in rows]).long()
        return {"pixel_values": values, "labels": labels.masked_fill(labels == NO_CLASS, IGNORED)}

    def again(self, row: Row, seed: int) -> Row:
        """The picture as one pass sees it, with a pixel that has a class: cuts without one are drawn anew, and where
        none of a few has one the picture is seen as it is.
        """
        for draw in range(_DRAWS):
            found = pictures.drawn_anew(row, DRAWN, seed if draw == 0 else mixed_seed("cut", seed, draw))
            if bool((pictures.classes_of(found) != NO_CLASS).any()):
                return found
        return row

    def probe(self, rows: Sequence[Row], pad_id: int) -> dict[str, Tensor]:
        """A few pictures."""
        return {"pixel_values": pictures.pixel_values(rows[: encoders.PROBED])}

    def score(
        self, model: PreTrainedModel, rows: Sequence[Row], counted_as: Sequence[Row] | None = None
    ) -> SegmentScore:
        """mIoU from one confusion matrix of all pictures."""
        return segment_score(model, rows, lambda some: self.collate(some, 0), known_names(model.config))

    def judge(self, config: PreTrainedConfig, dense: Mapping[str, float], pruned: Mapping[str, float]) -> Guard:
        """By what is left of the lead over the most frequent class."""
        n = pruned.get("examples")
        return judge_labels(
            dense.get(MIOU),
            pruned.get(MIOU),
            pruned.get(GUESS),
            None if n is None else int(n),
            what="mIoU",
            guessing="the most frequent class",
            losses=(dense.get("loss"), pruned.get("loss")),
            labels=config.num_labels,
        )


SEGMENTATION = Segmentation()
register(SEGMENTATION)
