"""The commands that look at models and results: measure, evaluate, compare, export and verify.

Each parses its options, calls the function that does the work, and prints what that returns.
"""

from pathlib import Path
from typing import Annotated

import typer

from compresso.cli.app import app
from compresso.cli.options import Cache, Device, Force, Json, Overwrite, SkipBad, Weights, warn_of
from compresso.errors import DataError, quoted


@app.command()
def measure(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Folders, GGUF files, hub ids; the dense one first.")
    ],
    batch: Annotated[str | None, typer.Option(help="Batch sizes, such as 1,8; default 1,8, and 32 on a GPU.")] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(help="Length of the prompts; default 256, or what a context holds.")
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option(help="Tokens decoded after each; default 64, or what a context holds.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Timed rounds, in which the models take turns.")] = 5,
    device: Device = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16 for all; default: as the first is stored.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random prompts.")] = 0,
    memory: Annotated[
        bool, typer.Option("--memory/--no-memory", help="Peak memory, in a process of its own for each model.")
    ] = True,
    output: Annotated[
        Path | None, typer.Option(help="A JSON file for the report; one that lies there is replaced.")
    ] = None,
    cache: Cache = None,
    as_json: Json = False,
) -> None:
    """Size, cost, memory, prefill and decode speed of models, side by side.

    Example: compresso measure ./llama-7b ./llama-5b --batch 1,8
    """
    from compresso.commands import measure

    report = measure.measure(
        models,
        batches=None if batch is None else measure.batch_sizes(batch),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        rounds=rounds,
        memory=memory,
        device=device,
        dtype=dtype,
        seed=seed,
        output=output,
        cache=cache,
    )
    measure.show(report, as_json)


@app.command()
def latency(
    model: Weights,
    engine: Annotated[str, typer.Option(help="torch, onnxruntime or llama.cpp.")] = "torch",
    batch: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 1,
    context: Annotated[int, typer.Option(min=1, help="Tokens before the decoded one, or of the prefill.")] = 512,
    phase: Annotated[str, typer.Option(help="decode (one token at the context) or prefill.")] = "decode",
    dtype: Annotated[
        str | None, typer.Option(help="Of the weights, as the engine names it; float32 on a CPU, else as stored.")
    ] = None,
    levels: Annotated[int, typer.Option(min=1, help="Numbers of channels, and of heads, that are timed; torch.")] = 6,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds, in which the models take turns.")] = 9,
    device: Device = "auto",
    output: Annotated[
        Path | None, typer.Option(help="A JSON file for the table; one that lies there is replaced.")
    ] = None,
    as_json: Json = False,
) -> None:
    """What each module of a model takes on this machine, for --milliseconds and --speedup.

    Example: compresso latency ./llama-7b --context 1024 --output llama-7b-latency.json
    """
    from compresso.commands import latency

    table = latency.latency(
        model,
        engine=engine,
        batch=batch,
        context=context,
        phase=phase,
        dtype=dtype,
        levels=levels,
        rounds=rounds,
        device=device,
        output=output,
    )
    latency.show(table, as_json)


def _limit(text: str | None) -> str | None:
    """A number of items or a share of them; anything else is a usage error."""
    if text is None:
        return None
    from compresso.commands.evaluate import limit_of

    try:
        limit_of(text)
    except DataError as error:
        raise typer.BadParameter(quoted(str(error).partition(": ")[2])) from error
    return text


