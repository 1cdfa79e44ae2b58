"""``kvtool bench``: how fast a decode step is from the compressed cache, against the full one."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.table import Table

from kvtool.cli.output import emit, talk
from kvtool.errors import InputError
from kvtool.units import format_bytes, format_tokens, parse_tokens

DEFAULT_SHAPE = "llama-3.1-8b"
_BASELINE = {"fp8": "fp8 cache"}


def bench(
    context: Annotated[str, typer.Option(help="Tokens in the cache, or several: 4k,128k.")] = "128k",
    ladder: Annotated[str | None, typer.Option(help="Lengths by doubling, 4k..128k, each also 1 % longer.")] = None,
    batch: Annotated[str, typer.Option(help="Sequences decoded together, or several: 1,4,8.")] = "1",
    model_shape: Annotated[
        str | None,
        typer.Option(help="The shape of a known model, or of one to load; without --method: data-free turboquant."),
    ] = None,
    bits: Annotated[
        int | None, typer.Option(help="Of data-free turboquant: 1, 2, 3, 4 or 8. Default: 4.", show_default=False)
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="Any method, fitted to random vectors: its speed, not its quality. Needs no artifact."),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("-o", "--option", help="An option of the method, with --method.", metavar="NAME VALUE"),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="An artifact. Default: the newest, else llama-3.1-8b.")
    ] = None,
    baseline: Annotated[str, typer.Option(help="Compare with flash, cudnn, efficient, math, flashinfer, fp8.")] = (
        "flash,cudnn"
    ),
    layout: Annotated[
        str, typer.Option(help="Where pages lie: whole, room (to grow into) or table (shuffled, through a page table).")
    ] = "whole",
    ragged: Annotated[
        bool, typer.Option("--ragged", help="Sequences of a batch from the whole context down to half of it.")
    ] = False,
    backend: Annotated[str, typer.Option(help="auto, reference, triton or gluon.")] = "auto",
    device: Annotated[str, typer.Option(help="cuda, cpu, or auto: a GPU where there is one.")] = "auto",
    fail_if_slower_than: Annotated[
        float | None, typer.Option(help="Exit 1 unless every step measured is at least this many times as fast.")
    ] = None,
    e2e: Annotated[bool, typer.Option("--e2e", help="A whole model with random weights, not one layer.")] = False,
    prefill: Annotated[str, typer.Option(help="With --e2e, tokens of a real prefill, or 0 for none.")] = "16k",
    plot: Annotated[
        Path | None, typer.Option(help="Draw time over bytes with the floor of memory: .png, .svg or .pdf.")
    ] = None,
    saved: Annotated[
        Path | None, typer.Option("--from", help="Measure nothing; show what --json printed into this file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per record.")] = False,
) -> None:
    """Time one layer's decode attention from the compressed cache against the full cache; wrong code is not timed.

    Example: `kvtool bench --ladder 4k..128k --batch 1,4`
    """
    from kvtool.bench.plot import check_plot

    if plot:
        check_plot(plot)
    if plot and e2e:
        raise InputError("--plot: expected steps of one layer, found --e2e; leave out one of them")
    if saved:
        records = _saved(saved)
        _show(records, plot, as_json)
        _gate(records, fail_if_slower_than)
        return
    from kvtool.bench import Request, bench
    from kvtool.bench.layout import LAYOUTS

    asked = _method(method, option or [], bits, calibration)
    bits = 4 if bits is None else bits
    if e2e:
        from kvtool.cli import end_to_end

        chosen = _device(device)
        contexts = [parse_tokens(part) for part in context.split(",")]
        batches = [_batch(part) for part in batch.split(",")]
        tokens = 0 if prefill == "0" else parse_tokens(prefill)
        options = {"backend": backend, "prefill": tokens, "device": chosen, "as_json": as_json}
        records = end_to_end.run(model_shape or DEFAULT_SHAPE, bits, asked or calibration, contexts, batches, **options)
        _gate(records, fail_if_slower_than)
        return
    subject = _subject(model_shape, bits, asked or calibration)
    chosen = _device(device)
    contexts = _ladder(ladder) if ladder else [parse_tokens(part) for part in context.split(",")]
    if layout not in LAYOUTS:
        raise InputError(f"--layout {layout}: expected one of {', '.join(LAYOUTS)}")
    batches = [_batch(part) for part in batch.split(",")]
    request = Request(contexts, batches, _baselines(baseline), backend, layout, ragged)
    talk.print(f"bench: {subject.origin}, on {chosen.type}")
    records = []
    for record in bench(subject, request, chosen):
        records.append(record)
        if record["record"] == "step" and "ms" in record:
            talk.print(f"  {format_tokens(record['context'])} x {record['batch']}: {record['ms']:.3g} ms")
    _show(records, plot, as_json)
    if chosen.type == "cpu":
        talk.print(_not_run(subject, request, chosen))
    _gate(records, fail_if_slower_than)


def _show(records: list[dict[str, Any]], plot: Path | None, as_json: bool) -> None:
    from kvtool.bench.plot import plot as draw

    emit(records, lambda: Group(*_tables(records)), as_json=as_json)
    reasons = {f"{name} {reason}" for record in records for name, reason in record.get("baselines_not_run", {}).items()}
    for reason in sorted(reasons):
        talk.print(f"not run: {reason}")
    if plot:
        draw(records, plot)
        talk.print(f"drawn: {plot}")


def _saved(path: Path) -> list[dict[str, Any]]:
    """The records that ``--json`` printed into ``path``."""
    try:
        records = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise InputError(f"--from {path}: expected the lines of kvtool bench --json, found: {reason}") from error
    kinds = [record.get("record") if isinstance(record, dict) else None for record in records]
    if kinds[:1] != ["machine"] or "step" not in kinds:
        raise InputError(f"--from {path}: expected a machine and steps of one layer, found other lines; bench again")
    return records


def _not_run(subject: Any, request: Any, device: Any) -> str:
    """One sentence: what a CPU did not do, and what its figures are."""
    from kvtool.bench.run import held

    missing = [
        f"{format_tokens(context)} x {batch} (timed at {format_tokens(max(lengths))})"
        for batch in request.batches
        for lengths in [held(subject, request.contexts, batch, device)]
        for context in request.contexts
        if context not in lengths
    ]
    return (
        "not run: " + ", ".join(["the kernels, which need a GPU", *missing]) + "; what was timed is the torch "
        "reference on this CPU, and the floors of named cards are bytes over bandwidth, not measurements"
    )


def _method(name: str | None, given: list[str], bits: int | None, calibration: Path | None) -> Any:
    """The method of ``--method`` and ``-o``; None without.

    Raises:
        InputError: options that say something else besides, or options of no method.
    """
    from kvtool.cli.calibrate import bit_options
    from kvtool.methods import make_method

    if name is None:
        if given:
            raise InputError(f"-o {given[0]}: expected --method beside it, found none; say which method it is of")
        return None
    if calibration is not None:
        raise InputError(f"--method {name}: an artifact has its own method, found --calibration {calibration} as well")
    if bits is not None:
        raise InputError(f"--method {name}: expected its own options, found --bits {bits}; 'kvtool methods {name}'")
    return make_method(name, bit_options(name, None, None, None, given=given))


def _subject(model_shape: str | None, bits: int, chosen: Any) -> Any:
    """What is timed: an artifact's file, or a method that is fitted to random vectors; None: what there is."""
    from kvtool import home
    from kvtool.bench import default_subject, subject_of, synthetic_subject
    from kvtool.calibration import Calibration

    if chosen is not None and not isinstance(chosen, Path):
        return synthetic_subject(model_shape or DEFAULT_SHAPE, chosen)
    if model_shape:
        return default_subject(model_shape, bits)
    if chosen is None:
        try:
            chosen = home.newest("calibration", "kvtool calibrate")
        except InputError:
            return default_subject(DEFAULT_SHAPE, bits)
    return subject_of(Calibration.load(chosen), str(chosen))


