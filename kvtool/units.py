"""Lengths, sizes and bit widths as people write them: ``128k``, ``4 GiB``, ``k4v3``, ``0,5-9``."""

import re

from kvtool.errors import InputError

_SUFFIX = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def parse_tokens(text: str | int) -> int:
    """A positive length in tokens; ``128k`` means 131072."""
    match = re.fullmatch(r"(\d+)([km]?)", str(text).strip().lower())
    if not match or int(match[1]) == 0:
        raise InputError(f"length '{text}': expected a positive number of tokens such as 8192, 8k or 1m")
    return int(match[1]) * _SUFFIX[match[2]]


def parse_bytes(text: str | int | float) -> int:
    """A positive number of bytes; ``4GiB``, ``512 MiB`` and ``1e9`` are accepted, suffixes are binary."""
    match = re.fullmatch(r"([\d.]+(?:e\d+)?)\s*([kmgt]?)(?:i?b)?", str(text).strip().lower())
    try:
        size = float(match[1]) * _SUFFIX[match[2]] if match else 0.0
    except ValueError:
        size = 0.0
    if size <= 0:
        raise InputError(f"size '{text}': expected a positive size such as 4GiB, 512MiB or 1000000")
    return int(size)


def parse_bits(text: str) -> tuple[float, float]:
    """Bits for keys and values: ``3`` means both, ``k4v3`` means 4 for keys and 3 for values."""
    match = re.fullmatch(r"k(\d+(?:\.\d+)?)v(\d+(?:\.\d+)?)", text.strip().lower())
    if match:
        return float(match[1]), float(match[2])
    try:
        return float(text), float(text)
    except ValueError:
        raise InputError(f"bits '{text}': expected a number such as 3 or a pair such as k4v3") from None


def parse_indices(text: str, count: int, what: str = "layers") -> list[int]:
    """Indices below ``count`` from ``0,5-9``; ``all`` means every one."""
    if text.strip().lower() == "all":
        return list(range(count))
    chosen: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if not match:
            raise InputError(f"{what} '{text}': expected a list such as 0,5-9")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last or last >= count:
            raise InputError(f"{what} '{text}': {part.strip()} is outside 0-{count - 1}")
        chosen.update(range(first, last + 1))
    return sorted(chosen)


def format_tokens(tokens: int) -> str:
    """``131072`` as ``128k`` where that is exact, plain digits otherwise."""
    return f"{tokens >> 10}k" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)


def format_bytes(size: float) -> str:
    """Binary units with three significant digits: ``188 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"


def format_seconds(seconds: float) -> str:
    """``75`` as ``1 min 15 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
