"""The tables of ``kvtool bench --e2e``: a whole model's decode step, and a prefill."""

from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from kvtool.cli.output import emit, talk
from kvtool.units import format_bytes, format_tokens

_NAMES = {
    "kvtool": "kvtool, step captured",
    "full": "full cache, best: one graph",
    "transformers": "full cache, transformers today",
}


def run(
    model_shape: str,
    bits: int,
    chosen: Any,
    contexts: list[int],
    batches: list[int],
    *,
    backend: str,
    prefill: int,
    device: Any,
    as_json: bool,
) -> list[dict[str, Any]]:
    """Measure, print, and return the records.

    chosen: an artifact's file, or a method that is fitted to random vectors; None: data-free turboquant.
    """
    from kvtool.bench.end_to_end import Decode, end_to_end
    from kvtool.bench.subject import data_free_method
    from kvtool.bench.synthetic import synthetic_calibration
    from kvtool.bench.whole_model import attention_shape
    from kvtool.calibration import Calibration

    made: Any
    if chosen is None:
        made = data_free_method(bits)
    elif isinstance(chosen, Path):
        made = Calibration.load(chosen)
    else:
        made = synthetic_calibration(chosen, attention_shape(model_shape))
        talk.print(f"bench: {chosen.name} fitted to {made.provenance['fitted_to']}, {model_shape}, on {device.type}")
    records: list[dict[str, Any]] = []
    for context in contexts:
        request = Decode(context, batches, backend, prefill if context == contexts[0] else 0)
        for record in end_to_end(model_shape, made, request, device):
            records.append(record)
            if record["record"] == "decode":
                found = f"{record['ms']:.4g} ms a token" if "ms" in record else record["not_run"]
                talk.print(f"  {format_tokens(record['context'])} x {record['batch']}, {record['way']}: {found}")
    for reason in sorted({record["launched"] for record in records if "launched" in record}):
        talk.print(f"not captured in a graph: {reason}")
    emit(records, lambda: Group(*_tables(records)), as_json=as_json)
    if device.type == "cpu":
        talk.print(
            "toy: without a GPU this is a model of two layers and its torch reference, to show what is measured; "
            "its figures say nothing about the model named"
        )
    return records


def _tables(records: list[dict[str, Any]]) -> list[RenderableType]:
    facts = Table.grid(padding=(0, 2))
    for name, value in records[0].items():
        if name != "record":
            facts.add_row(name.replace("_", " "), format_bytes(value) if name.endswith("bytes") else str(value))
    tables: list[RenderableType] = [facts, _decode(records)]
    tables += [_prefill(record) for record in records if record["record"] == "prefill"]
    return tables


def _decode(records: list[dict[str, Any]]) -> Table:
    table = Table(title="one token of each sequence, the whole model")
    table.add_column("", justify="left")
    for column in ("context", "batch", "ms", "step", "tokens/s", "kvtool is", "cache", "peak memory"):
        table.add_column(column, justify="right")
    ratios = {(r["context"], r["batch"]): r for r in records if r["record"] == "ratio"}
    for record in (r for r in records if r["record"] == "decode"):
        name = _NAMES[record["way"]] + (f" ({record['backend']})" if "backend" in record else "")
        if "launched" in record:
            name = name.replace("step captured", "kernel by kernel")
        row = [name, format_tokens(record["context"]), str(record["batch"])]
        if "ms" not in record:
            table.add_row(*row, "not run: " + record["not_run"])
            continue
        ratio = ratios[record["context"], record["batch"]].get(f"to_{record['way']}")
        step, peak = record.get("step_ms"), record["peak_bytes"]
        table.add_row(
            *row,
            f"{record['ms']:.4g}",
            f"{step:.4g}" if step else "",
            f"{record['tokens_per_s']:.4g}",
            f"{ratio:.2f} x" if ratio else "",
            format_bytes(record["cache_bytes"]),
            format_bytes(peak) if peak else "-",
        )
    return table


def _prefill(record: dict[str, Any]) -> Table:
    table = Table(title=f"prefill of {format_tokens(record['tokens'])} random tokens in one pass")
    for column in ("", "ms", "peak memory"):
        table.add_column(column, justify="right" if column else "left")
    for name, prefix in (("full cache", ""), ("compressed layer by layer", "served_")):
        peak = record[f"{prefix}peak_bytes"]
        table.add_row(name, f"{record[f'{prefix}ms']:.4g}", format_bytes(peak) if peak else "-")
    table.caption = f"compression adds {record['compression_share']:.1%}"
    return table
