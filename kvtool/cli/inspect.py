"""``kvtool inspect``: what a model, a capture or an artifact is, and what its tensors look like."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.table import Table

from kvtool.cli.output import emit, progress, talk
from kvtool.units import format_bytes, format_tokens

if TYPE_CHECKING:
    from kvtool.inspection import LayerStatistics, Record


def inspect(
    path: Annotated[
        str | None,
        typer.Argument(help="A model, a capture, an artifact or a directory of them. Without it: $KVTOOL_HOME."),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Hash captures and artifacts again; exit 1 if one differs.")
    ] = False,
    layers: Annotated[str, typer.Option(help="Layers of a capture to look into, such as 0,5-9.")] = "all",
    statistics: Annotated[bool, typer.Option(help="Read the tensors of a capture, not only its manifest.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per thing, then one per layer.")] = False,
) -> None:
    """Show what a model, a capture or an artifact is; of a capture, per-layer statistics as tables and heat maps.

    Example: `kvtool inspect --verify`
    """
    from kvtool import home
    from kvtool.inspection import CaptureRecord, find

    found = find(path or str(home.home()))
    whole = len(found) == 1 and isinstance(found[0], CaptureRecord) and found[0].complete
    measured = _measure(Path(found[0].path), layers) if whole and statistics else []
    damaged = _verify(found) if verify else []
    emit(
        [*(record.as_dict() for record in found), *(one.as_dict() for one in measured)],
        lambda: Group(
            _facts(found[0]) if len(found) == 1 else _overview(found),
            *_pictures(measured),
            *_race(found),
            *_bit_maps([one for one in found if one.path not in damaged]),
        ),
        as_json=as_json,
    )
    if damaged:
        talk.print("not what was written, make it again: " + ", ".join(damaged))
        raise typer.Exit(1)


def _measure(path: Path, layers: str) -> "list[LayerStatistics]":
    from kvtool.capture import Capture
    from kvtool.inspection import layer_statistics
    from kvtool.units import parse_indices

    capture = Capture.open(path)
    wanted = set(parse_indices(layers, len(capture.shape.layers)))
    chosen = [layer for layer in capture.recorded if layer in wanted]
    measured = []
    with progress("measuring") as report:
        for layer in chosen:
            measured.append(layer_statistics(capture, layer))
            report(len(measured), len(chosen))
    return measured


def _verify(found: "list[Record]") -> list[str]:
    """Paths that differ from what was recorded; artifacts are checked by loading them."""
    from kvtool.calibration import Calibration
    from kvtool.capture import Capture
    from kvtool.errors import CalibrationError
    from kvtool.inspection import CalibrationRecord, CaptureRecord

    damaged = []
    for record in found:
        if isinstance(record, CaptureRecord) and record.complete:
            damaged += [f"{record.path}/{name}" for name in Capture.open(record.path).verify()]
        elif isinstance(record, CalibrationRecord):
            try:
                Calibration.load(Path(record.path))
            except CalibrationError as error:
                talk.print(str(error))
                damaged.append(record.path)
    if not damaged:
        talk.print("verified: every file is what was written")
    return damaged


def _facts(record: "Record") -> RenderableType:
    """Everything about one thing, a line per fact."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in record.as_dict().items():
        if name == "layers" and isinstance(value, list):
            continue  # a model's layers are a table of their own
        if value not in ({}, [], None):
            table.add_row(name.replace("_", " "), _readable(name, value))
    layers = record.as_dict().get("layers")
    return Group(table, _model_layers(layers)) if isinstance(layers, list) else table


def _readable(name: str, value: Any) -> str:
    if name in ("bytes", "bytes_per_token"):
        return f"{value} ({format_bytes(value)})"
    if name == "context":
        return f"{format_tokens(value)} tokens"
    if isinstance(value, dict):
        return "\n".join(f"{key}: {_plain(inner)}" for key, inner in value.items())
    return str(value)


def _plain(value: Any) -> str:
    """What holds tables is named without them: they are drawn apart."""
    if not isinstance(value, dict):
        return str(value)
    return ", ".join(f"{key} {inner}" for key, inner in value.items() if not isinstance(inner, dict))


def _model_layers(layers: list[dict[str, Any]]) -> Table:
    """Equal neighbours share a row."""
    table = Table("layers", "kind", "query heads", "KV heads", "head dim", "window", "rotary")
    first = 0
    for i in range(1, len(layers) + 1):
        if i < len(layers) and layers[i] == layers[first]:
            continue
        layer = layers[first]
        rotary = "none" if layer["rope"] is None else f"table {layer['rope']}"
        sizes = [str(layer[name]) for name in ("num_heads", "num_kv_heads", "head_dim")]
        table.add_row(
            f"{first}-{i - 1}" if i - first > 1 else str(first),
            layer["kind"],
            *sizes,
            str(layer["window"] or "-"),
            rotary,
        )
        first = i
    return table


