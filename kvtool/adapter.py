"""A low-rank change of a model's projections that belongs to an artifact: written beside it, applied while it serves.

    y = W x + B (A x)        A [r, in], B [out, r], LoRA's factor alpha / r folded into B

Source of the form: Hu et al., LoRA, https://arxiv.org/abs/2106.09685. Applying it needs torch alone: a hook per
projection, so the weights are never touched and what is removed afterwards leaves no trace.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from kvtool.errors import CalibrationError
from kvtool.home import replacing

_PROBED = 64  # weights of each projection that say whose they are
_SAME = 0.02  # of their root mean square: bfloat16 rounds to 0.004


@dataclass(frozen=True)
class Adapter:
    """The change of every adapted module of a model.

    tensors: float32; ``<module>.A`` [r, in], ``<module>.B`` [out, r], and ``<module>.probe``, some of the weights that
    the change was made for.
    """

    tensors: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]]) -> "Adapter":
        """The adapter of ``model`` with (A, B) of each module."""
        tensors = {}
        for name, (a, b) in factors.items():
            probe = _probe(model.get_submodule(name))
            for field, tensor in (("A", a), ("B", b), ("probe", probe)):
                tensors[f"{name}.{field}"] = tensor.detach().float().cpu().contiguous()
        return cls(tensors)

    @property
    def modules(self) -> list[str]:
        """Names of the adapted modules."""
        return sorted({name.rpartition(".")[0] for name in self.tensors})

    @property
    def nbytes(self) -> int:
        """Bytes of the factors, shared by every sequence that is served."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def save(self, path: Path) -> str:
        """Write to ``path`` atomically; returns the sha256 of the file.

        Raises:
            OSError: the disk refuses.
        """
        content = save(dict(sorted(self.tensors.items())), {"format": "pt", "kvtool-adapter": "1"})
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as beside:
            beside.write_bytes(content)
        return hashlib.sha256(content).hexdigest()

    @classmethod
    def load(cls, path: Path, sha256: str) -> "Adapter":
        """Read the adapter that an artifact names with its hash.

        Raises:
            CalibrationError: it is not there, or it is another file than the artifact was written with.
        """
        try:
            content = path.read_bytes()
        except OSError as error:
            raise CalibrationError(
                f"{path}: expected the adapter that its artifact was fine-tuned with, found nothing to read; "
                "copy both files together"
            ) from error
        found = hashlib.sha256(content).hexdigest()
        if found != sha256:
            raise CalibrationError(
                f"{path}: expected the adapter of sha256 {sha256[:16]}..., found {found[:16]}...; the file was "
                "exchanged or damaged: copy it again with its artifact, or fit again"
            )
        try:
            tensors = load(content)
        except SafetensorError as error:
            raise CalibrationError(f"{path}: not a readable safetensors file ({error}); fit it again") from error
        names = {name.rpartition(".")[0] for name in tensors}
        if {f"{name}.{field}" for name in names for field in ("A", "B", "probe")} != set(tensors):
            raise CalibrationError(f"{path}: expected A, B and probe of every module, found others; fit it again")
        return cls(tensors)

    def check_fits(self, model: nn.Module) -> None:
        """Refuse a model whose weights are not those that were adapted.

        Raises:
            CalibrationError: naming the first module that is absent, of another shape or of other weights.
        """
        for name in self.modules:
            a, b, probe = (self.tensors[f"{name}.{field}"] for field in ("A", "B", "probe"))
            try:
                module = model.get_submodule(name)
            except AttributeError:
                raise _refusal(name, "found no such module") from None
            weight = getattr(module, "weight", None)
            if not isinstance(weight, Tensor) or tuple(weight.shape) != (len(b), a.shape[1]):
                shape = "none" if weight is None else f"{list(weight.shape)}"
                raise _refusal(name, f"expected weights [{len(b)}, {a.shape[1]}], found {shape}")
            found = _probe(module)
            if not (found - probe).square().mean().sqrt() <= _SAME * probe.square().mean().sqrt():
                raise _refusal(name, "found other weights than it was made for")


@contextmanager
def adapted(model: nn.Module, adapter: Adapter | None) -> Iterator[None]:
    """Let ``model`` compute with ``adapter`` inside the block; None changes nothing.

    Raises:
        CalibrationError: the adapter is for another model.
    """
    if adapter is None:
        yield
        return
    adapter.check_fits(model)
    handles = []
    try:
        for name in adapter.modules:
            module = model.get_submodule(name)
            weight: Any = module.weight
            a, b = (adapter.tensors[f"{name}.{field}"].to(weight.device) for field in "AB")
            handles.append(module.register_forward_hook(_Hook(a, b)))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Hook:
    """Adds B (A x) to what a projection returns."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.a, self.b = a, b

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        change = inputs[0].to(self.a.dtype) @ self.a.mT @ self.b.mT
        return output + change.to(output.dtype)


def _probe(module: nn.Module) -> Tensor:
    """Weights of ``module`` at even distances, float32 [at most 64]."""
    weight: Any = module.weight
    flat = weight.detach().flatten()
    step = max(1, len(flat) // _PROBED)
    return flat[::step][:_PROBED].float().cpu()


def _refusal(name: str, reason: str) -> CalibrationError:
    return CalibrationError(
        f"adapter for another model: {name}: {reason}; serve the model that the artifact was fine-tuned for"
    )
