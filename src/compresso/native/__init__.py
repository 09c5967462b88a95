"""Our model classes, per layer (dense, of mixtures of experts, and of SegFormer), of low rank, with a sliced stream and
of MobileViT under a pyramid, and their registration with transformers.

Importing this package registers them. `import compresso` sees to that as soon as transformers' auto classes are there,
so that `AutoModelForCausalLM.from_pretrained` opens what we wrote without `trust_remote_code`.
"""

from pathlib import Path

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
)

from compresso.native import modeling_compresso as modeling
from compresso.native import modeling_compresso_lowrank as low_rank
from compresso.native import modeling_compresso_moe as moe
from compresso.native import modeling_compresso_patched as patched
from compresso.native import modeling_compresso_pyramid as pyramid
from compresso.native import modeling_compresso_segformer as segformer
from compresso.native import modeling_compresso_sliced as sliced

MODELING_FILE = Path(modeling.__file__)
MOE_FILE = Path(moe.__file__)
LOW_RANK_FILE = Path(low_rank.__file__)
SLICED_FILE = Path(sliced.__file__)
PATCHED_FILE = Path(patched.__file__)
PYRAMID_FILE = Path(pyramid.__file__)
SEGFORMER_FILE = Path(segformer.__file__)
PATCHED_CLASS = patched.PatchedForCausalLM
CLASSES = {
    "llama": (modeling.CompressoLlamaConfig, modeling.CompressoLlamaModel, modeling.CompressoLlamaForCausalLM),
    "mistral": (modeling.CompressoMistralConfig, modeling.CompressoMistralModel, modeling.CompressoMistralForCausalLM),
    "qwen2": (modeling.CompressoQwen2Config, modeling.CompressoQwen2Model, modeling.CompressoQwen2ForCausalLM),
    "qwen3": (modeling.CompressoQwen3Config, modeling.CompressoQwen3Model, modeling.CompressoQwen3ForCausalLM),
}
"""Config, decoder and language model of each dense family that has a per-layer form."""
MOE_CLASSES = {
    "mixtral": (moe.CompressoMixtralConfig, moe.CompressoMixtralModel, moe.CompressoMixtralForCausalLM),
    "qwen2_moe": (moe.CompressoQwen2MoeConfig, moe.CompressoQwen2MoeModel, moe.CompressoQwen2MoeForCausalLM),
    "qwen3_moe": (moe.CompressoQwen3MoeConfig, moe.CompressoQwen3MoeModel, moe.CompressoQwen3MoeForCausalLM),
    "olmoe": (moe.CompressoOlmoeConfig, moe.CompressoOlmoeModel, moe.CompressoOlmoeForCausalLM),
}
"""Likewise of each family of mixtures of experts."""
LOW_RANK_CLASSES = {
    "llama": (low_rank.CompressoLowRankLlamaConfig, low_rank.CompressoLowRankLlamaForCausalLM),
    "mistral": (low_rank.CompressoLowRankMistralConfig, low_rank.CompressoLowRankMistralForCausalLM),
    "qwen2": (low_rank.CompressoLowRankQwen2Config, low_rank.CompressoLowRankQwen2ForCausalLM),
    "qwen3": (low_rank.CompressoLowRankQwen3Config, low_rank.CompressoLowRankQwen3ForCausalLM),
}
"""Config and language model of each family whose linears may be products of two."""
SLICED_CLASSES = {
    "llama": (sliced.CompressoSlicedLlamaConfig, sliced.CompressoSlicedLlamaForCausalLM),
    "mistral": (sliced.CompressoSlicedMistralConfig, sliced.CompressoSlicedMistralForCausalLM),
    "qwen2": (sliced.CompressoSlicedQwen2Config, sliced.CompressoSlicedQwen2ForCausalLM),
    "qwen3": (sliced.CompressoSlicedQwen3Config, sliced.CompressoSlicedQwen3ForCausalLM),
    "opt": (sliced.CompressoSlicedOPTConfig, sliced.CompressoSlicedOPTForCausalLM),
    "gpt2": (sliced.CompressoSlicedGPT2Config, sliced.CompressoSlicedGPT2LMHeadModel),
}
"""Config and language model of each family whose stream may be sliced."""
PYRAMID_CLASSES = {
    "mobilevit": (
        pyramid.CompressoMobileViTPyramidConfig,
        pyramid.CompressoMobileViTPyramidModel,
        pyramid.CompressoMobileViTPyramidForSemanticSegmentation,
    )
}
"""Config, backbone and segmenter of each family whose features go through a pyramid."""
SEGFORMER_CLASSES = {
    "segformer": (
        segformer.CompressoSegformerConfig,
        segformer.CompressoSegformerModel,
        segformer.CompressoSegformerForSemanticSegmentation,
        segformer.CompressoSegformerForImageClassification,
    )
}
"""Config, backbone, segmenter and classifier of each family of stages whose layers may be unequal."""