@app.command()
def evaluate(
    model: Weights,
    suite: Annotated[str | None, typer.Option(help="commonsense, reading, mmlu, bbh or world; refusal; trust.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Single tasks, several with commas, such as piqa,boolq.")] = None,
    prompt: Annotated[
        str, typer.Option(help="Collaborative prompt: on, off or both; auto: on if pruned with it.")
    ] = "auto",
    limit: Annotated[
        str | None,
        typer.Option(
            callback=_limit,
            help="Most items of each task, the first ones; of refusal and trust also a share, as 5%, drawn by --seed.",
        ),
    ] = None,
    corpus: Annotated[
        str | None, typer.Option(help="Perplexity on wikitext2, c4 or a local file; without tasks, wikitext2.")
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            help=(
                "sparsegpt (2048 tokens), llm-pruner (128), compresso (1024); default: the first that the context"
                " holds."
            )
        ),
    ] = None,
    data_root: Annotated[
        Path | None, typer.Option(help="Folder with local data files; else that of COMPRESSO_DATA, else the hub.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows a forward.")] = 8,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Of examples that are drawn.")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="File for the report of all numbers, as JSON; one that lies there is replaced.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="What the model was trained for, such as classification; scored on --data.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Examples to score --task on.")] = None,
    skip_bad: SkipBad = False,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Of --suite refusal: harmful tasks in templates (arXiv 2401.10862), not shipped."),
    ] = None,
    benign: Annotated[
        Path | None, typer.Option(help="Of --suite refusal: everyday tasks in the same templates.")
    ] = None,
    judge: Annotated[
        str | None, typer.Option(help="Of --suite refusal: a chat model that tells which answers are harmful.")
    ] = None,
    judge_labels: Annotated[
        Path | None, typer.Option(help="Labelled answers (.jsonl) that --judge is held against.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Of --suite refusal and trust: the dense model, asked the same.")
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(help="Of --suite refusal and trust: a folder that keeps each answer; a stopped call goes on."),
    ] = None,
    new_tokens: Annotated[int | None, typer.Option(min=1, help="Of --suite refusal: most tokens of an answer.")] = None,
    scoring: Annotated[
        str, typer.Option(help="Of --suite trust: likelihood of the choices, or texts sampled as published.")
    ] = "likelihood",
    generations: Annotated[
        int, typer.Option(min=1, help="Of --suite trust, sampled: texts drawn for each request.")
    ] = 25,
    cache: Cache = None,
    scorer: Annotated[
        str | None, typer.Option(help="Of --suite trust, sampled: a text classifier that says how toxic texts are.")
    ] = None,
    scorer_label: Annotated[str | None, typer.Option(help="The label of --scorer that means toxic.")] = None,
    attention: Annotated[
        bool,
        typer.Option("--attention", help="Of --suite refusal: also how much attention tasks and templates get (slow)."),
    ] = False,
    as_json: Json = False,
) -> None:
    """What a model can do: perplexity, and benchmark tasks with their standard errors.

    Example: compresso evaluate ./llama-5b --suite commonsense --prompt both --output llama-5b.json
    """
    from compresso.commands import evaluate, evaluate_table

    report = evaluate.evaluate(
        model,
        suite=suite,
        tasks=None if tasks is None else [name for name in tasks.split(",") if name],
        corpus=corpus,
        protocol=protocol,
        prompt=prompt,
        limit=limit,
        data_root=data_root,
        batch_size=batch,
        device=device,
        seed=seed,
        output=output,
        task=task,
        data=data,
        skip_bad=skip_bad,
        prompts=prompts,
        benign=benign,
        judge=judge,
        judge_labels=judge_labels,
        against=against,
        answers=answers,
        new_tokens=new_tokens,
        scoring=scoring,
        generations=generations,
        cache=cache,
        scorer=scorer,
        scorer_label=scorer_label,
        attention=attention,
    )
    evaluate_table.show(report, as_json)


@app.command()
def compare(
    results: Annotated[
        list[str], typer.Argument(metavar="DIR|FILE.json...", help="Folders of runs, files of evaluate and measure.")
    ],
    output: Annotated[
        Path, typer.Option(help="The page with tables, plots and texts; a report that lies there is replaced.")
    ] = Path("report.html"),
    as_json: Json = False,
) -> None:
    """Several results side by side: a table here, and one self-contained HTML page.

    Example: compresso compare ./llama-small ./llama-uniform dense.json --output report.html
    """
    from compresso.commands import compare

    compare.show(compare.compare(results, output), as_json)
    if not as_json:
        print(f"report: {output}")


@app.command()
def export(
    model: Weights,
    output: Annotated[Path, typer.Option(help="The file or folder to write.")],
    file_format: Annotated[
        str,
        typer.Option(
            "--format",
            help="gguf, for llama.cpp; onnx; compressed-tensors, of rounded models; vllm-deci; low-rank, of svd;"
            " sliced, of slicegpt.",
        ),
    ],
    dtype: Annotated[
        str | None,
        typer.Option(
            help=(
                "Of gguf: f32, f16 (the default), bf16, q8_0, q4_0, q4_k_m and its like; of onnx: f32 (the default),"
                " int8, and f16 of a model of pictures."
            )
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Pictures of a model of pictures: they scale int8, and classes are compared on them."),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """A checkpoint in the format of another engine, opened there if it is installed.

    Example: compresso export ./llama-5b --format gguf --output llama-5b.gguf --dtype q8_0
    """
    from compresso.commands import export

    if force:
        warn_of("--force", "--overwrite")
    facts = export.export(model, output, format=file_format, dtype=dtype, data=data, overwrite=overwrite or force)
    export.show(facts, as_json)


@app.command()
def verify(
    model: Weights,
    as_json: Json = False,
) -> None:
    """In which engines a checkpoint opens and computes the same, and why not in the others.

    Example: compresso verify ./llama-5b
    """
    from compresso.commands import verify

    found = verify.verify(model)
    verify.show(found, as_json)
    if not verify.opens_here(found):
        raise typer.Exit(2)
