"""``kvtool verify-bound``: what a method claims, measured on tokens it has not seen."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from kvtool.cli.output import emit, progress, talk

if TYPE_CHECKING:
    from kvtool.bounds import ClaimResult


def verify_bound(
    path: Annotated[
        Path | None, typer.Argument(help="A calibration. Without it: the newest one.", show_default=False)
    ] = None,
    capture: Annotated[
        Path | None, typer.Option(help="A capture to measure on, instead of the one fitted to.", show_default=False)
    ] = None,
    layers: Annotated[str, typer.Option(help="Layers to measure, such as 0,5-9.")] = "all",
    confidence: Annotated[float, typer.Option(min=0.5, max=0.999999, help="Of every limit, one-sided.")] = 0.99,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per layer and claim.")] = False,
) -> None:
    """Measure what a method claims on held-out tokens of a real cache; exit 1 if a claim fails.

    Example: `kvtool verify-bound`
    """
    from kvtool import home, units
    from kvtool.bounds import check_claims
    from kvtool.bounds.inputs import capture_of
    from kvtool.calibration import Calibration

    path = path or home.newest("calibration", "kvtool calibrate")
    calibration = Calibration.load(path)
    data = capture_of(calibration, path, capture)
    talk.print(f"measuring the claims of {path} on held-out tokens of {data.path}")
    chosen = None if layers == "all" else units.parse_indices(layers, len(calibration.shape.layers))
    with progress("verifying") as report:
        results = check_claims(calibration, data, layers=chosen, confidence=confidence, progress=report)
    if not results:
        talk.print(f"{calibration.method.name} claims nothing for these layers: nothing to verify")
    emit([result.as_dict() for result in results], lambda: _table(results), as_json=as_json)
    if not all(result.holds for result in results):
        raise typer.Exit(1)


def _table(results: "list[ClaimResult]") -> Table:
    """One line per layer: its claim nearest to the limit, or the failed one."""
    table = Table("layer", "verdict", "claims", "nearest", "measured", "limit", "worst head", "source")
    for layer in sorted({result.layer for result in results}):
        mine = [result for result in results if result.layer == layer]
        failed = [result for result in mine if not result.holds]
        nearest = max(failed or mine, key=lambda result: result.bound / max(result.limit, 1e-30))
        error = "" if nearest.standard_error is None else f" +- {nearest.standard_error:.1g}"
        table.add_row(
            str(layer),
            "[red]fails[/red]" if failed else "holds",
            f"{len(mine) - len(failed)}/{len(mine)}",
            f"{nearest.quantity} ({nearest.kind})",
            f"{nearest.measured:.4g}{error}",
            f"{nearest.limit:.4g}",
            f"{nearest.worst_head}: {nearest.worst:.4g}",
            nearest.source,
        )
    return table