def register() -> None:
    """Register with transformers `compresso_llama`, `compresso_lowrank_llama`, `compresso_sliced_llama`, those of the
    other families, `compresso_mobilevit_pyramid` and `compresso_segformer`; idempotent.
    """
    for config, decoder, language_model in (*CLASSES.values(), *MOE_CLASSES.values()):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, decoder, exist_ok=True)
        AutoModelForCausalLM.register(config, language_model, exist_ok=True)
    for config, language_model in (*LOW_RANK_CLASSES.values(), *SLICED_CLASSES.values()):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, language_model, exist_ok=True)
    for config, backbone, segmenter in PYRAMID_CLASSES.values():
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, backbone, exist_ok=True)
        AutoModelForSemanticSegmentation.register(config, segmenter, exist_ok=True)
    for config, backbone, segmenter, classifier in SEGFORMER_CLASSES.values():
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, backbone, exist_ok=True)
        AutoModelForSemanticSegmentation.register(config, segmenter, exist_ok=True)
        AutoModelForImageClassification.register(config, classifier, exist_ok=True)


def is_low_rank(model_type: object) -> bool:
    """Whether a model type is one of those whose linears are products of two."""
    return any(config.model_type == model_type for config, _ in LOW_RANK_CLASSES.values())


def is_sliced(model_type: object) -> bool:
    """Whether a model type is one of those whose stream is sliced."""
    return any(config.model_type == model_type for config, _ in SLICED_CLASSES.values())


def pyramid_auto_map(model_type: object) -> dict[str, str]:
    """What the config of a model under a pyramid says of its classes, which lie in `PYRAMID_FILE`; {} of others."""
    for config, backbone, segmenter in PYRAMID_CLASSES.values():
        if config.model_type == model_type:
            named = {"AutoConfig": config, "AutoModel": backbone, "AutoModelForSemanticSegmentation": segmenter}
            return {auto: f"{PYRAMID_FILE.stem}.{cls.__name__}" for auto, cls in named.items()}
    return {}


def segformer_auto_map(model_type: object) -> dict[str, str]:
    """What the config of a SegFormer of unequal layers says of its classes, which lie in `SEGFORMER_FILE`; {} of
    others.
    """
    for config, backbone, segmenter, classifier in SEGFORMER_CLASSES.values():
        if config.model_type == model_type:
            named = {
                "AutoConfig": config,
                "AutoModel": backbone,
                "AutoModelForSemanticSegmentation": segmenter,
                "AutoModelForImageClassification": classifier,
            }
            return {auto: f"{SEGFORMER_FILE.stem}.{cls.__name__}" for auto, cls in named.items()}
    return {}


def family_of(model_type: str) -> str | None:
    """The dense family that a model type belongs to, in stock or per-layer form: "llama" for `llama` and
    `compresso_llama`; None if unknown.
    """
    family = model_type.removeprefix("compresso_")
    return family if family in CLASSES else None


def mixture_family_of(model_type: str) -> str | None:
    """The family of mixtures of experts that a model type belongs to, in stock or per-layer form; None if it has no
    such form.
    """
    family = model_type.removeprefix("compresso_")
    return family if family in MOE_CLASSES else None


def staged_family_of(model_type: str) -> str | None:
    """The family of stages that a model type belongs to, in stock form or that of unequal layers; None if it has no
    such form.
    """
    family = model_type.removeprefix("compresso_")
    return family if family in SEGFORMER_CLASSES else None


def has_unequal_form(model_type: str) -> bool:
    """Whether layers of unequal widths are written for a model type other than the dense families' (`family_of`)."""
    return mixture_family_of(model_type) is not None or staged_family_of(model_type) is not None


def stock_type(model_type: str) -> str:
    """The model type that transformers has for a per-layer form of ours; of another model type, that."""
    return family_of(model_type) or mixture_family_of(model_type) or model_type


def per_layer_file(model_type: str) -> Path | None:
    """The file with the class of a model type whose layers differ, which lies beside its weights; None of others."""
    if stock_type(model_type) == model_type:
        return None
    return MODELING_FILE if family_of(model_type) else MOE_FILE


def per_layer_auto_map(model_type: str) -> dict[str, str]:
    """What the config of a model whose layers differ says of its classes, in `per_layer_file`; {} of others."""
    for families, file in ((CLASSES, MODELING_FILE), (MOE_CLASSES, MOE_FILE)):
        for config, decoder, language_model in families.values():
            if config.model_type == model_type:
                named = {"AutoConfig": config, "AutoModel": decoder, "AutoModelForCausalLM": language_model}
                return {auto: f"{file.stem}.{cls.__name__}" for auto, cls in named.items()}
    return {}


register()
