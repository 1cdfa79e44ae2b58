"""``capture.json``: what a capture is of and what it must contain. docs/capture.md describes the directory.

It is written last. While shards are being written the same object, with the files so far, is ``capture.partial.json``.
Nothing in it depends on when or how often the capture was interrupted.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvtool.errors import CaptureError
from kvtool.shapes import CacheShape
from kvtool.units import format_bytes

COMPLETE, PARTIAL, COMMON = "capture.json", "capture.partial.json", "common.safetensors"
FORMAT = 1


class FileRecord(BaseModel):
    """Size and sha256 of one file."""

    model_config = ConfigDict(frozen=True)

    bytes: int
    sha256: str


class Manifest(BaseModel):
    """Everything that decides the content of a capture, and the files that hold it.

    recorded: layers on disk; not_recorded: why the others are not.
    starts: where in the text's tokens each sample begins. prefix: special tokens put before each sample.
    """

    model_config = ConfigDict(frozen=True)

    format: Literal[1] = 1
    model: str
    revision: str | None
    fingerprint: str
    shape: CacheShape
    recorded: tuple[int, ...]
    not_recorded: dict[int, str]
    text: str
    text_sha256: str
    context: int = Field(gt=0)
    samples: int = Field(gt=0)
    starts: tuple[int, ...]
    prefix: tuple[int, ...]
    queries: str
    dtype: str
    computed_in: str
    device: str
    chunk: int = Field(gt=0)
    seed: int
    versions: dict[str, str]
    files: dict[str, FileRecord] = {}

    @property
    def plan_sha256(self) -> str:
        """sha256 of everything but the files: equal for two captures that must have equal content."""
        return hashlib.sha256(self.model_dump_json(exclude={"files"}).encode()).hexdigest()

    def shard(self, sample: int, chunk: int) -> str:
        """Path of one shard inside the capture."""
        return f"sample-{sample:03d}/chunk-{chunk:05d}.safetensors"

    @property
    def shards(self) -> list[str]:
        """Paths of all shards, in the order they are written."""
        return [self.shard(sample, chunk) for sample in range(self.samples) for chunk in range(self.chunks)]

    @property
    def chunks(self) -> int:
        """Shards per sample."""
        return -(-self.context // self.chunk)

    def difference(self, other: "Manifest") -> str | None:
        """The first setting in which ``other`` differs, as ``context: 8192 against 4096``."""
        mine, theirs = self.model_dump(exclude={"files"}), other.model_dump(exclude={"files"})
        for name in mine:
            if mine[name] != theirs[name]:
                return f"{name}: {_brief(mine[name])} against {_brief(theirs[name])}"
        return None

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Read ``path``.

        Raises:
            CaptureError: it is not a manifest of this format.
        """
        try:
            content = json.loads(path.read_text())
            if content.get("format") != FORMAT:
                raise CaptureError(f"{path}: expected capture format {FORMAT}, found {content.get('format')}")
            return cls.model_validate(content)
        except (OSError, ValueError, AttributeError) as error:
            detail = error.errors()[0] if isinstance(error, ValidationError) else None
            reason = f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" if detail else str(error)
            raise CaptureError(f"{path}: not a capture manifest: {reason}") from error

    def write(self, path: Path) -> None:
        """Write to ``path``, whole or not at all."""
        beside = path.with_name(f".{path.name}.tmp")
        with beside.open("w") as file:
            file.write(self.model_dump_json(indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)


def record_of(path: Path) -> FileRecord:
    """Size and sha256 of the file at ``path``."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(bytes=path.stat().st_size, sha256=digest)


def check_sizes(root: Path, manifest: Manifest) -> None:
    """Every file is there and as long as recorded.

    Raises:
        CaptureError: with the first that is not.
    """
    for name in [COMMON, *manifest.shards]:
        record = manifest.files.get(name)
        if record is None:
            raise CaptureError(f"{root}: the manifest does not list {name}; capture again")
        try:
            size = (root / name).stat().st_size
        except OSError as error:
            raise CaptureError(f"{root}: {name} is missing; capture again") from error
        if size != record.bytes:
            found, expected = format_bytes(size), format_bytes(record.bytes)
            raise CaptureError(
                f"{root}: {name} holds {size} bytes ({found}), expected {record.bytes} ({expected}); capture again"
            )


def _brief(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
