"""Read a capture lazily: one layer of one sample at a time, never the whole."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvtool.capture.manifest import COMMON, COMPLETE, PARTIAL, Manifest, check_sizes, record_of
from kvtool.capture.sample import LayerSample
from kvtool.errors import CaptureError
from kvtool.shapes import CacheShape


class Capture:
    """The queries, keys and values of a model over some text, in a directory."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest

    @classmethod
    def open(cls, path: Path | str) -> "Capture":
        """Open the capture in directory ``path``: its manifest is read and the size of every file checked.

        Raises:
            CaptureError: no capture, an unfinished one, or one with missing or truncated files.
        """
        root = Path(path).expanduser()
        if (root / COMPLETE).is_file():
            manifest = Manifest.read(root / COMPLETE)
            check_sizes(root, manifest)
            return cls(root, manifest)
        if (root / PARTIAL).is_file():
            raise CaptureError(f"{root}: an unfinished capture; finish it with 'kvtool capture ... --resume'")
        what = "no such directory" if not root.exists() else f"not a capture: it holds no {COMPLETE}"
        raise CaptureError(f"{root}: {what}; 'kvtool capture' makes one")

    @property
    def shape(self) -> CacheShape:
        """The cache of the model that was captured."""
        return self.manifest.shape

    @property
    def layers(self) -> list[int]:
        """Captured layers whose cache grows with the context: what methods are fitted to."""
        return [i for i in self.shape.compressible if i in self.manifest.recorded]

    @property
    def recorded(self) -> list[int]:
        """All captured layers, those with a sliding window included."""
        return list(self.manifest.recorded)

    @cached_property
    def sha256(self) -> str:
        """Of the manifest, and so of everything it lists."""
        return hashlib.sha256((self.path / COMPLETE).read_bytes()).hexdigest()

    @property
    def ids(self) -> Tensor:
        """Token ids [N, T] int64, one row per sample."""
        return self._common("ids")

    def tables(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Cosine and sine [T, R/2] float32 by which the keys of ``layer`` were turned; None without a known rope."""
        rope = self.shape.layers[layer].rope
        return None if rope is None else (self._common(f"ropes.{rope}.cos"), self._common(f"ropes.{rope}.sin"))

    def samples(self, layer: int, *, tokens: slice | None = None) -> Iterator[LayerSample]:
        """One :class:`LayerSample` per text sample; ``tokens`` is a range of positions, such as ``slice(0, 4096)``.

        Raises:
            CaptureError: the layer was not captured, or a shard is not readable.
        """
        if layer not in self.manifest.recorded:
            reason = self.manifest.not_recorded.get(layer, "the model has no such layer")
            raise CaptureError(f"{self.path}: layer {layer} was not captured: {reason}")
        start, stop, step = (tokens or slice(None)).indices(self.manifest.context)
        if step != 1 or stop <= start:
            raise ValueError(f"tokens {tokens}: expected a non-empty range without a step")
        positions = self._common("positions")[start:stop]
        asked = self._common("query_positions") if self.manifest.queries != "none" else None
        if asked is not None:
            asked = asked[(asked >= start) & (asked < stop)]
        gram = self._common(f"layers.{layer}.output_gram", missing_ok=True)
        for sample in range(self.manifest.samples):
            parts = self._read(sample, layer, start, stop)
            yield LayerSample(
                layer=layer,
                sample=sample,
                shape=self.shape.layers[layer],
                rope=self.shape.rope(layer),
                keys=parts["keys"],
                values=parts["values"],
                positions=positions,
                queries=parts.get("queries"),
                query_positions=asked,
                output_gram=gram if gram.numel() else None,
                stream=parts.get("stream"),
            )

    def verify(self) -> list[str]:
        """Hash every file again; the names of those that are not what the manifest says. Empty: all is well."""
        return [name for name, record in sorted(self.manifest.files.items()) if record_of(self.path / name) != record]

    def _read(self, sample: int, layer: int, start: int, stop: int) -> dict[str, Tensor]:
        """Keys, values and queries of positions start..stop, from the shards that hold them."""
        chunk = self.manifest.chunk
        parts: dict[str, list[Tensor]] = {"keys": [], "values": []}
        asked = (
            self._common("query_positions") if self.manifest.queries != "none" else torch.empty(0, dtype=torch.int64)
        )
        if self.manifest.queries != "none":
            parts["queries"] = []
        for number in range(start // chunk, -(-stop // chunk)):
            first = number * chunk
            low, high = max(start - first, 0), min(stop - first, chunk)
            with self._open(self.manifest.shard(sample, number)) as shard:
                for field in ("keys", "values"):
                    parts[field].append(shard.get_slice(f"layers.{layer}.{field}")[:, low:high])
                if f"layers.{layer}.stream" in shard.keys():  # noqa: SIM118  # safe_open is no mapping
                    parts.setdefault("stream", []).append(shard.get_tensor(f"layers.{layer}.stream")[low:high])
                if "queries" in parts:
                    here = asked[(asked >= first) & (asked < first + chunk)]
                    keep = (here >= start) & (here < stop)
                    parts["queries"].append(shard.get_tensor(f"layers.{layer}.queries")[:, keep])
        return {field: torch.cat(tensors, 0 if field == "stream" else 1) for field, tensors in parts.items()}

    def _common(self, name: str, missing_ok: bool = False) -> Tensor:
        with self._open(COMMON) as common:
            if missing_ok and name not in common.keys():  # noqa: SIM118  # safe_open is no mapping
                return torch.empty(0)
            tensor: Tensor = common.get_tensor(name)
            return tensor

    @contextmanager
    def _open(self, name: str) -> Iterator[Any]:
        """``safe_open`` whose errors say which file of which capture is broken."""
        try:
            with safe_open(self.path / name, "pt") as file:
                yield file
        except (OSError, SafetensorError) as error:
            raise CaptureError(f"{self.path}: {name} is not readable ({error}); capture again") from error
