"""The roofline of a benchmark: milliseconds of a step over the bytes it reads, and the floor of memory below them.

A step cannot take less than its bytes over the bandwidth of the memory. What was measured is filled; what is only
predicted, the floors of named cards on a machine without a GPU, is a line of dashes with hollow marks.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kvtool.errors import InputError
from kvtool.home import replacing
from kvtool.units import format_tokens

SUFFIXES = (".png", ".svg", ".pdf")
Records = Sequence[dict[str, Any]]


def check_plot(path: Path) -> None:
    """Refuse before anything is measured what could not be drawn afterwards.

    Raises:
        InputError: not a picture's name, no such folder, or matplotlib is missing.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"--plot {path}: expected a name that ends in {', '.join(SUFFIXES)}, found '{path.suffix}'")
    if not path.absolute().parent.is_dir():
        raise InputError(f"--plot {path}: expected a folder that exists, found none at {path.absolute().parent}")
    if find_spec("matplotlib") is None:
        raise InputError("--plot: expected matplotlib, found none; install it with: pip install 'kvtool[plot]'")


def plot(records: Records, path: Path) -> None:
    """Draw the ``records`` of :func:`kvtool.bench.bench` into ``path``; see :func:`check_plot`."""
    # figures without pyplot: no display is looked for and nothing global is left behind
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log")
    machine = records[0]
    measured = [record for record in records if record["record"] == "step" and "ms" in record]
    series = _series(measured)
    for name, points in series.items():
        compressed = name.startswith("compressed")
        axes.plot(*zip(*points, strict=True), marker="o" if compressed else "s", label=name, lw=1)
    for record in measured:
        # the newest of a crowd would be written over the others
        if record["batch"] == measured[0]["batch"] and record["context"] & (record["context"] - 1) == 0:
            at = (record["bytes"], record["ms"])
            axes.annotate(format_tokens(record["context"]), at, (0, 6), textcoords="offset points", fontsize=7)
    sizes = [size for points in series.values() for size, _ in points]
    rate = machine["read_bytes_per_s"]
    if sizes:
        ends = [min(sizes), max(sizes)]
        axes.plot(ends, [1e3 * size / rate for size in ends], "k-", lw=1, label=f"floor: reads {rate / 1e9:.0f} GB/s")
    _draw_cards(axes, machine, [record for record in records if record["record"] == "predicted"])
    axes.set(xlabel="bytes a step reads", ylabel="ms a step", title=f"{machine['subject']}\n{machine['device']}")
    axes.grid(which="both", alpha=0.2)
    figure.legend(loc="outside right upper", fontsize=7)
    with replacing(path) as beside:
        figure.savefig(beside, format=path.suffix.lower()[1:], dpi=150)


def _series(measured: Records) -> dict[str, list[tuple[float, float]]]:
    """Bytes and milliseconds by name, each in rising order of bytes."""
    found: dict[str, list[tuple[float, float]]] = {}
    for record in measured:
        batch = f"batch {record['batch']}"
        found.setdefault(f"compressed, {batch}", []).append((record["bytes"], record["ms"]))
        for name, ms in record["baselines_ms"].items():
            if ms is not None:
                found.setdefault(f"full, {name}, {batch}", []).append((record["full_bytes"], ms))
    return {name: sorted(points) for name, points in found.items()}


def _draw_cards(axes: Any, machine: dict[str, Any], predicted: Records) -> None:
    """The floors of named cards, which nobody measured here."""
    for card in predicted[0]["floor_ms"] if predicted else ():
        points = []
        for record in predicted:
            tokens = record["context"] * record["batch"]
            for kind, name in (("compressed", "bytes_per_token"), ("full", "full_bytes_per_token")):
                points.append((machine[name] * tokens, record["floor_ms"][card][kind]))
        axes.plot(
            *zip(*sorted(points), strict=True), "--", marker="o", mfc="none", lw=0.8, label=f"{card}, not measured"
        )
