"""Rows as a table on the terminal and as Markdown that can be pasted into an issue.

The columns are those of llama.cpp's perplexity tables: what to compare with is already written down in them.
"""

from collections.abc import Callable, Sequence

from rich.table import Table

from kvtool.evaluate.rows import Row
from kvtool.units import format_bytes, format_tokens

_COLUMNS: dict[str, Callable[[Row], str]] = {
    "": lambda r: "*" if r["pareto"] else "",
    "cache": lambda r: str(r["name"]),
    "bits/value": lambda r: f"{r['bits']:.2f}",
    "stored": lambda r: format_bytes(r["bytes_stored"]),
    "PPL": lambda r: _number(r, "ppl", ".4g"),
    "PPL ratio": lambda r: _with_error(r, "ppl_ratio", 4),
    "KLD mean": lambda r: _with_error(r, "kld", 4),
    "median": lambda r: _number(r, "kld_median", ".2g"),
    "99 %": lambda r: _number(r, "kld_p99", ".2g"),
    "99.9 %": lambda r: _number(r, "kld_p999", ".2g"),
    "max": lambda r: _number(r, "kld_max", ".2g"),
    "RMS dp": lambda r: _number(r, "rms_dp", ".2%"),
    "same top": lambda r: _number(r, "same_top", ".1%"),
    "attention": lambda r: _number(r, "attention_error", ".1%"),
    "passkey": lambda r: _recall(r, "passkey"),
    "multikey": lambda r: _recall(r, "multikey"),
}
_OF_DRIFT = tuple(_COLUMNS)[4:14]


def header(rows: Sequence[Row]) -> str:
    """What the figures are, in the words a reader of the table needs."""
    first = rows[0]
    parts = [f"{first['model']} in {first['dtype']} on {first['device']}"]
    if "kld" in first["tasks"]:
        parts.append(
            f"{first['segments']} segments of {first['text']}: {first['prefix']} tokens compressed, then "
            f"{first['score']} scored, {first['chunk']} at a time"
        )
    for task in ("passkey", "multikey"):
        if task in first["tasks"]:
            parts.append(f"{task} at {format_tokens(first['passkey_context'])} in {first['haystack']}, 95 % interval")
    return "; ".join(parts)


def legend(rows: Sequence[Row]) -> str:
    """How the columns are defined."""
    text = (
        "* no other row is better in bits, KLD and recall at once; bits count every stored byte, exact tokens at 16; "
        "KLD in nats, +- one standard error over segments; attention: relative L2 error of its output, mean over layers"
    )
    backends = sorted({row["backend"] for row in rows if row["backend"]})
    noted = [
        f"; {row['name']}: {share:.1%} {name}"
        for row in rows
        for name, share in (row.get("notes") or {}).items()
        if share
    ]
    return f"{text}; back end: {', '.join(backends)}{''.join(noted)}"


def table(rows: Sequence[Row]) -> Table:
    """For the terminal."""
    found = Table(title=header(rows), caption=legend(rows), title_justify="left", caption_justify="left")
    columns = _columns(rows)
    for name in columns:
        found.add_column(name, justify="left" if name in ("", "cache") else "right", no_wrap=True)
    for row in rows:
        found.add_row(*(_COLUMNS[name](row) for name in columns), style="bold" if row["kind"] == "calibration" else "")
    return found


def markdown(rows: Sequence[Row]) -> str:
    """The same table for an issue or a page."""
    columns = _columns(rows)
    lines = [header(rows), "", "| " + " | ".join(columns) + " |"]
    lines.append("|" + "|".join("---" if name in ("", "cache") else "--:" for name in columns) + "|")
    lines += ["| " + " | ".join(_COLUMNS[name](row) for name in columns) + " |" for row in rows]
    return "\n".join([*lines, "", legend(rows), ""])


def _columns(rows: Sequence[Row]) -> list[str]:
    tasks = rows[0]["tasks"]
    return [
        name
        for name in _COLUMNS
        if (name not in _OF_DRIFT or "kld" in tasks) and (name not in ("passkey", "multikey") or name in tasks)
    ]


def _number(row: Row, key: str, form: str) -> str:
    value = row.get(key)
    return "-" if value is None else format(value, form)


def _with_error(row: Row, key: str, digits: int) -> str:
    error = row[f"{key}_error"]
    return _number(row, key, f".{digits}f") + (f" ±{error:.{digits}f}" if error is not None else "")


def _recall(row: Row, task: str) -> str:
    return f"{row[f'{task}_hits']}/{row[f'{task}_trials']} [{row[f'{task}_low']:.2f}, {row[f'{task}_high']:.2f}]"
