"""The artifact: one safetensors file that says how a cache is compressed. docs/artifact.md is its specification.

Tensors are named ``layers.<i>.<field>``, or ``<field>`` when layers share them; ``__metadata__["kvtool"]`` is one JSON
object, the ``Header`` below. A reader refuses what does not fit, naming tensor, expected and found.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import kvtool
from kvtool.adapter import Adapter
from kvtool.errors import CalibrationError
from kvtool.home import replacing
from kvtool.methods import make_method
from kvtool.methods.base import LayerCalibration, Method
from kvtool.policy import CachePolicy
from kvtool.shapes import CacheShape

FORMAT = 1

__all__ = ["FORMAT", "CachePolicy", "Calibration", "Header", "read_header"]


class AdapterFile(BaseModel):
    """The adapter that belongs to an artifact: a file in the same directory, and its sha256."""

    file: str = Field(pattern=r"^[^/\\]+$")
    sha256: str


class Header(BaseModel):
    """The JSON object in the file's metadata. Keys a reader does not know are kept."""

    model_config = ConfigDict(extra="allow")

    format: Literal[1]
    method: str
    options: dict[str, Any]
    shape: CacheShape
    policy: CachePolicy
    provenance: dict[str, Any]
    adapter: AdapterFile | None = None
    sha256: str | None = None  # of the rest of the header and the tensors; absent in files of other writers


