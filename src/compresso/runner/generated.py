"""Text that the dense model writes itself, as data (LLM-QAT, arXiv 2305.17888, section 3.1): where no data of its own
kind is at hand, for calibration, recovery and distillation.

    --data generated
    --data generated:examples=2000:tokens=256:temperature=0.8:seed=1
    --data generated,wikitext2

Each window begins with a token drawn from the whole vocabulary; the next few are the most probable ones, which makes
sense of it, and the rest are sampled. Departure: end tokens are never written, so that every window is full; the
authors' windows end with them. Windows are made in parts, each from a seed of its own and written at once, so that an
interrupted run goes on with the same ones; the whole lies in a cache under the model's fingerprint and the settings,
which its name tells the records, the card and the report.

Unusual: probabilities are drawn from on the CPU, from one generator a part. Devices may differ in the last bits of
logits, and so in a token.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from compresso.checkpoint.atomic import lock
from compresso.checkpoint.load import load_model
from compresso.checkpoint.patched import stored_patches
from compresso.checkpoint.source import Source
from compresso.checkpoint.storage import storage_errors
from compresso.core.plain_values import whole_number
from compresso.edit.patches import patch_
from compresso.errors import DataError
from compresso.training.device import choose_device
from compresso.training.launch import processes
from compresso.training.noise import mixed_seed
from compresso.training.progress import Progress

NAME = "generated"
AT_ONCE = 16
"""Windows of a part."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """What is written, and how.

    Args:
        examples: windows.
        tokens: of each, the first included.
        greedy: of these, how many behind the first are the most probable ones.
        temperature: that the logits of the others are divided by.
        seed: of every draw.
    """

    examples: int = 512
    tokens: int = 128
    greedy: int = 4
    temperature: float = 1.0
    seed: int = 0


def is_generated(name: str) -> bool:
    """Whether a source is to be written by the model.

    >>> is_generated("generated:examples=8"), is_generated("generated.jsonl")
    (True, False)
    """
    return name == NAME or name.startswith(NAME + ":")


def parsed(name: str) -> Sampling:
    """The settings in a source's name.

    >>> parsed("generated:tokens=64:temperature=0.7").temperature
    0.7

    Raises:
        DataError: an unknown setting, or a value that it cannot have.
    """
    given: dict[str, float] = {}
    known = {one.name: one.default for one in fields(Sampling)}
    for setting in name.split(":")[1:]:
        key, _, value = setting.partition("=")
        if key not in known:
            raise DataError(f"--data {name[:80]}: unknown setting {key!r}; known are {', '.join(known)}, as tokens=64")
        wanted = "whole number" if isinstance(known[key], int) else "number"
        if (number := _number(value, wanted == "whole number")) is None:
            raise DataError(f"--data {name[:80]}: {key}={value!r} is no {wanted}; give such as {key}={known[key]}")
        given[key] = number
    found = Sampling(**given)  # pyright: ignore[reportArgumentType]  # of the types of the defaults
    in_range = (
        1 <= found.examples <= 10**6
        and 2 <= found.tokens <= 2**17
        and 0 <= found.greedy < found.tokens
        and 0.01 <= found.temperature <= 100
        and found.seed >= 0
    )
    if not in_range:
        raise DataError(
            f"--data {name[:80]}: wanted examples of 1 to 1,000,000, tokens of 2 to 131,072, greedy below tokens,"
            " temperature of 0.01 to 100 and a seed that is not negative"
        )
    return found


def _number(text: str, whole: bool) -> float | None:
    """The number that a text writes, and 64.0 is a whole one; None where it writes none."""
    try:
        return int(text) if whole else float(text)
    except ValueError:
        pass
    try:
        return whole_number(float(text))
    except ValueError:
        return None


def with_generated(data: str, source: Source, quiet: bool = False) -> str:
    """What `--data` names, with the file in the cache in the place of each source that the model is to write; written
    now if it is not there.

    Args:
        data: names and files, joined by commas.
        source: the dense model.
        quiet: show no progress.

    Raises:
        DataError: settings that cannot be, the model was opened without weights, or several processes would write it.
        CheckpointError, ResourceError: the model cannot be read, another process writes the same, or the disk refuses.
    """
    if not any(is_generated(part.strip()) for part in data.split(",")) or Path(data).exists():
        return data
    parts = [part.strip() for part in data.split(",")]
    return ",".join(str(_written(part, source, quiet)) if is_generated(part) else part for part in parts)


def folder() -> Path:
    """Where windows are kept: COMPRESSO_CACHE, or `compresso` in the user's cache folder."""
    if given := os.environ.get("COMPRESSO_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "compresso"


def _written(name: str, source: Source, quiet: bool) -> Path:
    """The file of windows for a source's name, written if need be."""
    how = parsed(name)
    context = getattr(source.config, "max_position_embeddings", None)
    if isinstance(context, int) and how.tokens > context:
        raise DataError(f"--data {name}: the model reads {context} tokens at most; give tokens={context} or fewer")
    if not source.tensors:
        raise DataError(
            f"--data {name}: the model writes it when a run begins, and no weights are read here; leave --data out"
        )
    asked = repr((source.identity.fingerprint, how))
    told = f"{how.examples}x{how.tokens}-greedy{how.greedy}-t{how.temperature:g}-seed{how.seed}"
    file = folder() / f"{NAME}-{told}-{hashlib.sha256(asked.encode()).hexdigest()[:12]}.safetensors"
    if file.is_file():
        return file
    if processes() > 1:
        raise DataError(f"--data {name}: write it with one process first, such as by a run with --max-steps 1")
    with lock(file), storage_errors(file):
        device = choose_device("auto")
        model = load_model(source, torch.float32 if device.type == "cpu" else None, device)
        patch_(model, stored_patches(source))
        parts = file.with_suffix(".parts")
        parts.mkdir(parents=True, exist_ok=True)
        windows = torch.cat(list(_parts(model, how, parts, Progress("silent" if quiet else "auto"))))
        _save(windows, file)
        for part in parts.iterdir():
            part.unlink()
        parts.rmdir()
    return file


def _parts(model: PreTrainedModel, how: Sampling, folder: Path, shown: Progress) -> Iterator[Tensor]:
    """The windows [n, tokens] of each part; read where they were written before."""
    starts = range(0, how.examples, AT_ONCE)
    there = sum((folder / f"{number:06d}.safetensors").is_file() for number in range(len(starts)))
    with shown.running(len(starts), there, "the model writes its own data"):
        done = there
        for number, start in enumerate(starts):
            file = folder / f"{number:06d}.safetensors"
            if file.is_file():
                yield load_file(file)["input_ids"]
                continue
            n = min(AT_ONCE, how.examples - start)
            windows = write(model, how, n, torch.Generator().manual_seed(mixed_seed(NAME, how.seed, number)))
            _save(windows, file)
            done += 1
            shown.step(done, "the model writes its own data", {}, float(windows.numel()))
            yield windows


@torch.inference_mode()
def write(model: PreTrainedModel, how: Sampling, n: int, generator: torch.Generator) -> Tensor:
    """Windows [n, tokens] that a model writes, int64 on the CPU.

    Args:
        model: a causal language model in evaluation mode.
        how: the settings; `examples` and `seed` are not looked at.
        n: windows.
        generator: on the CPU, of every draw.
    """
    config, size = model.config, int(model.config.vocab_size)
    named = [getattr(config, f"{kind}_token_id", None) for kind in ("bos", "eos", "pad")]
    own = {id for one in named for id in (one if isinstance(one, list) else [one]) if isinstance(id, int) and id < size}
    first = torch.ones(size, dtype=torch.float64)
    first[list(own)] = 0
    if not first.any():
        first[:] = 1
    barred = torch.zeros(size)
    barred[list(own)] = float("-inf") if len(own) < size else 0.0
    token = torch.multinomial(first, n, replacement=True, generator=generator).unsqueeze(1)
    written, past = [token], None
    for at in range(1, how.tokens):
        result = model(input_ids=token.to(model.device), past_key_values=past, use_cache=True)
        past, logits = result.past_key_values, result.logits[:, -1, :size].float().cpu() + barred
        if at <= how.greedy:
            token = logits.argmax(-1, keepdim=True)
        else:
            token = torch.multinomial((logits.double() / how.temperature).softmax(-1), 1, generator=generator)
        written.append(token)
    return torch.cat(written, dim=1)


def _save(windows: Tensor, file: Path) -> None:
    """Write windows whole or not at all."""
    partial = file.with_suffix(".partial")
    save_file({"input_ids": windows.contiguous()}, partial)
    partial.replace(file)
