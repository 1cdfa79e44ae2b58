"""``kvtool capture``: queries, keys and values of a model over some text, to disk."""

import shlex
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from kvtool import home
from kvtool.cli.output import emit, progress, talk
from kvtool.units import format_bytes, format_seconds, format_tokens, parse_tokens

if TYPE_CHECKING:
    from kvtool.capture import Plan


def capture(
    model: Annotated[
        str | None,
        typer.Argument(help="smollm2 (the default), smollm2-32k, a model directory, a .gguf file or a hub id."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory to make. Default: $KVTOOL_HOME/captures/MODEL-CONTEXT-HASH.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help="austen (the default), wiki, kjv, a .txt or .jsonl file, or datasets:ID[:SPLIT[:FIELD]]; "
            "several with commas between them."
        ),
    ] = None,
    context: Annotated[str, typer.Option(help="Tokens per sample, such as 8192 or 8k.")] = "8k",
    samples: Annotated[int, typer.Option(min=1, help="Stretches of each text, chosen by --seed, not overlapping.")] = 1,
    layers: Annotated[str, typer.Option(help="all, or a list such as 0,5-9.")] = "all",
    queries: Annotated[str, typer.Option(help="all, none, or how many per sample, evenly spread.")] = "all",
    dtype: Annotated[
        str,
        typer.Option(help="bfloat16, float16 or float32, run and stored; auto: the model's own, stored in bfloat16."),
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto (cuda if there is one), cpu, cuda, cuda:1, ...")] = "auto",
    chunk: Annotated[int, typer.Option(min=1, help="Tokens per forward and per shard.")] = 512,
    seed: Annotated[int, typer.Option(help="Chooses the stretches of text.")] = 42,
    revision: Annotated[str | None, typer.Option(help="Of a hub model: branch, tag or commit.")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run a model's own code.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print disk use and time, write nothing.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Finish the capture that was interrupted.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Record the queries, keys and values of a model over some text.

    Example: `kvtool capture --context 8k`
    """
    from kvtool import texts
    from kvtool.capture import planning
    from kvtool.capture.recording import run
    from kvtool.models import load_model

    contents, tokens = texts.load_all(text or texts.CALIBRATION), parse_tokens(context)
    with talk.status(f"loading {model or 'smollm2'}"):
        loaded = load_model(
            model,
            revision=revision,
            trust_remote_code=trust_remote_code,
            dtype=dtype,
            device=device,
        )
    plan = planning.plan(
        loaded,
        contents,
        context=tokens,
        samples=samples,
        layers=layers,
        queries=queries,
        dtype=dtype,
        chunk=chunk,
        seed=seed,
    )
    place = (
        out
        or home.home() / "captures" / f"{_slug(loaded.name)}-{format_tokens(tokens)}-{plan.manifest.plan_sha256[:8]}"
    )
    for note in plan.notes:
        talk.print(f"note: {note}")
    expected = plan.seconds(loaded)
    talk.print(
        f"{_layers(plan)}; {format_bytes(plan.nbytes)} on disk, about {format_seconds(expected)}"
        f" on {plan.manifest.device}, to {place}"
    )
    if dry_run:
        planning.check_space(plan, place)
        record = _record(plan, place) | {"dry_run": True, "estimated_seconds": round(expected, 1)}
        emit([record], lambda: _table(record), as_json=as_json)
        return
    begin = time.perf_counter()
    try:
        with progress("capturing") as report:
            made = run(loaded, plan, place, resume=resume, report=report)
    except KeyboardInterrupt as stop:
        command = shlex.join(argument for argument in sys.argv[1:] if argument != "--resume")
        raise type(stop)(f'stopped; what is in {place} is kept, and "kvtool {command} --resume" finishes it') from stop
    home.remember("capture", place)
    record = _record(plan, place) | {
        "dry_run": False,
        "seconds": round(time.perf_counter() - begin, 1),
        "sha256": made.sha256,
    }
    emit([record], lambda: _table(record), as_json=as_json)


def _layers(plan: "Plan") -> str:
    """``capturing 26 of 30 layers (4 linear: ...)``."""
    manifest = plan.manifest
    why = Counter(manifest.not_recorded.values())
    rest = f" (not: {'; '.join(f'{count} x {reason}' for reason, count in why.items())})" if why else ""
    return f"capturing {len(manifest.recorded)} of {len(manifest.shape.layers)} layers{rest}"


def _record(plan: "Plan", place: Path) -> dict[str, Any]:
    manifest = plan.manifest
    return {
        "path": str(place),
        "model": manifest.model,
        "text": manifest.text,
        "context": manifest.context,
        "samples": manifest.samples,
        "layers": list(manifest.recorded),
        "layers_total": len(manifest.shape.layers),
        "not_captured": manifest.not_recorded,
        "queries": manifest.queries,
        "dtype": manifest.dtype,
        "device": manifest.device,
        "bytes": plan.nbytes,
        "notes": list(plan.notes),
    }


def _table(record: dict[str, Any]) -> Table:
    table = Table(show_header=False)
    table.add_row("capture", record["path"] + ("  (not made: --dry-run)" if record["dry_run"] else ""))
    table.add_row("model", f"{record['model']}, {record['dtype']}, on {record['device']}")
    table.add_row("text", f"{record['text']}, {record['samples']} x {record['context']} tokens")
    table.add_row("layers", f"captured {len(record['layers'])} of {record['layers_total']}")
    table.add_row("disk", format_bytes(record["bytes"]))
    table.add_row("time", format_seconds(record["estimated_seconds" if record["dry_run"] else "seconds"]))
    return table


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-._" else "-" for c in name)
