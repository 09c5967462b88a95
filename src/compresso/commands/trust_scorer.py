"""The classifier that `compresso evaluate --suite trust --scorer FOLDER` reads toxicity by."""

from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification

from compresso.checkpoint.kinds import auto_class
from compresso.checkpoint.source import open_source
from compresso.checkpoint.tokenizer import has_tokenizer
from compresso.commands.trust_options import place_of
from compresso.errors import ArchError, CheckpointError
from compresso.loading import load
from compresso.metrics.trust.dimensions.toxicity import Scorer
from compresso.metrics.trust.scorer import ClassifierScorer, toxic_label


def opened_scorer(path: str | Path, label: str | None, device: torch.device) -> Scorer:
    """The classifier that --scorer names.

    Raises:
        CheckpointError: no folder of a model with tokenizer.
        ArchError: no text classifier.
        DataError: no label of it means toxic, as `toxic_label`; before weights are read.
    """
    try:
        source = open_source(path)
    except CheckpointError as error:
        raise CheckpointError(f"--scorer: {error}") from error
    if auto_class(source.config) is not AutoModelForSequenceClassification:
        raise ArchError(f"--scorer {source.name} is no text classifier; give one with a label that means toxic")
    if not source.tensors:
        raise CheckpointError(f"--scorer {path} has no weights; give a folder of safetensors")
    place = toxic_label(source.config, source.name, label)
    if not has_tokenizer(source):
        raise CheckpointError(f"--scorer {source.name} has no tokenizer; add its files")
    loaded = load(place_of(source), device=device)
    assert loaded.tokenizer is not None  # it was looked for
    return ClassifierScorer(loaded.model, loaded.tokenizer, source.name, place)