def _device(name: str) -> Any:
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device {name}: expected auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: expected a GPU that torch can use, found none; use --device cpu")
    return torch.device("cuda" if torch.cuda.is_available() and name != "cpu" else "cpu")


def _ladder(text: str) -> list[int]:
    first, dots, last = text.partition("..")
    if not dots:
        raise InputError(f"--ladder {text}: expected two lengths such as 4k..128k")
    length, longest = parse_tokens(first), parse_tokens(last)
    if length > longest:
        raise InputError(f"--ladder {text}: expected the shorter length first, found {first} before {last}")
    lengths = []
    while length <= longest:
        # attention is easiest at powers of two; a real context is not one
        lengths += [length, length + length // 100 + 1]
        length *= 2
    return lengths


def _batch(text: str) -> int:
    if not text.strip().isdigit() or int(text) < 1:
        raise InputError(f"--batch {text}: expected positive numbers such as 1,4,8")
    return int(text)


def _baselines(text: str) -> list[str]:
    from kvtool.bench.baselines import BASELINES

    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in BASELINES]
    if unknown:
        raise InputError(f"--baseline {unknown[0]}: expected some of {', '.join(BASELINES)}")
    return names


def _gate(records: list[dict[str, Any]], limit: float | None) -> None:
    if limit is None:
        return
    speedups = [record["speedup"] for record in records if record.get("speedup") is not None]
    if not speedups or min(speedups) < limit:
        found = f"{min(speedups):.2f}" if speedups else "nothing measured"
        talk.print(f"--fail-if-slower-than {limit:g}: found {found}")
        raise typer.Exit(1)


