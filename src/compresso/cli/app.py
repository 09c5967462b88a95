"""The program: its name, its help, and the options before a command."""

from importlib.metadata import version as installed
from typing import Annotated

import typer

app = typer.Typer(
    name="compresso",
    help=(
        "Makes Hugging Face language models really smaller and faster, and measures what it cost.\n\n"
        "Example: compresso demo --output demo-output"
    ),
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(asked: bool) -> None:
    if asked:
        print(f"compresso {installed('compresso-llm')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """The options before a command; its help text is the app's."""
