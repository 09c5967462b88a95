"""What `compresso latency` prints of a model of pictures: time, memory and multiply-accumulates at each width."""

from rich.console import Console
from rich.table import Table

from compresso.core.counted import counted
from compresso.core.picture_table import PictureTable
from compresso.runner.picture_budget import said as amount


def show_pictures(table: PictureTable, as_json: bool) -> None:
    """Print it as JSON or for people."""
    if as_json:
        print(table.to_json(), end="")
        return
    machine = table.machine
    shown = Table(
        title=f"a picture of {table.model['image_size']}, torch {table.dtype};"
        f" {machine['hardware']}, {counted(int(machine['threads']), 'thread')}",
        title_justify="left",
    )
    for column in ("share of channels", "MACs a picture", "time", "peak memory"):
        shown.add_column(column, justify="right")
    for one in reversed(table.widths):
        shown.add_row(
            f"{one.share:.0%}",
            f"{one.macs:,.0f}",
            amount("milliseconds", one.milliseconds),
            amount("bytes", one.bytes),
        )
    Console().print(shown)