def _overview(found: "list[Record]") -> Table:
    table = Table("kind", "path", "model", "what", "size")
    for record in found:
        facts = record.as_dict()
        if facts["kind"] == "capture":
            what = f"{facts['samples']} x {format_tokens(facts['context'])} tokens, {facts['layers']} layers"
            what += "" if facts["complete"] else ", unfinished"
            table.add_row("capture", facts["path"], facts["model"], what, format_bytes(facts["bytes"]))
        elif facts["kind"] == "calibration":
            options = " ".join(f"{name}={value}" for name, value in facts["options"].items())
            model = str(facts["provenance"].get("model", ""))
            table.add_row(
                "calibration", facts["path"], model, f"{facts['method']} {options}", format_bytes(facts["bytes"])
            )
    return table


def _pictures(measured: "list[LayerStatistics]") -> list[RenderableType]:
    """A table of means over heads, and a heat map by layer and head of what differs most between heads."""
    from kvtool.inspection.heat import heat_map

    if not measured:
        return []
    table = Table(
        "layer",
        "K norm",
        "V norm",
        "K kurtosis",
        "V kurtosis",
        "K mean pre",
        "K mean post",
        "outliers",
        "entropy",
        "sink mass",
    )
    for one in measured:
        table.add_row(
            str(one.layer),
            *(f"{_mean(x):.2f}" for x in (one.key_norm, one.value_norm, one.key_kurtosis, one.value_kurtosis)),
            *(f"{_mean(x):.2f}" for x in (one.mean_share_pre, one.mean_share_post)),
            str(sum(map(len, one.outliers))),
            *("-" if x is None else f"{_mean(x):.2f}" for x in (one.entropy, one.sink_mass)),
        )
    maps = [
        heat_map("share of key energy in the mean, pre-RoPE", {one.layer: one.mean_share_pre for one in measured}),
        heat_map(
            "largest key channel / median, pre-RoPE", {one.layer: one.outlier_ratio for one in measured}, digits=1
        ),
    ]
    if measured[0].entropy is not None:
        maps.append(heat_map("attention entropy, nats", {one.layer: one.entropy or [] for one in measured}))
        maps.append(heat_map("attention on the first 4 tokens", {one.layer: one.sink_mass or [] for one in measured}))
    legend = (
        "norms and kurtosis (3 for a Gaussian) leave out the first 4 tokens; K mean: share of key energy in the mean\n"
        "over tokens, before and after RoPE; outliers: key channels past 3 times the median; heads run left to right"
    )
    return [table, legend, Columns(maps, padding=(1, 3))]


def _race(found: "list[Record]") -> list[RenderableType]:
    """Who ran against the allocation of one artifact on held-out tokens, and how it ended."""
    record = (found[0].as_dict().get("provenance") or {}).get("held_out") if len(found) == 1 else None
    if not record or not record.get("raced"):
        return []
    table = Table("contestant", "bits", "attention error", "times rdkv", "95 %")
    for name, row in record["contestants"].items():
        mark = "* " if name == record["winner"] else "  "
        spread = f"{row['low']:.3g} to {row['high']:.3g}"
        table.add_row(mark + name, f"{row['bits']:.2f}", f"{row['error']:.3g}", f"{row['ratio']:.3g}", spread)
    return [table]


def _bit_maps(found: "list[Record]") -> list[RenderableType]:
    """Where one artifact spends its bytes, if it says so: bits and tokens kept by layer and head."""
    from kvtool.calibration import Calibration
    from kvtool.inspection import CalibrationRecord
    from kvtool.inspection.heat import heat_map

    if len(found) != 1 or not isinstance(found[0], CalibrationRecord):
        return []
    tensors = Calibration.load(Path(found[0].path)).tensors
    spent = {int(name.split(".")[1]): t for name, t in tensors.items() if name.endswith(".allocated")}
    if not any(bool(t.any()) for t in spent.values()):
        return []
    maps = [
        heat_map("bits per value, held-out prompt", {i: t[:, 0].tolist() for i, t in sorted(spent.items())}),
        heat_map("share of tokens kept", {i: t[:, 1].tolist() for i, t in sorted(spent.items())}),
    ]
    return [Columns(maps, padding=(1, 3))]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
