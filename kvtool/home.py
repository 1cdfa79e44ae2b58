"""Where kvtool keeps what it makes: ``$KVTOOL_HOME``, default ``~/.cache/kvtool``.

Each step remembers its newest output, so that the next command works without arguments.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvtool.errors import InputError

STEPS = ("capture", "calibration", "certificate")


def home() -> Path:
    """The directory, created on first use."""
    path = Path(os.environ.get("KVTOOL_HOME") or Path.home() / ".cache" / "kvtool").expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"KVTOOL_HOME={path}: cannot create the directory: {error.strerror}") from error
    return path


def remember(step: str, path: Path) -> None:
    """Make ``path`` the newest output of ``step``."""
    assert step in STEPS
    newest = _newest()
    newest[step] = str(path.resolve())
    write_atomically(home() / "newest.json", json.dumps(newest, indent=1))


def newest(step: str, command: str) -> Path:
    """The newest output of ``step``.

    Raises:
        InputError: there is none; the message names the ``command`` that makes one.
    """
    path = _newest().get(step)
    if path is None or not Path(path).exists():
        gone = f"the newest {step}, {path}, is gone" if path else f"no {step} yet"
        raise InputError(f"{gone}; run '{command}' first or name a path")
    return Path(path)


def write_atomically(path: Path, text: str) -> None:
    """Write beside ``path``, then rename: a reader sees the old file or the new one, never half."""
    with replacing(path) as beside:
        beside.write_text(text)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write to; it becomes ``path`` at the end of the block, or goes if that fails."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    beside = Path(name)
    try:
        yield beside
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _newest() -> dict[str, str]:
    try:
        newest = json.loads((home() / "newest.json").read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return newest if isinstance(newest, dict) else {}
