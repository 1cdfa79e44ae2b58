"""``kvtool calibrate``: fit a method to a capture, and write the artifact that is served."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from kvtool.cli.output import emit, progress, talk
from kvtool.errors import MethodOptionError

if TYPE_CHECKING:
    from kvtool.fitting import FitReport


def calibrate(
    capture: Annotated[
        Path | None, typer.Argument(help="A capture directory. Without it: the newest one.", show_default=False)
    ] = None,
    method: Annotated[str, typer.Option(help="What to fit; `kvtool methods` lists them.")] = "turboquant",
    option: Annotated[
        list[str] | None,
        typer.Option(
            "-o", "--option", help="An option of the method; `kvtool methods NAME` lists them.", metavar="NAME VALUE"
        ),
    ] = None,
    bits: Annotated[str | None, typer.Option(help="Of keys and values: 3, or k4v3.", show_default=False)] = None,
    k_bits: Annotated[str | None, typer.Option(help="Of keys.", show_default=False)] = None,
    v_bits: Annotated[str | None, typer.Option(help="Of values.", show_default=False)] = None,
    sinks: Annotated[int, typer.Option(min=0, help="First tokens that stay exact.")] = 4,
    window: Annotated[int, typer.Option(min=0, help="Newest tokens that stay exact.")] = 128,
    exact_layers: Annotated[str, typer.Option(help="Layers left alone, such as 0,29 or none.")] = "none",
    out: Annotated[
        Path | None,
        typer.Option(help="File to write. Default: $KVTOOL_HOME/calibrations/MODEL-METHOD-BITS.safetensors."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="The model to fine-tune, if the capture's name does not find it.", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option(help="Where a fine-tune runs: auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Fit a method to a capture and write the artifact; on held-out tokens it must beat itself without data.

    Example: `kvtool calibrate --method turboquant --bits k4v3`
    """
    from kvtool import home, units
    from kvtool.calibration import CachePolicy
    from kvtool.capture import Capture
    from kvtool.fitting import fit
    from kvtool.methods import make_method
    from kvtool.models import load_model

    options = bit_options(method, bits, k_bits, v_bits, given=option or [])
    chosen = make_method(method, options)
    path = capture or home.newest("capture", "kvtool capture")
    data = Capture.open(path)
    manifest = data.manifest
    exact = () if exact_layers == "none" else tuple(units.parse_indices(exact_layers, len(data.shape.layers)))
    talk.print(f"fitting {method} to {path}")
    with progress("calibrating") as report:
        made = fit(
            data,
            chosen,
            policy=CachePolicy(sinks=sinks, window=window, exact_layers=exact),
            out=out,
            command=shlex.join(["kvtool", *sys.argv[1:]]),
            model=partial(load_model, model or manifest.model, revision=manifest.revision, device=device),
            progress=report,
        )
    talk.print(f"{made.verdict}; written to {made.path}", soft_wrap=True)
    record = _record(made)
    emit([record], lambda: _table(made), as_json=as_json)


def bit_options(
    method: str, bits: str | None, k_bits: str | None, v_bits: str | None, *, given: Sequence[str]
) -> dict[str, str]:
    """The options of ``-o`` and the bits of ``--bits``, ``--k-bits`` and ``--v-bits`` under the method's own names.

    Raises:
        MethodOptionError: an option twice, or bits for a method that has none.
    """
    from kvtool.methods import METHODS
    from kvtool.units import parse_bits

    pairs = []
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals:
            raise MethodOptionError(f"-o {name}: expected a name and a value, such as -o seed 1")
        pairs.append((name, value))
    known = METHODS[method].__dataclass_fields__ if method in METHODS else {}
    if bits is not None:
        keys, values = parse_bits(bits)
        if "k_bits" in known:
            pairs += [("k_bits", f"{keys:g}"), ("v_bits", f"{values:g}")]
        elif "bits" in known and keys == values:
            pairs.append(("bits", f"{keys:g}"))
        else:
            raise MethodOptionError(
                f"--bits {bits}: {method} has no such choice; 'kvtool methods {method}' lists its options"
            )
    pairs += [(name, value) for name, value in (("k_bits", k_bits), ("v_bits", v_bits)) if value is not None]
    options: dict[str, str] = {}
    for name, text in pairs:
        if name in options:
            raise MethodOptionError(f"{name}: given twice, as {options[name]} and {text}; give it once")
        options[name] = text
    return options


def _record(made: "FitReport") -> dict[str, Any]:
    calibration = made.calibration
    return {
        "path": str(made.path),
        "method": calibration.method.name,
        "options": asdict(calibration.method),
        "policy": calibration.policy.model_dump(),
        "model": calibration.provenance["model"],
        "capture": calibration.provenance["capture"],
        "kept": made.kept,
        "verdict": made.verdict,
        "fitted": made.fitted,
        "data_free": made.data_free,
        "difference": made.difference,
        "standard_error": made.standard_error,
        "finetune": calibration.provenance.get("finetune"),
        "layers": [asdict(score) for score in made.scores],
    }


def _table(made: "FitReport") -> Table:
    """The held-out error of each layer."""
    table = Table("layer", "calibrated", "data-free")
    for score in made.scores:
        free = "" if score.data_free is None else f"{score.data_free:.4f}"
        table.add_row(str(score.layer), f"{score.fitted:.4f}", free)
    if made.fitted is not None:
        table.add_section()
        table.add_row("mean", f"{made.fitted:.4f}", "" if made.data_free is None else f"{made.data_free:.4f}")
    return table
