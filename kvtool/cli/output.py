"""stdout is data, stderr is talk: a table, or JSON lines with ``--json``."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# as it is: a path may hold brackets, and a sentence stays one line where there is no terminal
talk = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def emit(records: Sequence[dict[str, Any]], table: Callable[[], RenderableType], *, as_json: bool) -> None:
    """Print ``records`` as JSON lines if ``--json`` was given, else the table."""
    if as_json:
        for record in records:
            print(json.dumps(record, default=str))
    else:
        # rich takes 80 columns where there is no terminal, and would fold figures that a file or a pager can hold
        Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(table())


@contextmanager
def progress(description: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr; yields ``report(done, total)``. Silent when stderr is not a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=talk, transient=True, disable=not talk.is_terminal) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
