"""Texts: a small corpus that ships with kvtool, in three domains, and files or data sets of your own.

austen  role ``calibration``: what methods are fitted to, and the haystack of the pass key
wiki    role ``heldout``: another domain, what methods are scored on; never fitted to
kjv     role ``third``: a domain for the matrix of who was fitted to what and scored on what

README.md beside this file has sources and licences.
"""

import json
import lzma
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from kvtool.errors import InputError

_DATASETS = "pip install 'kvtool[datasets]'"


@dataclass(frozen=True)
class Text:
    """One text of the corpus: ``tokens`` are counted with SmolLM2's tokenizer."""

    name: str
    role: str
    what: str
    licence: str
    tokens: int


TEXTS = {
    text.name: text
    for text in (
        Text("austen", "calibration", "Jane Austen, Emma, volumes I and II", "public domain", 132_591),
        Text("wiki", "heldout", "whole articles of the English Wikipedia", "CC-BY-SA-3.0", 150_068),
        Text("kjv", "third", "King James Bible, Genesis to Deuteronomy", "public domain", 210_658),
    )
}
CALIBRATION, HELDOUT = "austen", "wiki"


def names() -> list[str]:
    """Names of the shipped texts."""
    return list(TEXTS)


def load(name: str | Path) -> str:
    """A shipped text by name, a file by path (txt, or jsonl with a field ``text``), or ``datasets:ID[:SPLIT[:FIELD]]``.

    Raises:
        InputError: no such text, an unreadable file, or no text in it.
    """
    if str(name) in TEXTS:
        return lzma.decompress((files(__name__) / f"{name}.txt.xz").read_bytes()).decode()
    if str(name).startswith("datasets:"):
        return _dataset(str(name))
    path = Path(name).expanduser()
    if not path.is_file():
        raise InputError(f"text '{name}': no such file, and none of the shipped texts {', '.join(TEXTS)}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"text '{name}': expected UTF-8 text: {error}") from error
    text = _jsonl(path, text) if path.suffix in (".jsonl", ".ndjson") else text
    if not text.strip():
        raise InputError(f"text '{name}': the file is empty")
    return text


def load_all(names: str) -> dict[str, str]:
    """The texts of ``names``, commas between them, by short name; a file may have commas in its own name.

    Raises:
        InputError: as :func:`load`, or a text named twice.
    """
    every = [names] if Path(names).expanduser().is_file() else [name.strip() for name in names.split(",")]
    found = {name if name in TEXTS else Path(name).name: load(name) for name in every}
    if len(found) < len(every):
        raise InputError(f"text '{names}': expected different names, found one of them twice")
    return found


def _jsonl(path: Path, lines: str) -> str:
    """The field ``text`` of every line, joined by empty lines."""
    parts = []
    for number, line in enumerate(lines.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"text '{path}': line {number} is not JSON: {error.msg}") from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise InputError(f"text '{path}': line {number} has no string field \"text\"")
        parts.append(record["text"])
    return "\n\n".join(parts)


def _dataset(name: str) -> str:
    """The text field of a data set of the Hugging Face hub; needs the extra and, the first time, the network."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError(f"text '{name}': reading data sets needs the package datasets; {_DATASETS}") from None
    _, identifier, *rest = name.split(":")
    split, field = (*rest, *("train", "text")[len(rest) :])[:2]
    try:
        rows = load_dataset(identifier, split=split)
        parts = [row[field] for row in rows]
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"text '{name}': cannot read split {split}, field {field}: {reason}") from error
    return "\n\n".join(part for part in parts if part)
