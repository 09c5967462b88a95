"""What may be replaced: a folder that compresso wrote, and nothing that somebody put into it since.

A folder counts as written by a command if it holds that command's mark and no file of another name. Names are patterns
of whole relative paths, in which a star stays within one part.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from compresso.core import strict_json
from compresso.errors import CheckpointError

_TOKENIZER = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "*.model",
)
_LEGAL = ("license*", "licence*", "copying*", "copyright*", "notice*", "use_policy*", "*[-_]license*", "*[-_]licence*")
"""Licences and notices, in any case of letters: they go where the weights go."""
_PROGRAMS = (".py", ".sh", ".so", ".js", ".bin", ".pt", ".pth", ".pkl", ".safetensors")
_CARRIED = (
    "*.tiktoken",
    "tekken.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
_CHECKPOINT = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "modeling_compresso.py",
    "modeling_compresso_moe.py",
    "modeling_compresso_patched.py",
    "modeling_compresso_pyramid.py",
    "modeling_compresso_segformer.py",
    *_TOKENIZER,
    *_CARRIED,
)


GGUF_MARK = ("general.written_by", "compresso export")
"""A field, and its value, of the GGUF files that `compresso export` writes, the first after the architecture."""
ONNX_MARKS = ("compresso_cache", "compresso_inputs")
"""Fields of the config beside a graph that `compresso export` writes: of a language model, of an encoder."""
PACKED_MARK = "(`pip install compresso-llm`) rounded, packed by"
"""In the card of an export with packed weights, and of nobody else's."""
_MARKED_WITHIN = 1_024  # bytes


@dataclass(frozen=True)
class Written:
    """What a command writes.

    Args:
        by: the command, for messages.
        files: patterns of its files.
        mark: whether a folder is one of its results.
    """

    by: str
    files: tuple[str, ...]
    mark: Callable[[Path], bool]


def refuse_foreign(output: Path, written: Written) -> None:
    """Raise CheckpointError if a folder that is to be replaced was not written by this command, or holds anything else.

    A folder that does not exist or is empty passes.
    """
    output = output.resolve()
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not written.mark(output):
        raise CheckpointError(
            f"output {output} was not written by compresso {written.by} and will not be replaced even with --overwrite."
            " Choose another output."
        )
    if (name := _foreign_file(output, written)) is not None:
        raise CheckpointError(
            f"output {output} holds {name}, which compresso {written.by} did not write, so --overwrite does not"
            " replace it. Move that file, or choose another output."
        )


def first_bytes(path: Path, most: int = 2_000) -> bytes:
    """How a file begins that is to be replaced, which tells what it is; b"" where nothing lies.

    Raises:
        CheckpointError: a device, pipe or socket lies there, which would be read without end and replaced by a file.
    """
    if not path.exists():
        return b""
    if not path.is_file():
        raise CheckpointError(f"output {path} is no file but a device, pipe or socket. Choose another output.")
    with path.open("rb") as file:
        return file.read(most)


def how_to_replace(output: Path, written: Written) -> str:
    """What a person may do about an occupied folder, a sentence that begins behind "and is not empty": --overwrite is
    offered only where it would replace the folder.
    """
    if not written.mark(output):
        return f", and was not written by compresso {written.by}. Choose another output."
    if (name := _foreign_file(output, written)) is not None:
        return (
            f", and holds {name}, which compresso {written.by} did not write. Choose another output, or move that file"
            " and add --overwrite."
        )
    article = "an" if written.by[0] in "aeiou" else "a"
    return f". Choose another output, or add --overwrite to replace what {article} {written.by} wrote."


def _foreign_file(output: Path, written: Written) -> Path | None:
    """The first file below a folder that a command does not write, relative to it."""
    for path in _files(output):
        name = path.relative_to(output)
        known = any(fits(PurePosixPath(name.as_posix()), pattern) for pattern in written.files)
        if not known and not (len(name.parts) == 1 and is_legal(name.name)):
            return name
    return None


def refuse_foreign_gguf(output: Path) -> None:
    """Raise CheckpointError if a file that is to be replaced is no GGUF that `compresso export` wrote."""
    if not output.is_file():
        return
    begin = first_bytes(output, _MARKED_WITHIN)
    if not begin.startswith(b"GGUF"):
        raise CheckpointError(
            f"{output} is no GGUF file and will not be replaced even with --overwrite. Choose another output."
        )
    if not all(part.encode() in begin for part in GGUF_MARK):
        raise CheckpointError(
            f"{output} is a GGUF file without the field {GGUF_MARK[0]} that compresso export writes, so --overwrite"
            " does not replace it. Move that file, or choose another output."
        )


