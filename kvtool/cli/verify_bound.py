"""``kvtool verify-bound``: what a method claims, measured on tokens it has not seen."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from kvtool.cli.output import emit, progress, talk

if TYPE_CHECKING:
    from kvtool.bounds.certificate import Inputs


def verify_bound(
    path: Annotated[
        Path | None,
        typer.Argument(help="A calibration, or a capture. Without it: the newest calibration.", show_default=False),
    ] = None,
    method: Annotated[str, typer.Option(help="With a capture: the method to fit to it and verify.")] = "rabitq",
    option: Annotated[
        list[str] | None,
        typer.Option("-o", "--option", help="With a capture: an option of the method.", metavar="NAME VALUE"),
    ] = None,
    capture: Annotated[
        Path | None, typer.Option(help="A capture to measure on, instead of the one fitted to.", show_default=False)
    ] = None,
    layers: Annotated[str, typer.Option(help="Layers to measure, such as 0,5-9.")] = "all",
    epsilon: Annotated[float, typer.Option(help="RaBitQ: of its bound; the paper's 1.9.")] = 1.9,
    bits: Annotated[
        str | None,
        typer.Option(help="RaBitQ: widths, such as 1,2,4. Default: the artifact's, or 1.", show_default=False),
    ] = None,
    delta: Annotated[
        float | None,
        typer.Option(help="RaBitQ: violations allowed. Default: the theorem's, at this epsilon.", show_default=False),
    ] = None,
    rotations: Annotated[int, typer.Option(help="RaBitQ: fresh rotations of every head.")] = 32,
    keys: Annotated[int, typer.Option(help="RaBitQ: keys of each head, evenly spread.")] = 2048,
    queries: Annotated[int, typer.Option(help="RaBitQ: queries of each query head.")] = 128,
    query_bits: Annotated[int, typer.Option(help="RaBitQ: quantise the query as well; the law leaves that out.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="RaBitQ: of the fresh rotations.")] = 0,
    confidence: Annotated[float, typer.Option(min=0.5, max=0.999999, help="Of every limit, one-sided.")] = 0.99,
    top_p: Annotated[
        str | None,
        typer.Option(help="Compare top-p reading at these shares, such as .8,.9,.95,.99.", show_default=False),
    ] = None,
    check: Annotated[
        Path | None, typer.Option(help="Run a certificate again, and compare bit for bit.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Certificate to write. Default: under $KVTOOL_HOME/certificates.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per layer and claim, or head.")] = False,
) -> None:
    """Measure what a method claims on real queries and keys; write a certificate; exit 1 if a claim fails.

    Example: `kvtool verify-bound --method rabitq --epsilon 1.9 --rotations 32`
    """
    from kvtool import units
    from kvtool.bounds import certificate as certificates
    from kvtool.bounds.options import settings_from

    if check is not None:
        _check(check, capture)
        return
    inputs = _inputs(path, capture, method, option)
    chosen = None if layers == "all" else units.parse_indices(layers, len(inputs.capture.shape.layers))
    if top_p is not None:
        _top_p(inputs, top_p, chosen, as_json=as_json)
        return
    made = []
    fitted = inputs.calibration
    # a capture is asked about RaBitQ's bound alone; an artifact about all it claims
    if (inputs.artifact or fitted.method.name != "rabitq") and fitted.method.claims(fitted.shape, fitted.tensors):
        with progress("measuring claims") as report:
            made.append(certificates.verify_claims(inputs, confidence=confidence, layers=chosen, progress=report))
    if fitted.method.name == "rabitq":
        settings = settings_from(
            fitted.method,
            bits=bits,
            epsilon=epsilon,
            delta=delta,
            rotations=rotations,
            confidence=confidence,
            keys=keys,
            queries=queries,
            query_bits=query_bits,
            seed=seed,
        )
        with progress("drawing rotations") as report:
            made.append(certificates.verify_rabitq(inputs, settings, layers=chosen, progress=report))
    if not made:
        talk.print(f"{fitted.method.name} claims nothing: nothing to verify")
    for one in made:
        _say(one, certificates.save(one, out if one is made[-1] else None))
    records = [{"kind": one["kind"], **record} for one in made for record in one["results"]]
    emit(records, lambda: _tables(made), as_json=as_json)
    if not all(one["holds"] for one in made):
        raise typer.Exit(1)


def _inputs(path: Path | None, capture: Path | None, method: str, option: Sequence[str] | None) -> "Inputs":
    from kvtool import home
    from kvtool.bounds.certificate import fit_inputs, read_inputs
    from kvtool.cli.calibrate import bit_options
    from kvtool.methods import make_method

    path = path or home.newest("calibration", "kvtool calibrate")
    if not path.is_dir():
        talk.print(f"verifying {path}", soft_wrap=True)
        return read_inputs(path, capture)
    options: dict[str, Any] = dict(bit_options(method, None, None, None, given=option or []))
    if method == "rabitq":
        # the bound speaks of the code of a key: a sketch has the centres of queries too
        options.setdefault("mode", "topp")
    talk.print(f"verifying {method}, fitted to the first three quarters of {path}", soft_wrap=True)
    return fit_inputs(path, make_method(method, options))


def _check(path: Path, capture: Path | None) -> None:
    from kvtool.bounds.certificate import check

    with progress("running it again") as report:
        difference = check(path, capture=capture, progress=report)
    talk.print(f"{path}: " + (f"differs at {difference}" if difference else "reproduced, bit for bit"), soft_wrap=True)
    if difference:
        raise typer.Exit(1)


def _top_p(inputs: "Inputs", text: str, layers: Sequence[int] | None, *, as_json: bool) -> None:
    from kvtool.bounds.sparsity import compare, parse_shares

    with progress("reading") as report:
        rows = compare(inputs.calibration, inputs.capture, parse_shares(text), layers=layers, progress=report)

    def table() -> Table:
        shown = Table(
            "p", "reads by", "true mass", "short of p", "tokens", "of", "KiB a step", "output error", "bounded"
        )
        for row in rows:
            shown.add_row(
                f"{row.p:g}",
                row.reader,
                f"{row.mass:.4f}",
                f"{row.short:.1%}",
                f"{row.tokens:.0f}",
                str(row.context),
                f"{row.bytes / 1024:.0f}",
                f"{row.output_error:.4f}",
                "yes" if row.bounded else "[red]no[/red]",
            )
        return shown

    emit([row.as_dict() for row in rows], table, as_json=as_json)
    if not all(row.bounded for row in rows):
        raise typer.Exit(1)


def _say(certificate: dict[str, Any], path: Path) -> None:
    made, settings = certificate["made"], certificate["settings"]
    if certificate["kind"] == "rabitq":
        pairs = sum(rate["pairs"] for r in certificate["results"] for rate in _rates(r))
        limits = sorted(set(settings["limits"].values()))
        asked = "as asked" if settings["delta"] else "the theorem's for orthogonal pairs, the worst"
        talk.print(
            f"{pairs / 1e6:.0f} million pairs in {made['seconds']} s; delta "
            f"{', '.join(f'{limit:.4f}' for limit in limits)} ({asked}) at epsilon {settings['epsilon']}"
        )
    for failure in certificate["failures"][:8]:
        talk.print(f"fails: {failure}")
    if len(certificate["failures"]) > 8:
        talk.print(f"and {len(certificate['failures']) - 8} more failures, in the certificate")
    talk.print(f"certificate: {path}", soft_wrap=True)


def _rates(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [record[kind] for kind in ("bulk", "sinks", "massive") if record[kind] is not None]


def _tables(made: Sequence[dict[str, Any]]) -> Any:
    from rich.console import Group

    return Group(*(_claims(one["results"]) if one["kind"] == "claims" else _bounds(one["results"]) for one in made))


def _claims(results: Sequence[dict[str, Any]]) -> Table:
    """One line per layer: its claim nearest to the limit, or the failed one."""
    table = Table("layer", "verdict", "claims", "nearest", "measured", "limit", "worst head", "source")
    for layer in sorted({result["layer"] for result in results}):
        mine = [result for result in results if result["layer"] == layer]
        failed = [result for result in mine if not result["holds"]]
        nearest = max(failed or mine, key=lambda result: result["bound"] / max(result["limit"], 1e-30))
        error = "" if nearest["standard_error"] is None else f" +- {nearest['standard_error']:.1g}"
        table.add_row(
            str(layer),
            "[red]fails[/red]" if failed else "holds",
            f"{len(mine) - len(failed)}/{len(mine)}",
            f"{nearest['quantity']} ({nearest['kind']})",
            f"{nearest['measured']:.4g}{error}",
            f"{nearest['limit']:.4g}",
            f"{nearest['worst_head']}: {nearest['worst']:.4g}",
            nearest["source"],
        )
    return table


def _bounds(results: Sequence[dict[str, Any]]) -> Table:
    """One line per layer and width: the head with the highest limit."""
    table = Table(
        "layer", "bits", "verdict", "worst head", "violations", "limit", "theory", "worth", "bias", "variance/law",
        "|e|/bound p50 p99", "epsilon", "logit rms", "sinks", "massive",
    )  # fmt: skip
    for layer, bits in sorted({(result["layer"], result["bits"]) for result in results}):
        mine = [result for result in results if (result["layer"], result["bits"]) == (layer, bits)]
        failed = [result for result in mine if not result["holds"]]
        worst = max(failed or mine, key=lambda result: result["bulk"]["limit"])
        bulk = worst["bulk"]
        table.add_row(
            str(layer),
            str(bits),
            "[red]fails[/red]" if failed else "holds",
            str(worst["head"]),
            f"{bulk['rate']:.4f}",
            f"{bulk['limit']:.4f}",
            f"{bulk['predicted']:.4f}",
            f"{bulk['effective']:.2g}",
            f"{worst['bias']:+.4f} +- {worst['bias_error']:.4f}",
            f"{worst['variance']:.3f}",
            f"{worst['tightness'][0]:.2f} {worst['tightness'][2]:.2f}",
            f"{worst['epsilon']:.2f}",
            f"{max(result['logit_rms'] for result in mine):.2f}",
            *("-" if worst[kind] is None else f"{worst[kind]['rate']:.4f}" for kind in ("sinks", "massive")),
        )
    return table
