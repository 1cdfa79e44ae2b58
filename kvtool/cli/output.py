"""stdout is data, stderr is talk: JSON lines when piped or asked for, a table on a terminal."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

talk = Console(stderr=True, highlight=False)


def emit(records: Sequence[dict[str, Any]], table: Callable[[], RenderableType], *, as_json: bool) -> None:
    """Print ``records`` as JSON lines if ``--json`` was given or stdout is not a terminal, else the table."""
    if as_json or not sys.stdout.isatty():
        for record in records:
            print(json.dumps(record, default=str))
    else:
        # a table wider than the terminal is folded by rich; figures stay readable
        Console(highlight=False).print(table())


@contextmanager
def progress(description: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr; yields ``report(done, total)``. Silent when stderr is not a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=talk, transient=True, disable=not talk.is_terminal) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
