"""What there is to say about a model, a capture or an artifact: one record each, from headers."""

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from kvtool.calibration import read_header
from kvtool.capture import Capture
from kvtool.capture.manifest import COMPLETE, PARTIAL, Manifest
from kvtool.shapes import CacheShape


@dataclass(frozen=True)
class Record:
    """The base: where the thing is. ``kind`` in the JSON object is the class's own."""

    path: str

    def as_dict(self) -> dict[str, Any]:
        """The JSON object of ``kvtool inspect --json``."""
        return {"kind": type(self).__name__.removesuffix("Record").lower(), **asdict(self)}


@dataclass(frozen=True)
class CaptureRecord(Record):
    """A capture directory. complete: False while ``kvtool capture --resume`` has work left."""

    model: str
    fingerprint: str
    layers: int
    of_layers: int
    not_captured: dict[int, str]
    samples: int
    context: int
    queries: str
    dtype: str
    text: str
    text_sha256: str
    bytes: int
    versions: dict[str, str]
    complete: bool


@dataclass(frozen=True)
class CalibrationRecord(Record):
    """An artifact. bytes: of its tensors, shared by every sequence that is served."""

    method: str
    options: dict[str, Any]
    policy: dict[str, Any]
    layers: int
    of_layers: int
    head_dims: list[int]
    tensors: int
    bytes: int
    provenance: dict[str, Any]


@dataclass(frozen=True)
class ModelRecord(Record):
    """A model's cache. bytes_per_token: in 16 bits, of the layers whose cache grows with the context."""

    fingerprint: str
    layers: list[dict[str, Any]]
    kinds: dict[str, int]
    bytes_per_token: int


def capture_record(path: Path) -> CaptureRecord:
    """From the manifest of the capture in ``path``.

    Raises:
        CaptureError: it cannot be read, or files are missing or truncated.
    """
    complete = (path / COMPLETE).is_file()
    manifest = Capture.open(path).manifest if complete else Manifest.read(path / PARTIAL)
    return CaptureRecord(
        path=str(path),
        model=manifest.model,
        fingerprint=manifest.fingerprint,
        layers=len(manifest.recorded),
        of_layers=len(manifest.shape.layers),
        not_captured=manifest.not_recorded,
        samples=manifest.samples,
        context=manifest.context,
        queries=manifest.queries,
        dtype=manifest.dtype,
        text=manifest.text,
        text_sha256=manifest.text_sha256,
        bytes=sum(file.bytes for file in manifest.files.values()),
        versions=manifest.versions,
        complete=complete,
    )


def calibration_record(path: Path) -> CalibrationRecord:
    """From the header of the artifact at ``path``; its tensors are not read.

    Raises:
        CalibrationError: it is not an artifact.
    """
    header = read_header(path)
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name != "empty"]  # noqa: SIM118  # safe_open is no mapping
        sizes = [_nbytes(file.get_slice(name)) for name in names]
    compressed = [header.shape.layers[i] for i in header.shape.compressible if i not in header.policy.exact_layers]
    return CalibrationRecord(
        path=str(path),
        method=header.method,
        options=header.options,
        policy=header.policy.model_dump(mode="json"),
        layers=len(compressed),
        of_layers=len(header.shape.layers),
        head_dims=sorted({layer.head_dim for layer in compressed}),
        tensors=len(names),
        bytes=sum(sizes),
        provenance=header.provenance,
    )


def model_record(name: str | None) -> ModelRecord:
    """Load the model ``name`` and ask it; the built-in one without a name.

    Raises:
        ModelError: it cannot be loaded.
    """
    from kvtool.models import load_model

    loaded = load_model(name, device="cpu")
    return ModelRecord(
        path=loaded.name,
        fingerprint=loaded.fingerprint,
        layers=[layer.model_dump(mode="json") for layer in loaded.shape.layers],
        kinds=dict(Counter(str(layer.kind) for layer in loaded.shape.layers)),
        bytes_per_token=bytes_per_token(loaded.shape),
    )


def bytes_per_token(shape: CacheShape) -> int:
    """Bytes a token adds to the uncompressed cache, keys and values in 16 bits."""
    return sum(4 * shape.layers[i].num_kv_heads * shape.layers[i].head_dim for i in shape.compressible)


# bits of the dtypes that safetensors names
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16}


def _nbytes(view: Any) -> int:
    count = 1
    for size in view.get_shape():
        count *= size
    dtype = view.get_dtype()
    return count * _BITS.get(dtype, 64 if dtype.endswith("64") else 32) // 8
