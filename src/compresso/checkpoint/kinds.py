"""Which of transformers' classes opens a model."""

import copy
from typing import Any

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSemanticSegmentation,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from compresso.errors import ArchError

_READERS = (AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoModelForQuestionAnswering)
_BOTH_WAYS = ("bert", "roberta", "distilbert")
"""Encoders of texts that are described here; a config that names no class means the bare model."""
_OF_PICTURES = ("vit", "deit", "mobilevit", "compresso_mobilevit_pyramid", "segformer", "compresso_segformer")
"""Models of pictures that are described here; likewise."""
_SEGMENT = ("upernet",)
"""Those that have one class alone, a segmenter's."""
_SEE = (AutoModelForImageClassification, AutoModelForSemanticSegmentation)
_ENCODERS = (*_READERS, *_SEE, AutoModel)


def auto_class(config: PreTrainedConfig) -> Any:
    """Which of transformers' auto classes opens a model: the one whose class the config's `architectures` names, else a
    causal one.

    Raises:
        ArchError: the config names none of a causal language model, a masked one, a classifier, one that finds answers
            or a bare model, and is not causal.
    """
    named = (getattr(config, "architectures", None) or [""])[0]
    for auto in (AutoModelForCausalLM, *_ENCODERS):
        mapping: Any = auto._model_mapping
        classes = mapping.get(type(config), ())
        several = classes if isinstance(classes, tuple) else (classes,)  # DeiT has two classifiers
        if named in [one.__name__ for one in several]:
            return auto
    if (
        type(config) in AutoModelForCausalLM._model_mapping and config.model_type not in _BOTH_WAYS
    ):  # transformers has a causal BERT too
        return AutoModelForCausalLM
    if not named and config.model_type in _SEGMENT:
        return AutoModelForSemanticSegmentation
    if not named and config.model_type in (*_BOTH_WAYS, *_OF_PICTURES):
        return AutoModel
    said = f"the architecture {named}" if named else "no architecture"
    raise ArchError(
        f"{config.model_type} with {said} is not opened. Give a causal language model, or an encoder with a stock head."
    )


def from_config(config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """A model of a config, with weights of no meaning and a config of its own: what is cut off the model later is said
    by that one, and not by the config it was made from.

    Args:
        config: it stays as it is.
        options: of transformers' own `from_config`.

    Raises:
        ArchError: it is of no kind that is opened.
    """
    return auto_class(config).from_config(copy.deepcopy(config), trust_remote_code=False, **options)


def of_pictures(config: PreTrainedConfig) -> bool:
    """Whether a config is of a model of pictures that is opened, with a head or without."""
    return config.model_type in (*_OF_PICTURES, *_SEGMENT) or (
        getattr(config, "architectures", None) is not None and sees(config)
    )


def is_causal(config: PreTrainedConfig) -> bool:
    """Whether a model is opened as a causal language model: what data, training and reports need."""
    return auto_class(config) is AutoModelForCausalLM and config.model_type not in _BOTH_WAYS


def head_on_decoder(config: PreTrainedConfig) -> str:
    """The class of a decoder that has a head in the place of its own, as its config names it; "" for other models."""
    named = (getattr(config, "architectures", None) or [""])[0]
    causal: Any = AutoModelForCausalLM._model_mapping
    masked: Any = AutoModelForMaskedLM._model_mapping  # transformers has causal encoders, too
    return named if type(config) in causal and type(config) not in masked and not is_causal(config) else ""


def sees(config: PreTrainedConfig) -> bool:
    """Whether a model is opened as one of pictures with a head: a classifier, or one that classifies each pixel."""
    return auto_class(config) in _SEE


def is_text_encoder(config: PreTrainedConfig) -> bool:
    """Whether a model is opened as an encoder of texts with a head: one that guesses masked tokens, classifies, or
    finds answers.
    """
    return auto_class(config) in _READERS
