"""``kvtool methods``: what the registry holds."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group
from rich.table import Table

from kvtool.cli.output import emit

if TYPE_CHECKING:
    from kvtool.methods.describe import Description


def methods(
    name: Annotated[str | None, typer.Argument(help="One method, with its options. Without it: all of them.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per method.")] = False,
) -> None:
    """List the compression methods, or show one with its options.

    Example: `kvtool methods turboquant`
    """
    from kvtool.methods.describe import describe

    found = describe(name)
    emit([one.record() for one in found], lambda: _details(found[0]) if name else _overview(found), as_json=as_json)


def _overview(found: "list[Description]") -> Table:
    table = Table("method", "what it does", "kernel", "source")
    for one in found:
        table.add_row(one.name, one.summary, "triton" if one.kernel else "-", one.paper)
    return table


def _details(one: "Description") -> Group:
    options = Table("-o NAME", "type", "default", "range", "meaning")
    for option in one.options:
        options.add_row(option.name, option.type, str(option.default), option.range, option.description)
    facts = [
        f"{one.name}: {one.summary}",
        one.paper,
        f"compressed together: {f'{one.block} tokens' if one.block else 'the whole prompt'}",
        f"kernel: {'triton' if one.kernel else 'none, the reference only'}",
    ]
    return Group(*filter(None, facts), options if one.options else "no options")
