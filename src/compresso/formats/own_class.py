"""Writing a folder of a model class of ours: weights, a config that names the class and the modelling file that holds
it, for what no class of transformers has.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from compresso.checkpoint.atomic import new_folder, write_text
from compresso.formats.beside import write_beside

_NOT_CARRIED = ("model_type", "architectures", "auto_map", "transformers_version", "_name_or_path")


def own_config(
    model: PreTrainedModel,
    config_class: type[PreTrainedConfig],
    language_model: type[PreTrainedModel],
    file: Path,
    **fields: Any,
) -> PreTrainedConfig:
    """A stock model's config, as one of ours with further fields, which names the classes in the modelling file."""
    given = {key: value for key, value in model.config.to_dict().items() if key not in _NOT_CARRIED}
    config = config_class(**{**given, **fields})
    config.architectures, config.dtype = [language_model.__name__], model.dtype
    classes = {"AutoConfig": config_class, "AutoModelForCausalLM": language_model}
    config.auto_map = {auto: f"{file.stem}.{cls.__name__}" for auto, cls in classes.items()}
    return config


def save_own(
    folder: Path | str,
    config: PreTrainedConfig,
    tensors: Mapping[str, Tensor],
    file: Path,
    card: str,
    model: PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    force: bool,
    check: Callable[[Path], None] | None,
    source: Path | None,
) -> None:
    """Write such a folder; it is complete or untouched.

    Args:
        folder: to write.
        config: see `own_config`.
        tensors: by the names of the class.
        file: the modelling file.
        card: text of README.md.
        model: the stock model, for its generation config.
        tokenizer: written beside it.
        force: replace a folder that is not empty.
        check: looks at the written folder before it takes its name; what it raises leaves nothing behind.
        source: the folder that the model came from; what it holds beside weights and config is carried over.

    Raises CheckpointError: `folder` may not be written.
    """
    with new_folder(folder, force) as temporary:
        save_torch_state_dict(
            {name: tensor.contiguous().clone() for name, tensor in tensors.items()},
            temporary,
            metadata={"format": "pt"},
        )
        shutil.copyfile(file, temporary / file.name)
        write_beside(temporary, config, model, tokenizer, source)
        write_text(temporary / "README.md", card)
        if check is not None:
            check(temporary)


def name_of(source: Path | None) -> str:
    """Whose weights these are, for the title of a card: " of `folder`", or nothing."""
    return "" if source is None else " of `" + " ".join(source.resolve().name.replace("`", "'").split()) + "`"


def how_to_load(file: Path) -> str:
    """The part of a card that says what opens such a folder."""
    return f"""## How to load it

```bash
pip install compresso-llm
```

```python
import compresso
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

Without compresso, transformers 5 opens it with `trust_remote_code=True`, which runs {file.name}, beside the
weights."""
