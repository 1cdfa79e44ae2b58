"""Heat maps in a terminal: a cell per layer and head, shaded by character and by colour."""

from collections.abc import Mapping, Sequence

from rich.text import Text

_SHADES = " ░▒▓█"
# dark to light, readable on black and on white
_COLOURS = ("#3b3f8f", "#31688e", "#21918c", "#35b779", "#b5a800", "#d95f02")


def heat_map(title: str, rows: Mapping[int, Sequence[float]], *, digits: int = 2) -> Text:
    """``rows`` maps a layer to one figure per head; the scale goes from the smallest to the largest of them."""
    figures = [value for row in rows.values() for value in row]
    low, high = min(figures, default=0.0), max(figures, default=0.0)
    width = max((len(row) for row in rows.values()), default=0)
    text = Text(f"{title}\n", no_wrap=True)
    text.append(f"{low:.{digits}f} ")
    for step in range(len(_COLOURS)):
        level = step / (len(_COLOURS) - 1)
        text.append(_shade(level) * 2, style=_colour(level))
    text.append(f" {high:.{digits}f}\n")
    for layer, row in rows.items():
        text.append(f"{layer:>3} ")
        for value in row:
            level = (value - low) / (high - low) if high > low else 0.0
            text.append(_shade(level) * 2, style=_colour(level))
        text.append("  " * (width - len(row)) + "\n")
    return text


def _shade(level: float) -> str:
    return _SHADES[min(int(level * len(_SHADES)), len(_SHADES) - 1)]


def _colour(level: float) -> str:
    return _COLOURS[min(int(level * len(_COLOURS)), len(_COLOURS) - 1)]
