"""Models that write text, and what is said of the others where one of these is wanted.

Encoders are opened, too: `inspect` shows what can leave them, and they are pruned and scored as classifiers. What reads
next tokens off a model's logits has to refuse them before any work.
"""

from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSemanticSegmentation,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)

from compresso.checkpoint.kinds import auto_class, is_causal
from compresso.checkpoint.source import Source
from compresso.errors import ArchError

_CALLED = {
    AutoModel: "a model without a head",
    AutoModelForMaskedLM: "a model that fills gaps in text",
    AutoModelForQuestionAnswering: "a model that finds answers in texts",
    AutoModelForSequenceClassification: "a classifier of texts",
    AutoModelForImageClassification: "a classifier of images",
    AutoModelForSemanticSegmentation: "a segmenter of images",
}
"""What is opened beside causal language models, by transformers' class that opens it."""


def refuse_textless(source: Source, cure: str) -> None:
    """Raise ArchError, ending in the cure, for a model that writes no text."""
    if not is_causal(source.config):
        raise ArchError(f"{source.name} ({source.config.model_type}) is {called(source.config)}; {cure}")


def called(config: PreTrainedConfig) -> str:
    """What a model that writes no text is, in words.

    >>> from transformers import BertConfig
    >>> called(BertConfig(architectures=["BertModel"]))
    'a model without a head'
    """
    return _CALLED.get(auto_class(config), "no causal language model")