def _tables(records: list[dict[str, Any]]) -> list[RenderableType]:
    facts = Table.grid(padding=(0, 2))
    for name, value in records[0].items():
        if name.endswith("bytes_per_s"):
            value = f"{value / 1e9:.0f} GB/s"
        facts.add_row(name.replace("_", " "), str(value))
    tables: list[RenderableType] = [facts, _steps([record for record in records if record["record"] == "step"])]
    for record in records:
        if record["record"] == "crossover" and record["measured"]:
            where = record["context"]
            found = f"wins from {format_tokens(where)} tokens on" if where else "does not win at the longest length"
            tables.append(f"batch {record['batch']}: compression {found}")
    predicted = [record for record in records if record["record"] == "predicted"]
    if predicted:
        tables.append(_floors(predicted))
    return tables


def _steps(steps: list[dict[str, Any]]) -> Table:
    table = Table(title="one layer, one decode step")
    names = list(next((step["baselines_ms"] for step in steps if "baselines_ms" in step), {}))
    full = [_BASELINE.get(name, f"full, {name}") for name in names]
    for column in ("context", "batch", "bytes", "ms", "+-", "of read", *full, "speedup"):
        table.add_column(column, justify="right")
    for step in steps:
        row = [format_tokens(step["context"]), str(step["batch"]), format_bytes(step["bytes"])]
        if "ms" not in step:
            table.add_row(*row, "not run: " + step["not_run"])
            continue
        baselines = [f"{ms:.4g}" if ms else "not run" for ms in step["baselines_ms"].values()]
        speedup = f"{step['speedup']:.2f}" if step["speedup"] else "-"
        share = f"{step['of_read_bandwidth']:.0%}"
        table.add_row(*row, f"{step['ms']:.4g}", f"{step['spread_ms']:.2g}", share, *baselines, speedup)
    return table


def _floors(predicted: list[dict[str, Any]]) -> Table:
    table = Table(
        title="not measured: ms that reading the bytes takes at the data sheet's bandwidth, compressed / full"
    )
    cards = list(predicted[0]["floor_ms"])
    for column in ("context", "batch", *cards):
        table.add_column(column, justify="right")
    for record in predicted:
        floors = [f"{floor['compressed']:.3g} / {floor['full']:.3g}" for floor in record["floor_ms"].values()]
        table.add_row(format_tokens(record["context"]), str(record["batch"]), *floors)
    return table
