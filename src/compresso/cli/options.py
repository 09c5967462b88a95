"""Options that several commands take, each declared once, and the old names that still work or say what took their
place.
"""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from compresso.errors import GONE_IN

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's name or a YAML file.")]
Weights = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, local folder of safetensors, or GGUF file.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Cache = Annotated[
    str | None,
    typer.Option(
        metavar="RULE:HOW-MUCH",
        help=(
            "A cache that forgets without training: window, knorm, keydiff, h2o or snapkv, and the share or number of"
            " tokens that stay, as keydiff:0.5."
        ),
    ),
]
Seed = Annotated[int, typer.Option(help="Of every random draw.")]

Keep = Annotated[
    float | None,
    typer.Option(help="Share that stays, in (0, 1]; of the block parameters, unless the recipe counts something else."),
]
Parameters = Annotated[str | None, typer.Option(help="Total parameters wanted, such as 5.4B.")]
Macs = Annotated[
    float | None,
    typer.Option(
        help=(
            "The dense model's multiply-accumulates a token over the smaller one's, at least 1: 1.5 keeps 1/1.5 of"
            " them. It measures no time."
        )
    ),
]
Milliseconds = Annotated[
    float | None, typer.Option(help="Milliseconds that one forward may take, as --latency-table tells them.")
]
Speedup = Annotated[
    str | None,
    typer.Option(
        help="Measured time of the dense model over the smaller one's, by --latency-table: 1.5x; of 1.2x,1.5x,2x each"
        " gives a checkpoint."
    ),
]
LatencyTable = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="What `compresso latency` wrote for this model on this machine."),
]
Memory = Annotated[
    str | None,
    typer.Option(
        help="Of a model of pictures, what a process that reads one takes at most, by --latency-table: 3.7GB."
    ),
]
BytesAtContext = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="TOKENS",
        help="Count bytes of weights and of the cache of so many tokens; --keep is their share.",
    ),
]
Layout = Annotated[
    str, typer.Option(help="uniform, padded or native; auto is uniform where the shapes allow it, else native.")
]
MaxSteps = Annotated[
    int | None, typer.Option(min=1, help="Cap on the updates of each training stage; schedules shrink with it.")
]
Target = Annotated[
    str | None,
    typer.Option(
        metavar="ENGINE", help="Engine whose shape constraints hold: llama.cpp:q4_k, awq:g128, gptq:g128, vllm:tp2."
    ),
]
Task = Annotated[
    str | None,
    typer.Option(
        help="What is trained and judged by: causal-lm, classification, image-classification, masked-lm,"
        " question-answering or segmentation; else what the recipe says."
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Override a knob, such as stages.learn_gates.mask_lr=0.02."),
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace an output that this command wrote; one with other files is refused."),
]
Measure = Annotated[
    Literal["none", "quick", "full"],
    typer.Option(
        help="Measured of both models at the end: full, quick (no speed, short texts), none (held-out loss alone)."
    ),
]
SkipBad = Annotated[
    bool,
    typer.Option(
        "--skip-bad",
        help="Leave malformed data lines, and conversations that the chat template refuses, out, counted.",
    ),
]
AllowDropped = Annotated[
    bool,
    typer.Option("--allow-dropped", help="Go on where more than a fifth of the data gives no example to learn from."),
]
Trust = Annotated[
    Literal["none", "quick", "full"],
    typer.Option(help="Ask both models what tells of trust: quick (a few questions of each dimension), full (all)."),
]
AllowCollapsed = Annotated[
    bool, typer.Option("--allow-collapsed", help="Write the result even if the collapse guard refuses it.")
]


Force = Annotated[bool, typer.Option("--force", hidden=True, help="Deprecated: --overwrite, --allow-collapsed.")]
For = Annotated[str | None, typer.Option("--for", hidden=True, help="Deprecated: --target.")]
Stream = Annotated[bool, typer.Option("--stream", hidden=True, help="Deprecated: --offload.")]


def warn_of(old: str, new: str) -> None:
    """Say on stderr that an option works for one release more, and what takes its place."""
    print(f"warning: {old} is deprecated and goes with compresso {GONE_IN}; give {new}", file=sys.stderr)
