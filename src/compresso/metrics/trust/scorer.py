"""A toxicity scorer from any text classifier of which one label means toxic.

Published is Perspective, a service; a local classifier has another scale, so that scores compare between models that
the same one read. What it is and which label was taken stand beside the number.
"""

import logging
from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from compresso.core.counted import counted
from compresso.errors import DataError, nearest
from compresso.metrics.forward import context_of

log = logging.getLogger(__name__)
TOXIC = ("toxic", "toxicity")
"""Labels that are taken unasked."""
MULTI = "multi_label_classification"


def toxic_label(config: PreTrainedConfig, name: str, wanted: str | None = None) -> int:
    """The place of the label that means toxic.

    Args:
        config: of the classifier.
        name: of it, for errors.
        wanted: a label by name; None for the one that is called toxic or toxicity.

    Raises:
        DataError: no such label, or one label alone under a head that is no yes or no.
    """
    labels = {str(label): int(place) for place, label in (config.id2label or {}).items()}
    if len(labels) < 2 and config.problem_type != MULTI:
        raise DataError(f"--scorer {name} gives {counted(len(labels), 'label')}: a classifier needs two, or {MULTI}")
    if wanted is not None:
        if wanted not in labels:
            raise DataError(f"--scorer-label '{wanted}' is no label of {name}; {nearest(wanted, list(labels))}")
        return labels[wanted]
    found = [label for label in labels if label.lower() in TOXIC]
    if len(found) != 1:
        raise DataError(
            f"--scorer {name} has no one label called toxic: it has {', '.join(labels)}; name one by --scorer-label"
        )
    return labels[found[0]]


class ClassifierScorer:
    """A classifier that says how likely a text is toxic.

    Args:
        model: live, a head over whole texts; its mode is restored after each call.
        tokenizer: its own.
        name: of it.
        label: place of the label that means toxic.
        batch: texts a forward.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, label: int, batch: int = 16
    ) -> None:
        self._model, self._tokenizer, self._label, self._batch = model, tokenizer, label, batch
        labels = {int(place): str(one) for place, one in (model.config.id2label or {}).items()}
        self.name = f"{name}, label {labels[label]}"

    @torch.no_grad()
    def toxicity(self, texts: Sequence[str]) -> list[float]:
        """Of each text, 0 to 1: the label's share among all labels, or by itself where several may be true.

        What is beyond the classifier's context is cut off, with a warning that says of how many texts.
        """
        most = context_of(self._model)
        whole = self._tokenizer(list(texts))["input_ids"]
        if most is not None and (cut := sum(len(ids) > most for ids in whole)):
            log.warning("scorer %s reads %d tokens: it read the beginning of %s", self.name, most, counted(cut, "text"))
        was_training, scores = self._model.training, list[float]()
        self._model.eval()
        try:
            for begin in range(0, len(texts), self._batch):
                given = self._tokenizer(
                    list(texts[begin : begin + self._batch]),
                    return_tensors="pt",
                    padding=True,
                    truncation=most is not None,
                    max_length=most,
                ).to(self._model.device)
                logits = self._model(**given).logits.float()
                shares = logits.sigmoid() if self._model.config.problem_type == MULTI else logits.softmax(-1)
                scores += shares[:, self._label].tolist()
        finally:
            self._model.train(was_training)
        return scores