def fits(name: PurePosixPath, pattern: str) -> bool:
    """Whether a relative path has a pattern's parts.

    >>> fits(PurePosixPath("adapters/recover/adapter_config.json"), "adapters/*/adapter_config.json")
    True
    >>> fits(PurePosixPath("old/model.safetensors"), "*.safetensors")
    False
    """
    parts = pattern.split("/")
    return len(parts) == len(name.parts) and all(map(fnmatchcase, name.parts, parts))


def is_legal(name: str) -> bool:
    """Whether a file is called as licences and notices are, and not as a program.

    >>> is_legal("LICENSE.txt"), is_legal("Notice"), is_legal("license.py"), is_legal("model.safetensors")
    (True, True, False, False)
    """
    return any(fnmatchcase(name.lower(), one) for one in _LEGAL) and not name.lower().endswith(_PROGRAMS)


def _files(folder: Path) -> Iterator[Path]:
    """Everything below a folder that is no folder itself, links included, and empty folders."""
    for path in sorted(folder.iterdir()):
        inner = list(path.iterdir()) if path.is_dir() and not path.is_symlink() else []
        if inner:
            yield from _files(path)
        else:
            yield path


def _json(path: Path) -> dict[str, object]:
    """The object in a JSON file; empty if there is none."""
    try:
        found = strict_json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_run(folder: Path) -> bool:
    return {"format", "recipe", "stages"} <= _json(folder / "records.json").keys()


def _is_packed(folder: Path) -> bool:
    quantization = _json(folder / "config.json").get("quantization_config")
    packed = isinstance(quantization, dict) and quantization.get("quant_method") == "compressed-tensors"
    return packed and PACKED_MARK.encode() in first_bytes(folder / "README.md")


def demo(runs: tuple[str, ...]) -> Written:
    """What `compresso demo` writes: a folder for each of these runs and the report, as a page and as a file (which
    release 0.1 called account.json).
    """
    inner = tuple(f"{run}/{pattern}" for run in runs for pattern in RUN.files)
    reports = ("report.json", "account.json")
    return Written(
        "demo",
        (*reports, "report.html", *inner),
        lambda folder: any((folder / name).is_file() for name in reports),
    )


def demo_real(runs: tuple[str, ...]) -> Written:
    """What `compresso demo --model` writes: answers, a folder for each of these runs, the report and a GGUF."""
    inner = tuple(f"{run}/{pattern}" for run in runs for pattern in RUN.files)
    files = ("answers.jsonl", "report.html", "*.gguf", *inner)
    return Written("demo", files, lambda folder: (folder / "answers.jsonl").is_file())


RUN = Written(
    "run",
    (
        "recipe.yaml",
        "plan.json",
        "kept_experts.json",
        "records.json",
        "README.md",
        "report.html",
        "patches/tensors.safetensors",
        "adapters/*/adapter_config.json",
        "adapters/*/adapter_model.safetensors",
        *_CHECKPOINT,
    ),
    _is_run,
)
FAMILY = Written(
    "run with several targets",
    tuple(f"*/{pattern}" for pattern in RUN.files),
    lambda folder: any(_is_run(one) for one in folder.iterdir() if one.is_dir()),
)
EXPORTS = {
    "onnx": Written(
        "export",
        ("model.onnx*", "config.json", "generation_config.json", *_TOKENIZER, *_CARRIED),
        lambda folder: (folder / "model.onnx").is_file() and any(map(_json(folder / "config.json").get, ONNX_MARKS)),
    ),
    "vllm-deci": Written(
        "export",
        (*_CHECKPOINT, "configuration_decilm.py"),
        lambda folder: (folder / "configuration_decilm.py").is_file(),
    ),
    "compressed-tensors": Written("export", ("README.md", *_CHECKPOINT), _is_packed),
    "low-rank": Written(
        "export",
        ("README.md", "modeling_compresso_lowrank.py", *_CHECKPOINT),
        lambda folder: (folder / "modeling_compresso_lowrank.py").is_file(),
    ),
    "sliced": Written(
        "export",
        ("README.md", "modeling_compresso_sliced.py", *_CHECKPOINT),
        lambda folder: (folder / "modeling_compresso_sliced.py").is_file(),
    ),
}
"""What `compresso export` writes, by format; a GGUF is a single file."""
