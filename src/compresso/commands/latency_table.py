"""What `compresso latency` prints: the levels of both kinds of module, and what they add up to."""

from rich.console import Console
from rich.table import Table

from compresso.commands.latency_pictures import show_pictures
from compresso.core.counted import counted
from compresso.core.latency_table import LatencyTable
from compresso.core.picture_table import PictureTable


def show(table: LatencyTable | PictureTable, as_json: bool) -> None:
    """Print a latency table as JSON or as a table for people."""
    if isinstance(table, PictureTable):
        show_pictures(table, as_json)
        return
    if as_json:
        print(table.to_json(), end="")
        return
    console = Console()
    machine = table.machine
    threads = counted(int(machine["threads"]), "thread")
    shown = Table(
        title=f"ms a forward: {table.conditions.words}; {machine['hardware']}, {threads}",
        title_justify="left",
    )
    for column in ("module", "units", "ms", "of all units"):
        shown.add_column(column, justify="left" if column == "module" else "right")
    for name, unit, curve in (
        ("attention of a layer", "key/value heads", table.attention),
        ("FFN of a layer", "channels", table.ffn),
    ):
        whole = curve[max(curve)]
        for number, (units, ms) in enumerate(sorted(curve.items())):
            share = f"{ms / whole:.2f}" if whole else "-"
            shown.add_row(name if not number else "", f"{units:,} {unit}", f"{ms:.4g}", share)
    shown.add_row("embeddings, head, final norm", "", f"{table.fixed:.4g}", "")
    console.print(shown)
    error = "" if table.error is None else f"; the fit misses no file by more than {table.error:.1%}"
    console.print(f"{table.how}, medians over {counted(table.measured, 'forward')}{error}", highlight=False)
