"""The catalogue of methods and recipes, printed."""

import dataclasses
import json
from collections.abc import Mapping

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from compresso.commands.published_results import measured, trust_costs
from compresso.runner.recipe import build, names, read
from compresso.stage import Card, card, cards


def show_methods(name: str | None, as_json: bool) -> None:
    """Print all methods, or one with its knobs. Raises RecipeError for an unknown name."""
    if as_json:
        chosen = [card(name)] if name else list(cards().values())
        print(json.dumps([as_dict(one) for one in chosen], indent=2))
        return
    console = Console()
    if name is None:
        table = Table(
            "method", "paper", "what it does", "needs", title="Methods (stages of recipes)", title_justify="left"
        )
        for one in cards().values():
            table.add_row(one.name, one.paper or "-", one.title, ", ".join(one.needs) or "-")
        console.print(table)
        console.print("One in full: compresso methods NAME")
        return
    one = card(name)
    console.print(f"[bold]{one.name}[/bold]: {one.title}")
    if one.paper:
        console.print(f"paper: arXiv {one.paper}")
    console.print(f"does: {effects(one)}; needs: {', '.join(one.needs) or 'nothing but the model'}")
    console.print(f"when: {one.when}\nfails: {one.failures}")
    table = Table("knob", "default", title="Knobs", title_justify="left")
    for knob in one.knobs.values():
        value = _default(knob.default)
        parts = _parts(value)
        if parts is None:
            table.add_row(knob.name, Text(_written(value)))
        for name, part in (parts or {}).items():
            table.add_row(f"{knob.name}.{name}", Text(_written(part)))
    console.print(table)
    if rows := measured(one.name):
        shares = list(rows[0]["kept"])
        table = Table("on", "number", *(f"{share} kept" for share in shares), title="Measured", title_justify="left")
        for column in table.columns:
            column.overflow = "fold"
        for row in rows:
            number = f"{row['what']} (dense {row['dense']})"
            table.add_row(
                f"{row['method']}: {row['model']}", number, *(row["kept"].get(share, "-") for share in shares)
            )
        console.print(table)
        console.print(rows[0]["how"])
    _show_trust(console, one.name)


def _show_trust(console: Console, stage: str) -> None:
    """What a stage was found to cost in trust, and by whom."""
    rows = trust_costs(stage)
    if not rows:
        console.print(
            "Trust: nobody has measured what it costs; compresso run ... --trust full, or compresso evaluate --suite"
            " trust --against DENSE, says it of your model."
        )
        return
    table = Table("what", "on", "found", "by", title="Trust, beside the dense model", title_justify="left")
    for column in table.columns:
        column.overflow = "fold"
    for row in rows:
        table.add_row(*(Text(row[key]) for key in ("what", "on", "found", "by")))
    console.print(table)
    for by in dict.fromkeys(row["by"] for row in rows):
        console.print(f"{by}: {next(row['how'] for row in rows if row['by'] == by)}")


def effects(one: Card) -> str:
    """What a stage does to the model, in words."""
    return ", ".join(effect.name.lower() for effect in one.effects if effect.name) or "nothing to the model"


def as_dict(one: Card) -> dict[str, object]:
    """A card as plain data."""
    return {
        "name": one.name,
        "title": one.title,
        "paper": one.paper,
        "effects": [effect.name for effect in one.effects],
        "needs": list(one.needs),
        "when": one.when,
        "failures": one.failures,
        "measured": measured(one.name),
        "trust": trust_costs(one.name),
        "knobs": {knob.name: _plain(_default(knob.default)) for knob in one.knobs.values()},
    }


def show_recipes(name: str | None) -> None:
    """Print the names and titles of the recipes that ship, or one in full. Raises RecipeError for an unknown name."""
    if name is not None:
        print(yaml.safe_dump(build(read(name), name).to_dict(), sort_keys=False, width=120), end="")
        return
    table = Table("recipe", "paper", "what it is", title="Recipes", title_justify="left")
    for one in names():
        raw = read(one)
        table.add_row(one, str(raw.get("paper") or "-"), str(raw.get("title", "")))
    console = Console()
    console.print(table)
    console.print("One in full: compresso recipes NAME")


def _default(value: object) -> object:
    return "(required)" if value is dataclasses.MISSING else value


def _parts(value: object) -> dict[str, object] | None:
    """The knobs within a knob; None of one that has no parts."""
    if not dataclasses.is_dataclass(value):
        return None
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _written(value: object) -> str:
    """A default as a recipe would name it: lists and mappings in the words of YAML."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_written(one)}' for key, one in value.items())}}}"
    return str(value)


def _plain(value: object) -> object:
    if (parts := _parts(value)) is not None:
        return {name: _plain(part) for name, part in parts.items()}
    return [str(one) for one in value] if isinstance(value, tuple) else value