@dataclass(frozen=True)
class Calibration:
    """A method, the tensors fitted for it, and where both come from; ``adapter`` if the model was adapted to them."""

    method: Method
    shape: CacheShape
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    policy: CachePolicy = field(default_factory=CachePolicy)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    adapter: Adapter | None = None

    def layer(self, index: int) -> LayerCalibration:
        """The share of layer ``index``."""
        prefix = f"layers.{index}."
        own = {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}
        shared = {name: t for name, t in self.tensors.items() if not name.startswith("layers.")}
        return LayerCalibration(index, self.shape.layers[index], self.shape.rope(index), shared | own)

    def to(self, device: torch.device | str) -> "Calibration":
        """The same calibration with its tensors on ``device``."""
        return replace(self, tensors={name: tensor.to(device) for name, tensor in self.tensors.items()})

    @property
    def nbytes(self) -> int:
        """Bytes of the fitted tensors and the adapter, shared by every sequence that is served."""
        adapter = 0 if self.adapter is None else self.adapter.nbytes
        return adapter + sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    @property
    def fingerprint(self) -> str:
        """sha256 of method, options, policy, shape, tensors and adapter; not of when and where they were made."""
        digest = hashlib.sha256()
        digest.update(json.dumps([self.method.name, asdict(self.method), self.policy.model_dump()]).encode())
        digest.update(self.shape.model_dump_json().encode())
        _hash(digest, self.tensors)
        if self.adapter is not None:
            _hash(digest, self.adapter.tensors)
        return digest.hexdigest()

    def check_fits(self, shape: CacheShape, model: str) -> None:
        """Refuse a model this artifact was not made for.

        Raises:
            CalibrationError: with the first difference of shape.
        """
        difference = self.shape.difference(shape)
        if difference:
            made_for = self.provenance.get("model", "another model")
            raise CalibrationError(
                f"artifact made for {made_for} does not fit {model}: {difference}; "
                "capture and calibrate with the model you serve"
            )

    def save(self, path: Path) -> Path:
        """Write to ``path`` atomically: a file beside it, then a rename. Returns the path.

        An adapter goes to ``<name>.adapter.safetensors`` in the same directory.

        Raises:
            CalibrationError: the tensors are not those of the method's schema, or the disk refuses.
        """
        _check_schema(str(path), self.method, self.shape, self.tensors)
        adapter = None if self.adapter is None else _save_adapter(self.adapter, path)
        header = Header(
            format=1,
            method=self.method.name,
            options=asdict(self.method),
            shape=self.shape,
            policy=self.policy,
            provenance={"kvtool": kvtool.__version__, "created": _now(), **self.provenance},
            adapter=adapter,
        )
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        header = header.model_copy(update={"sha256": _content_sha256(header.model_dump_json(), tensors)})
        # a file with no tensors is not a valid safetensors file for every reader
        tensors = tensors or {"empty": torch.zeros(1, dtype=torch.uint8)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as beside:
                save_file(tensors, beside, {"format": "pt", "kvtool": header.model_dump_json()})
        except (OSError, SafetensorError) as error:
            raise CalibrationError(f"{path}: cannot write the artifact: {error}") from error
        return path

    @classmethod
    def load(cls, path: Path) -> "Calibration":
        """Read and check an artifact.

        Raises:
            CalibrationError: not an artifact, an unknown format or method, contents other than its hash says, a tensor
                that differs from the schema, a value that is not finite, or an adapter that is not the one it names.
        """
        header = read_header(path)
        method = make_method(header.method, header.options, where=str(path))
        with safe_open(path, framework="pt") as file:
            names = set(file.keys()) - {"empty"}
            tensors = {name: file.get_tensor(name) for name in sorted(names)}
            found = _content_sha256(file.metadata()["kvtool"], tensors)
        if header.sha256 not in (None, found):
            raise CalibrationError(
                f"{path}: expected contents of sha256 {header.sha256}, found {found}; the file was changed or damaged "
                "after it was written: copy it again or fit it again"
            )
        _check_schema(str(path), method, header.shape, tensors)
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise CalibrationError(f"{path}: {name}: expected finite numbers, found NaN or infinity; fit it again")
        named = header.adapter
        adapter = None if named is None else Adapter.load(path.parent / named.file, named.sha256)
        return cls(method, header.shape, tensors, header.policy, header.provenance, adapter)


def read_header(path: Path) -> Header:
    """The header of an artifact, without its tensors.

    Raises:
        CalibrationError: with the reason it is not one.
    """
    if not path.is_file():
        raise CalibrationError(f"{path}: expected a calibration artifact (.safetensors), found nothing there")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("kvtool")
    except (SafetensorError, OSError) as error:
        raise CalibrationError(f"{path}: not a readable safetensors file ({error}); fit it again") from error
    if text is None:
        raise CalibrationError(f"{path}: a safetensors file, but not a kvtool artifact (no 'kvtool' metadata)")
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        raise CalibrationError(f"{path}: the 'kvtool' metadata is not JSON ({error}); fit it again") from error
    found = raw.get("format") if isinstance(raw, dict) else None
    if found != FORMAT:
        raise CalibrationError(f"{path}: expected format {FORMAT}, found {found}; upgrade kvtool or fit it again")
    try:
        return Header.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CalibrationError(f"{path}: metadata {where}: {first['msg']}; fit it again") from error


def _save_adapter(adapter: Adapter, path: Path) -> AdapterFile:
    beside = path.with_name(f"{path.stem}.adapter.safetensors")
    try:
        return AdapterFile(file=beside.name, sha256=adapter.save(beside))
    except OSError as error:
        raise CalibrationError(f"{beside}: cannot write the adapter: {error}") from error


def _check_schema(where: str, method: Method, shape: CacheShape, tensors: Mapping[str, Tensor]) -> None:
    schema = method.schema(shape)
    for name in sorted(schema.keys() | tensors.keys()):
        if name not in schema:
            raise CalibrationError(f"{where}: {name}: a tensor that {method.name} does not have; fit it again")
        if name not in tensors:
            raise CalibrationError(f"{where}: {name}: expected {schema[name]}, found nothing; fit it again")
        mismatch = schema[name].mismatch(tensors[name])
        if mismatch:
            raise CalibrationError(f"{where}: {name}: {mismatch}; fit it again")


def _content_sha256(header: str, tensors: Mapping[str, Tensor]) -> str:
    """Hash of the header's JSON without its own hash, as written and not as this version reads it, and the tensors."""
    raw = json.loads(header)
    raw.pop("sha256", None)
    digest = hashlib.sha256(json.dumps(raw, sort_keys=True).encode())
    _hash(digest, tensors)
    return digest.hexdigest()


def _hash(digest: "hashlib._Hash", tensors: Mapping[str, Tensor]) -> None:
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
